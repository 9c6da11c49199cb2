"""Copying: what is read, what is written, how much at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncGenerator

import pytest

from pynbd.client.copy import copy
from pynbd.client.disk import Disk, Target
from pynbd.errors import ReadError
from tests.client.memory import MemoryNode

K = 1 << 10
NOISE = bytes(range(1, 256)) * 1028  # 256 KiB and a little


async def test_zeroes_are_not_read() -> None:
    source = MemoryNode(NOISE[: 32 * K] + bytes(32 * K) + NOISE[: 32 * K], holes=[(32 * K, 64 * K)])
    node = MemoryNode(b"\xee" * source.size)
    done: list[int] = []
    await copy(Disk(source), Target(node), request_size=16 * K, progress=done.append)
    assert node.content == source.content
    assert node.zeroed == [(32 * K, 64 * K)]
    assert not any(start < 64 * K and end > 32 * K for start, end in source.read)
    assert sum(done) == source.size
    assert node.flushes == 1


async def test_requests_in_flight() -> None:
    source = MemoryNode(NOISE)
    await copy(Disk(source), Target(MemoryNode(NOISE)), requests=5, request_size=4096)
    assert source.most_in_flight == 5
    assert max(end - start for start, end in source.read) == 4096


async def test_workers_without_work_hold_nothing() -> None:
    """A thousand requests of 32 MiB at a time are 32 GiB, if there are as many."""
    source, node = MemoryNode(NOISE), MemoryNode(bytes(len(NOISE)))
    tracemalloc.start()
    try:
        await copy(Disk(source), Target(node), requests=1024, request_size=32 * K * K)
        assert tracemalloc.get_traced_memory()[1] < 64 * K * K
    finally:
        tracemalloc.stop()
    assert node.content == source.content


async def test_the_first_failure_ends_the_others() -> None:
    source, node = MemoryNode(NOISE, bad=[8192]), MemoryNode(bytes(len(NOISE)))
    with pytest.raises(ReadError, match="offset 8192"):
        await copy(Disk(source), Target(node), requests=4, request_size=4096)
    assert len(source.read) < 10
    assert node.flushes == 0


async def _these(*ranges: tuple[int, int]) -> AsyncGenerator[tuple[int, int], None]:
    for each in ranges:
        yield each


async def test_ranges() -> None:
    """One map serves those that are near each other; what lies between counts as done."""
    source = MemoryNode(NOISE, holes=[(20_000, 30_000)])
    node = MemoryNode(b"\xee" * source.size)
    done: list[int] = []
    ranges = (5, 10), (1000, 1001), (25_000, 31_000), (200_000, source.size)
    await copy(Disk(source), Target(node), ranges=_these(*ranges), progress=done.append)
    expected = bytearray(b"\xee" * source.size)
    for start, end in ranges:
        expected[start:end] = source.content[start:end]
    expected[25_000:30_000] = bytes(5000)
    assert node.content == expected
    assert sum(done) == source.size
    assert len(source.mapped) == 1


async def test_blocks_larger_than_requests() -> None:
    source, node = MemoryNode(NOISE), MemoryNode(b"\xee" * len(NOISE), block=16 * K)
    await copy(Disk(source), Target(node, block=16 * K), request_size=4096)
    assert node.content == source.content
    assert node.read == []  # nothing has to be patched
