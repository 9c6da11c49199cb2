"""Rows of several contexts: whatever the pieces, the same map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pynbd.cli.map_rows import Rows, Statuses, rows_of

Extents = list[tuple[int, int]]  # length, status


class Disk:
    """Answers as a server may: each context by itself, short by whatever ``cuts`` say."""

    def __init__(self, maps: Mapping[str, Extents], cuts: Sequence[int] = ()) -> None:
        self.bytes = {
            name: [status for length, status in extents for _ in range(length)]
            for name, extents in maps.items()
        }
        self.size = min(map(len, self.bytes.values()), default=0)
        self._cuts = iter(cuts)

    async def status(self, offset: int, length: int) -> Statuses:
        assert offset + length == self.size
        said = {}
        for name, status in self.bytes.items():
            seen = status[offset : offset + min(length, next(self._cuts, length))]
            # One extent for each byte is legal, too.
            said[name] = (np.ones(len(seen), np.int64), np.array(seen, np.uint32))
        return said


async def collected(disk: Disk, contexts: Sequence[str]) -> list[tuple[int, int, tuple[int, ...]]]:
    def plain(rows: Rows) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        combinations, which = rows.combinations()
        for offset, length, index in zip(rows.offsets, rows.lengths, which, strict=True):
            yield int(offset), int(length), combinations[index]

    return [row async for rows in rows_of(disk, contexts) for row in plain(rows)]


async def test_two_contexts() -> None:
    disk = Disk({"a": [(4, 0), (4, 3)], "b": [(2, 1), (6, 0)]}, cuts=[3, 5, 1, 1])
    assert await collected(disk, ["a", "b"]) == [(0, 2, (0, 1)), (2, 2, (0, 0)), (4, 4, (3, 0))]
    assert await collected(disk, ["b"]) == [(0, 2, (1,)), (2, 6, (0,))]


async def test_an_empty_disk() -> None:
    assert await collected(Disk({}), ["a"]) == []


async def test_a_status_of_64_bits() -> None:
    rows = Rows.side_by_side(0, [(np.array([8]), np.array([2**64 - 1], np.uint64))])
    assert rows.combinations()[0] == [(2**64 - 1,)]


@given(
    a=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    b=st.lists(st.integers(0, 1), min_size=40, max_size=40),
    cuts=st.lists(st.integers(1, 9), max_size=60),
)
async def test_cuts_leave_no_trace(a: list[int], b: list[int], cuts: list[int]) -> None:
    disk = Disk({"a": [(1, status) for status in a], "b": [(1, status) for status in b]}, cuts)
    disk.size = len(a)
    disk.bytes["b"] = b[: len(a)]
    rows = await collected(disk, ["a", "b"])
    assert [row[2] for row in rows for _ in range(row[1])] == list(zip(a, b, strict=False))
    assert [row[0] for row in rows] == [sum(r[1] for r in rows[:i]) for i in range(len(rows))]
    assert all(one[2] != next_one[2] for one, next_one in pairwise(rows))
