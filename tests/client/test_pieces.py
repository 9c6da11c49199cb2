"""Pieces: they cover the range, keep to blocks and requests, and forget no data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.extent import Runs
from pynbd.client.disk import Disk
from pynbd.client.pieces import Piece, cut, mapped
from tests.client.memory import MemoryNode

RUNS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=20)


def cut_up(offset: int, runs: list[tuple[int, int]], block: int, size: int) -> list[Piece]:
    ends = np.cumsum(np.array([length for length, _ in runs], np.int64)) + offset
    kind = np.array([kind for _, kind in runs], np.uint8)
    return list(cut(offset, ends, kind, block=block, request_size=size))


@given(st.integers(0, 50), RUNS, st.sampled_from([1, 4, 16]), st.sampled_from([16, 32]))
def test_laws(offset: int, runs: list[tuple[int, int]], block: int, size: int) -> None:
    pieces = cut_up(offset, runs, block, size)
    end = offset + sum(length for length, _ in runs)
    assert (pieces[0].offset, pieces[-1].end) == (offset, end)
    assert all(a.end == b.offset for a, b in pairwise(pieces))
    assert all(piece.end % block == 0 for piece in pieces[:-1])
    assert all((p.end - 1) // size == p.offset // size for p in pieces if p.kind)
    # Byte by byte: the kinds of all runs that share its block, inside the range.
    kinds = {}
    at = offset
    for length, kind in runs:
        for byte in range(at, at + length):
            kinds[byte] = kind
        at += length
    expected: dict[int, int] = {}
    for byte, kind in kinds.items():
        expected[byte // block] = expected.get(byte // block, 0) | kind
    for piece in pieces:
        for byte in range(piece.offset, piece.end):
            assert piece.kind == expected[byte // block]


def test_neighbours_of_a_kind_are_one() -> None:
    assert cut_up(0, [(10, 1), (20, 1), (5, 0), (5, 0)], 1, 64) == [(0, 30, 1), (30, 40, 0)]


def test_requests_divide_the_offsets() -> None:
    assert cut_up(10, [(60, 1)], 1, 32) == [(10, 32, 1), (32, 64, 1), (64, 70, 1)]


async def test_a_map_ends_at_a_whole_block() -> None:
    class Short(MemoryNode):
        async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
            return await super().layer(offset, min(length, 5), want_zero=want_zero)

    disk = Disk(Short(bytes(100), holes=[(0, 7)]))
    runs = await mapped(disk, 0, 100, block=8)
    assert runs.end == 8
    assert [(start, end, kind) for start, end, kind, *_ in runs] == [(0, 7, 2), (7, 8, 1)]
    assert (await mapped(disk, 96, 100, block=8)).end == 100
