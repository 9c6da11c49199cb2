"""What was looked up before, ready for I/O, so that a read that hits never walks a table.

The guest range of a chain is divided into windows of one `ResolvedWindows.span`. A window holds the
runs of the whole chain there, as columns of which Python reads one value at little cost; nothing is
made of a run before somebody reads it. Windows are bounded by their bytes, and the oldest go first.

The hot path of the server reads the columns itself (`pynbd.server.transmission`): one look into
a dictionary, one bisect, four values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pynbd.block.extent import DATA, Runs

# Of all windows of one image: more than a million runs, however long each is.
RESOLVED_BYTES = 24 << 20
# Up to so many values a list is better: it is read faster, and takes more memory. What a window
# and each of its runs take in lists, and in arrays:
_LIST_MAX = 64
_LISTS_BYTES = 800, 96
_ARRAYS_BYTES = 2500, 19


class Window:
    """The runs of guest bytes [offset, end), column by column.

    ``ends`` (exclusive), ``kinds`` and ``depths`` as in `Runs`. ``places``: host offset - guest
    offset for plain data (kind DATA), for others the ``host`` of `Runs`.
    """

    __slots__ = ("depths", "end", "ends", "kinds", "offset", "places", "weight")

    def __init__(self, runs: Runs) -> None:
        plain = runs.kind == DATA
        self.offset = runs.offset
        self.end = runs.end
        self.ends = _column(runs.ends)
        self.kinds = _column(runs.kind)
        self.depths = _column(runs.depth)
        self.places = _column(np.where(plain, runs.host - runs.starts, runs.host))
        fixed, each = _LISTS_BYTES if len(runs) <= _LIST_MAX else _ARRAYS_BYTES
        self.weight = fixed + each * len(runs)

    def rows(self, offset: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(start, end, kind, place, depth) of the runs, cut to guest bytes [offset, end)."""
        row = bisect_right(self.ends, offset)
        while offset < end:
            stop = min(self.ends[row], end)
            yield offset, stop, self.kinds[row], self.places[row], self.depths[row]
            offset = stop
            row += 1


def _column(values: npt.NDArray[Any]) -> Sequence[int]:
    column: list[int] = values.tolist() if len(values) <= _LIST_MAX else []
    return column or np.ascontiguousarray(values).data


class ResolvedWindows:
    """Windows of ``span`` guest bytes, by their number. ``changes`` counts calls of `forget`, of
    which a node on top of the chain may want to hear (``listener``).
    """

    listener: Callable[[int, int], None] | None = None

    def __init__(self, span: int, limit_bytes: int = RESOLVED_BYTES) -> None:
        self.span = span
        self.windows: dict[int, Window] = {}
        self.changes = 0
        self._limit = limit_bytes
        self._weight = 0

    def keep(self, window: Window) -> None:
        """Remember a window, which begins at a multiple of the span."""
        self._drop(window.offset // self.span)
        self._weight += window.weight
        while self.windows and self._weight > self._limit:
            self._drop(next(iter(self.windows)))
        self.windows[window.offset // self.span] = window

    def forget(self, offset: int, end: int) -> None:
        """Drop what is known of guest bytes [offset, end): their mapping changes."""
        self.changes += 1
        for number in range(offset // self.span, -(-end // self.span)):
            self._drop(number)
        if self.listener:
            self.listener(offset, end)

    def _drop(self, number: int) -> None:
        dropped = self.windows.pop(number, None)
        if dropped is not None:
            self._weight -= dropped.weight
