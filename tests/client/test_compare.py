"""Comparing: the first difference whatever comes first, and nothing read that need not be."""

from __future__ import annotations

from random import Random

import pytest

from pynbd.client.compare import compare
from pynbd.client.disk import Disk
from pynbd.errors import ReadError
from tests.client.memory import MemoryNode

K = 1 << 10
SIZE = 100 * K + 77


def changed(content: bytes, *places: int) -> bytes:
    other = bytearray(content)
    for place in places:
        other[place] ^= 0xFF
    return bytes(other)


@pytest.mark.parametrize("first", [0, 511, 512, 40_000, SIZE - 1])
async def test_the_first_difference(first: int) -> None:
    """It is answered last."""
    content = Random(1).randbytes(SIZE)
    other = changed(content, *range(first, SIZE, 5000))
    slow = MemoryNode(other, late=[first // (4 * K) * 4 * K])
    result = await compare(Disk(MemoryNode(content)), Disk(slow), request_size=4 * K, requests=16)
    assert (result.difference, result.offset) == ("content", first)


async def test_nothing_is_read_beyond_the_first_difference() -> None:
    content = Random(1).randbytes(SIZE)
    node = MemoryNode(changed(content, 5))
    await compare(Disk(MemoryNode(content)), Disk(node), request_size=4 * K, requests=2)
    assert max(end for _, end in node.read) <= 12 * K


async def test_zeroes_are_not_read() -> None:
    """Both say so: neither is read. One says so: the other one is."""
    a = MemoryNode(bytes(SIZE), holes=[(0, 64 * K)])
    b = MemoryNode(bytes(SIZE), holes=[(32 * K, SIZE)])
    result = await compare(Disk(a), Disk(b), request_size=16 * K)
    assert result.difference is None
    assert min(start for start, _ in a.read) == 64 * K
    assert max(end for _, end in b.read) == 32 * K


async def test_ranges_of_pieces_that_share_a_sector() -> None:
    """What is a hole for one of them ends in the middle of a sector, and is answered last."""
    a, b = MemoryNode(b"a" * SIZE), MemoryNode(bytes(SIZE), holes=[(700, 800), (9000, SIZE)])
    a.late = [0, 700, 4096]
    result = await compare(Disk(a), Disk(b), every=True, request_size=4 * K, requests=64)
    assert result.ranges == [(0, SIZE)]


async def test_all_ranges() -> None:
    content = Random(1).randbytes(SIZE)
    other = changed(content, 5, 511, 512, 4095, 4096, 60_000, SIZE - 1)
    disks = Disk(MemoryNode(content)), Disk(MemoryNode(other))
    done: list[int] = []
    result = await compare(*disks, every=True, request_size=4 * K, progress=done.append)
    last = (SIZE - 1) // 512 * 512
    assert result.ranges == [(0, 1024), (3584, 4608), (59_904, 60_416), (last, SIZE)]
    assert sum(done) == SIZE


@pytest.mark.parametrize("beyond", [b"\0" * 5000, b"\0" * 4999 + b"x"])
async def test_sizes(beyond: bytes) -> None:
    content = Random(1).randbytes(SIZE)
    disks = Disk(MemoryNode(content)), Disk(MemoryNode(content + beyond))
    for a, b in disks, disks[::-1]:
        result = await compare(a, b)
        expected = ("content", SIZE + 4999) if any(beyond) else (None, 0)
        assert (result.difference, result.offset) == expected
        strict = await compare(a, b, strict=True)
        assert (strict.difference, strict.offset) == ("size", SIZE)


async def test_contents_before_allocation() -> None:
    """Strictly, what comes first counts."""
    content = Random(1).randbytes(16 * K) + bytes(16 * K)
    a = Disk(MemoryNode(content, holes=[(24 * K, 32 * K)]))
    result = await compare(a, Disk(MemoryNode(content)), strict=True)
    assert (result.difference, result.offset) == ("allocation", 24 * K)
    result = await compare(a, Disk(MemoryNode(changed(content, 9 * K))), strict=True)
    assert (result.difference, result.offset) == ("content", 9 * K)
    assert (await compare(a, Disk(MemoryNode(content)))).difference is None


async def test_a_failure() -> None:
    disks = Disk(MemoryNode(b"x" * SIZE)), Disk(MemoryNode(b"x" * SIZE, bad=[4 * K]))
    with pytest.raises(ReadError, match="cannot read 4096 bytes at offset 4096: bad sector"):
        await compare(*disks, request_size=4 * K)
