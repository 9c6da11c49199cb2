"""What each 64 bytes of a guest's disk may hold after a crash, exactly.

A request begins and ends at moments of the `Timeline`. It is *kept* once it has ended before a
FLUSH began that has succeeded, or once it has succeeded with FUA. A crash may leave the value of
every request that has begun, unless a later one (which began after that had ended) is kept; and
what was there at first, unless any is kept. Everything else is foreign or stale.

Requests are multiples of a cell, an eighth of a sector, so that they meet within sectors. Each cell
that is written says which request has written it, and where.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CELL = 64
WORDS = CELL // 8

Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


def cells_of(content: bytes | bytearray | memoryview) -> Words:
    """One row a cell."""
    return np.frombuffer(content, np.uint64).reshape(-1, WORDS)


def stamped(number: int, first: int, last: int) -> Words:
    """What request ``number`` writes into cells [first, last)."""
    cells = np.arange(first, last, dtype=np.uint64) << np.uint64(8)
    rows = cells[:, None] | np.arange(1, WORDS + 1, dtype=np.uint64)
    return rows | np.uint64(number + 1 << 40)


def told(row: Words) -> str:
    """What a cell says of itself."""
    if not row.any():
        return "zeroes"
    number, cell = int(row[0]) >> 40, (int(row[0]) >> 8) & 0xFFFFFFFF
    if number and (row == stamped(number - 1, cell, cell + 1)[0]).all():
        return f"what request {number - 1} wrote to {cell * CELL:#x}"
    return f"{row.tobytes()[:8].hex()}..., which no request has written"


@dataclass(eq=False, slots=True)
class Request:
    """One request of the guest: what it may do to cells [first, last), and is sure to do to cells
    [sure_first, sure_last) of them. A FLUSH has none.
    """

    number: int
    kind: str
    first: int = 0
    last: int = 0
    sure_first: int = 0
    sure_last: int = 0
    fua: bool = False
    payload: Words | None = None  # zeroes
    begin: int = 0
    end: int | None = None  # it is under way, or has failed

    def __str__(self) -> str:
        where = f" {self.first * CELL:#x}-{self.last * CELL:#x}" if self.last else ""
        return f"{self.number} {self.kind}{where}{' FUA' * self.fua} ({self.begin}-{self.end})"


@dataclass(eq=False, slots=True)
class _Begun:
    """A request that has begun: in which of its cells a crash may leave its value."""

    request: Request
    may_be: Bools
    kept: bool = False


class Cells:
    """What a crash may leave, at a moment that only goes forward. ``also``: what may be there at
    first as well as ``content``.
    """

    def __init__(
        self, content: bytes, requests: Iterable[Request], *, also: bytes | None = None
    ) -> None:
        self.first = cells_of(content)
        self._also = self.first if also is None else cells_of(also)
        self._first_may_be = np.ones(len(self.first), np.bool_)
        self._begun: dict[Request, _Begun] = {}
        events = [(request.begin, request, True) for request in requests]
        events += [(end, request, False) for _, request, _ in events if (end := request.end)]
        self._coming = sorted(events, key=lambda event: event[0])
        self._next = 0

    def advance(self, moment: int) -> None:
        """Let everything happen that was before ``moment``."""
        while self._next < len(self._coming) and self._coming[self._next][0] < moment:
            _, request, begins = self._coming[self._next]
            self._next += 1
            if request.kind == "flush":
                if not begins:
                    for other in list(self._begun.values()):
                        if other.request.end is not None and other.request.end < request.begin:
                            self._keep(other)
            elif begins:
                cells = request.last - request.first
                self._begun[request] = _Begun(request, np.ones(cells, np.bool_))
            elif request.fua and request in self._begun:
                self._keep(self._begun[request])

    def _keep(self, begun: _Begun) -> None:
        """It is on stable storage; what ended before it began is not there any more."""
        if begun.kept:
            return
        begun.kept = True
        kept = begun.request
        self._first_may_be[kept.sure_first : kept.sure_last] = False
        for other in list(self._begun.values()):
            end, first = other.request.end, other.request.first
            if end is not None and end < kept.begin:
                start, stop = max(kept.sure_first - first, 0), max(kept.sure_last - first, 0)
                other.may_be[start:stop] = False
                if not other.may_be.any():
                    del self._begun[other.request]

    def wrong(self, content: bytes | bytearray) -> str:
        """What is wrong with the guest's disk, "" if nothing is."""
        cells = cells_of(content)
        right = (cells == self.first).all(1) | (cells == self._also).all(1)
        right &= self._first_may_be
        for begun in self._begun.values():
            part = slice(begun.request.first, begun.request.last)
            found, payload = cells[part], begun.request.payload
            alike = ~found.any(1) if payload is None else (found == payload).all(1)
            right[part] |= alike & begun.may_be
        bad = np.flatnonzero(~right)
        if not len(bad):
            return ""
        cell = int(bad[0])
        may_be = [
            str(request)
            for request, begun in self._begun.items()
            if request.first <= cell < request.last and begun.may_be[cell - request.first]
        ]
        if self._first_may_be[cell]:
            may_be.append("what was there at first")
        return (
            f"{len(bad)} cells, the first at {cell * CELL:#x}, hold {told(cells[cell])};"
            f" allowed: {', '.join(may_be)}"
        )
