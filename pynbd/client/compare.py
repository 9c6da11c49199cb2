"""Comparing the guest contents of two disks.

What both maps say reads as zeroes is not read at all; where one of them says so, only the other one
is read. The shorter disk is taken to go on in zeroes, as ``qemu-img compare`` does. Requests are in
flight in ascending order, and the first difference is the first one, whichever is answered first.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from pynbd.block.engine import Buffer
from pynbd.block.extent import DATA, ZERO, Int64s, Runs, UInt8s
from pynbd.client.disk import Disk
from pynbd.client.pieces import Piece, cut, mapped, may_have_data
from pynbd.client.workers import REQUEST_SIZE, REQUESTS, Next, Progress, in_flight

SECTOR = 512
"""What differs is listed in multiples of it."""

_NONE: Int64s = np.zeros(0, np.int64)


class Difference(StrEnum):
    """In what two disks differ; sizes and allocation only if that was asked for."""

    SIZE = "size"
    ALLOCATION = "allocation"
    CONTENT = "content"


@dataclass(slots=True)
class Comparison:
    """What came out: ``difference`` is None for disks that are identical.

    ``offset``: where they differ first. ``ranges``: (offset, end) of all contents that differ, in
    whole sectors, ascending, if they were asked for.
    """

    difference: Difference | None = None
    offset: int = 0
    ranges: list[tuple[int, int]] | None = None

    def note(self, difference: Difference, offset: int) -> None:
        """They differ at ``offset``, perhaps earlier than was known."""
        if self.difference is None or offset < self.offset:
            self.difference, self.offset = difference, offset

    def is_settled(self, offset: int) -> bool:
        """Whether nothing from ``offset`` on changes what is asked for."""
        return self.difference is not None and self.ranges is None and offset >= self.offset


async def compare(
    a: Disk,
    b: Disk,
    *,
    strict: bool = False,
    every: bool = False,
    requests: int = REQUESTS,
    request_size: int = REQUEST_SIZE,
    progress: Progress = lambda _: None,
) -> Comparison:
    """Compare two disks up to their first difference, or with ``every`` to the end.

    ``strict``: their sizes count too, and where they are allocated: data, zeroes, or nothing.
    ``requests``: at a time, and ``request_size`` the bytes of each, a power of two. ``progress``
    hears of the longer disk. Raises `MapError` and `ReadError`.
    """
    result = Comparison(ranges=[] if every else None)
    if strict and a.size != b.size:
        result.note(Difference.SIZE, min(a.size, b.size))
        return result
    found = array("q")  # where ranges of sectors begin and end, in the order of the answers
    zeroes = bytes(request_size)

    async def worker(following: Next) -> None:
        buffers = bytearray(request_size), bytearray(request_size)
        while piece := await following():
            length = piece.end - piece.offset
            if piece.kind and not result.is_settled(piece.offset):
                sides: list[Buffer] = [zeroes, zeroes]
                for side, (disk, buffer) in enumerate(zip((a, b), buffers, strict=True)):
                    if piece.kind & 1 << side:
                        await disk.read(piece.offset, memoryview(buffer)[:length])
                        sides[side] = buffer
                differs = _differing(sides[0], sides[1], length)
                if len(differs):
                    result.note(Difference.CONTENT, piece.offset + int(differs[0]))
                    if every:
                        found.extend(_ranges_of((differs + piece.offset) // SECTOR))
            progress(length)

    await in_flight(requests, _pieces(a, b, result, request_size, strict=strict), worker)
    if result.ranges is not None:
        result.ranges += _merged(found, max(a.size, b.size))
    return result


def _differing(left: Buffer, right: Buffer, length: int) -> Int64s:
    """Which of the first ``length`` bytes differ."""
    if length == len(left) and left == right:  # by far the fastest way
        return _NONE
    views = (np.frombuffer(buffer, np.uint8, length) for buffer in (left, right))
    return np.flatnonzero(np.not_equal(*views))


async def _pieces(
    a: Disk, b: Disk, result: Comparison, request_size: int, *, strict: bool
) -> AsyncGenerator[Piece, None]:
    offset, end = 0, max(a.size, b.size)
    while offset < end and not result.is_settled(offset):
        maps = [await mapped(disk, offset, end, block=1) for disk in (a, b)]
        ends = _edges(*maps)
        starts = np.append(np.int64(offset), ends[:-1])
        if strict:
            kind_a, kind_b = (_allocation(runs, starts) for runs in maps)
            for row in np.flatnonzero(kind_a != kind_b)[:1]:
                result.note(Difference.ALLOCATION, int(starts[row]))
        in_a, in_b = (may_have_data(runs.at(starts)[0]) for runs in maps)
        kind = in_a | in_b << np.uint8(1)
        for piece in cut(offset, ends, kind, block=1, request_size=request_size):
            yield piece
        offset = int(ends[-1])


def _edges(a: Runs, b: Runs) -> Int64s:
    """Where a run of either ends, up to where the shorter answer does."""
    edges: Int64s = np.union1d(a.ends, b.ends)
    return edges[edges <= min(a.end, b.end)]


def _allocation(runs: Runs, starts: Int64s) -> UInt8s:
    """What is compared of each run: whether it is data, whether it is zeroes, and whether any layer
    has it.
    """
    kind, _, depth = runs.at(starts)
    return kind & np.uint8(DATA | ZERO) | (depth > 0).astype(np.uint8) << np.uint8(2)


def _ranges_of(sectors: Int64s) -> list[int]:
    """Begin and end of each range of ascending sectors."""
    gaps = np.flatnonzero(np.diff(sectors) > 1)
    begins = sectors[np.append(0, gaps + 1)]
    ends = sectors[np.append(gaps, len(sectors) - 1)] + 1
    edges: list[int] = np.column_stack((begins, ends)).ravel().tolist()
    return edges


def _merged(found: array[int], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of sectors as ascending ranges of bytes; two pieces may have had parts of a sector."""
    if not found:
        return
    begins, ends = np.frombuffer(found, np.int64).reshape(-1, 2).T
    order = np.lexsort((ends, begins))
    begins, ends = begins[order], ends[order]
    gaps = np.flatnonzero(begins[1:] > ends[:-1])
    firsts = begins[np.append(0, gaps + 1)] * SECTOR
    lasts = ends[np.append(gaps, len(ends) - 1)] * SECTOR
    yield from zip(firsts.tolist(), np.minimum(lasts, size).tolist(), strict=True)
