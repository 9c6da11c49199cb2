"""DirtyBitmap against a model that knows every granule."""

from __future__ import annotations

import asyncio
import time
import tracemalloc

import numpy as np
import pytest
from bitarray import bitarray
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.bitmap import DirtyBitmap, DirtyRuns, blank

GRANULARITY = 16


def rows(runs: DirtyRuns) -> list[tuple[int, int, int]]:
    """(start, end, dirty)."""
    ends = runs.ends.tolist()
    return list(zip([runs.offset, *ends[:-1]], ends, runs.dirty.tolist(), strict=True))


async def whole(bitmap: DirtyBitmap, offset: int, length: int, limit: int) -> list[int]:
    """Dirty or not, for every byte, asked for until all is answered."""
    found: list[int] = []
    at, end = offset, offset + length
    while at < end:
        runs = await bitmap.runs(at, end - at, limit)
        assert 0 < len(runs) <= limit
        for start, stop, dirty in rows(runs):
            assert start < stop <= end
            found += [dirty] * (stop - start)
        at = runs.end
    return found


ranges = st.tuples(st.integers(0, 6000), st.integers(0, 900))


@settings(deadline=None)
@given(
    st.integers(1, 6000),
    st.lists(st.tuples(st.booleans(), ranges), max_size=12),
    ranges,
    st.integers(1, 9),
)
def test_marks_and_runs(
    size: int,
    steps: list[tuple[bool, tuple[int, int]]],
    asked: tuple[int, int],
    limit: int,
) -> None:
    bitmap = DirtyBitmap("b", size, GRANULARITY)
    granules = -(-size // GRANULARITY)
    model = [0] * granules
    for mark, (offset, length) in steps:
        offset = min(offset, size)
        length = min(length, size - offset)
        for index in range(granules):
            first, last = index * GRANULARITY, min((index + 1) * GRANULARITY, size)
            if mark and length and first < offset + length and offset < last:
                model[index] = 1
            elif not mark and offset <= first and last <= offset + length:
                model[index] = 0
        (bitmap.mark if mark else bitmap.clear)(offset, length)
    flat = [model[at // GRANULARITY] for at in range(size)]
    assert bitmap.dirty_bytes() == sum(flat)
    offset, length = asked[0], asked[1] + 1
    flat += [0] * 8000  # what lies past the end is clean
    assert asyncio.run(whole(bitmap, offset, length, limit)) == flat[offset : offset + length]


@given(st.lists(ranges, max_size=8), st.lists(ranges, max_size=8), st.sampled_from([4, 16, 64]))
def test_merge(ours: list[tuple[int, int]], theirs: list[tuple[int, int]], other: int) -> None:
    size = 6900
    bitmap, source = DirtyBitmap("a", size, GRANULARITY), DirtyBitmap("b", size, other)
    expected = DirtyBitmap("c", size, GRANULARITY)
    for offset, length in ours:
        bitmap.mark(offset, length)
        expected.mark(offset, length)
    for offset, length in theirs:
        source.mark(offset, length)
        first = offset // other * other
        last = min(-(-(offset + length) // other) * other, size)
        expected.mark(first, last - first if length else 0)
    bitmap.merge(source)
    assert bitmap.bits == expected.bits


async def test_runs_are_as_long_as_they_can_be() -> None:
    bitmap = DirtyBitmap("b", 1 << 40, 65536)
    bitmap.mark(1 << 30, 1 << 29)
    assert rows(await bitmap.runs(0, 1 << 36, 100)) == [
        (0, 1 << 30, 0),
        (1 << 30, (1 << 30) + (1 << 29), 1),
        ((1 << 30) + (1 << 29), 1 << 36, 0),
    ]
    assert rows(await bitmap.runs((1 << 30) + 5, 10, 100)) == [((1 << 30) + 5, (1 << 30) + 15, 1)]


async def test_one_call_is_bounded() -> None:
    """2^25 granules: all alike, then all different. The loop is not held, whatever is asked for."""
    size = 1 << 34
    bitmap = DirtyBitmap("b", size, 512)
    for pattern in (b"\0", b"\x55"):
        bitmap.bits[:] = bitarray(np.frombuffer(pattern * (size // 512 // 8), np.uint8).tobytes())
        longest, at = 0.0, 0
        while at < size:
            before = time.thread_time()
            runs = await bitmap.runs(at, size - at, 1 << 20)
            longest = max(longest, time.thread_time() - before)
            at = runs.end
            if at > size // 8:
                break
        # Ten times what it takes on an idle machine.
        assert longest < 0.1


async def test_only_what_differs_is_unpacked() -> None:
    """2^25 granules: what a call takes follows what it tells, not what is there."""
    size = 1 << 34
    bitmap = DirtyBitmap("b", size, 512)
    for pattern, limit, most in ((b"\0", 1 << 20, 1 << 17), (b"\x55", 2, 5 << 20)):
        bitmap.bits[:] = bitarray(np.frombuffer(pattern * (size // 512 // 8), np.uint8).tobytes())
        tracemalloc.start()
        try:
            runs = await bitmap.runs(0, size, limit)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(runs) <= limit
        assert peak < most


async def test_the_bits_are_brought_when_needed_and_kept_when_loaded() -> None:
    asked = 0

    async def source() -> bitarray:
        nonlocal asked
        asked += 1
        bits = blank(1000, GRANULARITY)
        bits[3] = 1
        return bits

    bitmap = DirtyBitmap("b", 1000, GRANULARITY, source=source)
    assert bitmap.persistent
    assert asked == 0
    for times in (1, 2):
        assert rows(await bitmap.runs(0, 100, 9)) == [(0, 48, 0), (48, 64, 1), (64, 100, 0)]
        assert asked == times
    await bitmap.load()
    bitmap.mark(64, 1)
    assert rows(await bitmap.runs(0, 100, 9)) == [(0, 48, 0), (48, 80, 1), (80, 100, 0)]
    assert asked == 3


async def test_a_failed_source_is_asked_again() -> None:
    fail = True

    async def source() -> bitarray:
        if fail:
            raise OSError(5, "no")
        return blank(1000, GRANULARITY)

    bitmap = DirtyBitmap("b", 1000, GRANULARITY, source=source)
    with pytest.raises(OSError, match="no"):
        await bitmap.runs(0, 1, 1)
    fail = False
    assert rows(await bitmap.runs(0, 1000, 1)) == [(0, 1000, 0)]
