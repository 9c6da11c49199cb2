"""What a copy or a comparison consists of: pieces of a guest range, told by maps of it.

The ``kind`` of a piece is 0 where nothing needs to be read, because every map says that it reads as
zeroes; else a set of bits, one for each disk that may have data there. Pieces ascend and touch each
other. Their edges are at multiples of ``block``, but for those of the whole range: a block that is
partly this and partly that is of both kinds. What is to be read comes in pieces of one request,
which never straddle a multiple of its size, so that no cluster is fetched for two.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import NamedTuple

import numpy as np

from pynbd.block.extent import ZERO, Int64s, Runs, UInt8s, concatenate
from pynbd.client.disk import Disk

# What is mapped at once.
_MAP_WINDOW = 1 << 30
# What is skipped, or zeroed by one request: below the 4 GiB of a compact request, and soon done.
_ZERO_MAX = 1 << 30


Ranges = AsyncGenerator[tuple[int, int], None]
"""(offset, end) of guest ranges; they ascend, and do not overlap."""


class Piece(NamedTuple):
    """Guest bytes [offset, end)."""

    offset: int
    end: int
    kind: int


async def mapped(disk: Disk, offset: int, end: int, *, block: int) -> Runs:
    """What a disk says of guest bytes from ``offset`` on; it ends before ``end`` at a whole block,
    if it does.
    """
    runs = await disk.map(offset, min(end - offset, _MAP_WINDOW))
    while runs.end < end and runs.end % block:
        rest = await disk.map(runs.end, min(block - runs.end % block, end - runs.end))
        runs = concatenate([runs, rest])
    return runs


def may_have_data(kind: UInt8s) -> UInt8s:
    """1 for each kind of `Runs` that does not say that it reads as zeroes."""
    data: UInt8s = (kind & ZERO == 0).astype(np.uint8)
    return data


def cut(
    offset: int, ends: Int64s, kind: UInt8s, *, block: int, request_size: int
) -> Iterator[Piece]:
    """The pieces of consecutive runs from ``offset``; ``block`` and ``request_size`` are powers of
    two, and the first is no larger.
    """
    last = np.append(np.flatnonzero(kind[1:] != kind[:-1]), len(ends) - 1)
    rows = zip(ends[last].tolist(), kind[last].tolist(), strict=True)
    for start, end, of in _in_blocks(offset, rows, block) if block > 1 else _spans(offset, rows):
        size = request_size if of else _ZERO_MAX
        while start < end:
            stop = min(end, (start // size + 1) * size)
            yield Piece(start, stop, of)
            start = stop


def _spans(offset: int, rows: Iterator[tuple[int, int]]) -> Iterator[Piece]:
    for end, kind in rows:
        yield Piece(offset, end, kind)
        offset = end


def _in_blocks(offset: int, rows: Iterator[tuple[int, int]], block: int) -> Iterator[Piece]:
    """Whole blocks; one that several runs share has all their kinds."""
    begun, kinds, end = offset, 0, offset  # the block that is not complete yet
    for start, end, kind in _spans(offset, rows):
        if begun < start or start % block:
            kinds |= kind
            edge = -(-(begun + 1) // block) * block
            if end < edge:
                continue
            yield Piece(begun, edge, kinds)
            begun, kinds = edge, 0
        if begun < (edge := end // block * block):
            yield Piece(begun, edge, kind)
            begun = edge
        kinds = kind
    if begun < end:
        yield Piece(begun, end, kinds)
