"""The bars of a picture of a disk: columns of bytes become boxes (pure).

A column of a bar is divided by what is in it, from the bottom. Whatever is in it at all, however
little, gets at least `_MARK` pixels of its height. Between two that fill the columns beside it, one
column is given to the larger part: the edge of a block has no steps.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from pynbd.block.extent import Int64s
from pynbd.cli.picture.shapes import Box, Fill

Bools = npt.NDArray[np.bool_]

LINE = "#8a8a8a"

_GRID = "#d9d9d9"
_MARK = 4
_TICKS = 10  # about so many guest offsets are marked, at most
_PARTS = 4  # into which small ticks divide what is between two of them
_OFFSET_ROOM = 110  # pixels


class Bars:
    """The bars of a disk of ``size`` bytes in ``count`` columns, from ``left`` to ``right``.

    ``ticks`` are the guest offsets that are marked, multiples of a power of two, and where.
    """

    def __init__(self, size: int, count: int, left: int, right: int) -> None:
        self._size = size
        self._left = left
        self._span = right - left
        self._column = self._span / max(count, 1)  # its width in pixels
        edges = np.array([size * edge // max(count, 1) for edge in range(count + 1)], np.int64)
        self._widths = edges[1:] - edges[:-1]  # and in bytes
        step = 1 << max(-(-size // _TICKS) - 1, 0).bit_length()
        self.ticks = [(at, self.place(at)) for at in (*range(0, size, step), size)]
        self._small_ticks = [self.place(at) for at in range(0, size, max(step // _PARTS, 1))]
        # What would run into the offset of the end gives way.
        del self.ticks[bisect(self.ticks, right - _OFFSET_ROOM, 1, key=itemgetter(1)) : -1]

    def place(self, offset: int) -> float:
        """Where a guest offset is."""
        return self._left + self._span * offset / self._size if self._size else self._left

    def bar(
        self, y: int, height: int, columns: Int64s, looks: Sequence[Fill], end: int | None = None
    ) -> Iterator[Fill]:
        """A bar of ``columns``, whose classes look so, from the bottom to the top; the last is
        nothing, on which the grid is seen. ``end``: the guest offset where the bar ends.
        """
        *fills, nothing = (
            replace(look, boxes=boxes)
            for look, boxes in zip(looks, self._boxes(y, height, columns), strict=True)
        )
        right = self.place(self._size if end is None else end)
        ticks = [x for _, x in self.ticks if x <= right]
        grid = Fill("grid", _GRID, [Box(x - 0.5, y, 1, height) for x in ticks])
        yield from (fill for fill in (nothing, grid, *fills) if fill.boxes)
        yield frame(Box(self._left, y, right - self._left, height))
        below = y + height + 1
        small = [Box(x - 0.5, below, 1, 2) for x in self._small_ticks if x <= right]
        yield Fill("tick", LINE, [*(Box(x - 0.5, below, 1, 5) for x in ticks), *small])

    def alone(self, columns: Int64s, least: int) -> Iterator[tuple[int, float]]:
        """The classes that are nearly alone over ``least`` pixels, and the middle of each."""
        alone = self._nearly_all(columns)
        which = np.where(alone.any(axis=0), alone.argmax(axis=0), -1)
        for first, last in _stretches(which):
            if which[first] >= 0 and (last - first) * self._column >= least:
                yield int(which[first]), self._left + (first + last) / 2 * self._column

    def most(self, columns: Int64s) -> float:
        """The middle of the first stretch of the columns that have the most in them."""
        most = columns == columns.max()
        first, last = next(stretch for stretch in _stretches(most) if most[stretch[0]])
        return self._left + (first + last) / 2 * self._column

    def _boxes(self, y: int, height: int, columns: Int64s) -> Iterator[list[Box]]:
        """The boxes of each class; equal neighbours are one."""
        columns = self._without_steps(columns)
        present = columns > 0
        marks = present * np.minimum(_MARK, height // np.maximum(present.sum(axis=0), 1))
        parts = height * (columns / self._widths)
        # What is too little for its mark takes from the others, as much from each as it is above.
        above = np.maximum(parts - marks, 0)
        free = np.maximum(parts.sum(axis=0) - marks.sum(axis=0), 0)
        parts = marks + above * (free / np.maximum(above.sum(axis=0), 1e-9))
        tops = np.rint(parts.cumsum(axis=0)).astype(np.int64)
        bottoms = np.vstack((np.zeros_like(tops[:1]), tops[:-1]))
        for top, bottom in zip(tops, bottoms, strict=True):
            yield [
                Box(
                    self._left + first * self._column,
                    y + height - int(top[first]),
                    (last - first) * self._column,
                    int(top[first] - bottom[first]),
                )
                for first, last in _stretches(top * (height + 1) + bottom)
                if top[first] > bottom[first]
            ]

    def _without_steps(self, columns: Int64s) -> Int64s:
        """All is the larger part where each part nearly fills a column beside it."""
        alone = np.pad(self._nearly_all(columns), ((0, 0), (1, 1)))
        beside = alone[:, :-2] | alone[:, 2:]
        edge = ((columns == 0) | beside).all(axis=0) & (columns.sum(axis=0) == self._widths)
        most = np.arange(len(columns))[:, None] == columns.argmax(axis=0)
        return np.where(edge, most * self._widths, columns)

    def _nearly_all(self, columns: Int64s) -> Bools:
        return columns > self._widths * 0.9


def frame(box: Box) -> Fill:
    """A thin line around a box."""
    right, bottom = box.x + box.width, box.y + box.height
    boxes = [
        Box(box.x - 1, box.y - 1, box.width + 2, 1),
        Box(box.x - 1, bottom, box.width + 2, 1),
        Box(box.x - 1, box.y, 1, box.height),
        Box(right, box.y, 1, box.height),
    ]
    return Fill("frame", LINE, boxes)


def _stretches(values: Int64s | Bools) -> Iterator[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    bounds = [0, *edges.tolist(), len(values)]
    yield from pairwise(bounds) if len(values) else ()
