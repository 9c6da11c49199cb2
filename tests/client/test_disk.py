"""Disks that are read and written: zeroes in data, blocks, the words of failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.extent import ZERO
from pynbd.client.disk import Disk, OverlayTarget, Target, zero_runs
from pynbd.errors import ReadError, WriteError
from tests.client.memory import MemoryNode

CONTENT = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 0, 7])), max_size=12)


@given(CONTENT, st.integers(0, 40), st.sampled_from([0, 8, 16]))
def test_zero_runs(parts: list[tuple[int, int]], offset: int, granularity: int) -> None:
    content = b"".join(bytes([byte]) * length for length, byte in parts)
    runs = list(zero_runs(memoryview(content), offset, granularity))
    blocks: dict[int, bytes] = {}
    for at, byte in enumerate(content, offset):
        number = at // granularity if granularity else 0
        blocks[number] = blocks.get(number, b"") + bytes([byte])
    expected: list[tuple[int, int, bool]] = []
    for block in blocks.values():
        zero = granularity > 0 and not any(block)
        if expected and expected[-1][2] == zero:
            expected[-1] = expected[-1][0], expected[-1][1] + len(block), zero
        else:
            start = expected[-1][1] if expected else offset
            expected.append((start, start + len(block), zero))
    assert runs == expected


@given(st.integers(0, 90), st.integers(1, 100), st.sampled_from([1, 16, 32]), st.booleans())
async def test_any_range_is_written_in_blocks(
    offset: int, length: int, block: int, zero: bool
) -> None:
    """Within a disk that ends in the middle of one."""
    node = MemoryNode(bytes(range(1, 101)), block=block)
    length = min(length, node.size - offset)
    target = Target(node, block=block)
    expected = bytearray(node.content)
    if zero:
        expected[offset : offset + length] = bytes(length)
        await target.zero(offset, length)
    else:
        expected[offset : offset + length] = b"\xff" * length
        await target.write(offset, memoryview(b"\xff" * length))
    assert node.content == expected


async def test_zeroes_are_not_written_where_they_are() -> None:
    node = MemoryNode(bytes(20_000))
    target = Target(node, reads_zero=True)
    await target.zero(0, 4096)
    await target.write(0, memoryview(bytes(4096) + b"x" * 4096 + bytes(8192)))
    assert (node.written, node.zeroed) == ([(4096, 8192)], [])
    target = Target(node, reads_zero=True, allocated=True)
    await target.zero(0, 4096)
    await target.write(4096, memoryview(bytes(4096)))
    assert (node.written[1:], node.zeroed) == ([(4096, 8192)], [(0, 4096)])
    assert node.kept == [(0, 4096)]


async def test_an_overlay_gets_what_differs() -> None:
    content = b"a" * 8192 + bytes(8192) + b"b" * 4096
    node = MemoryNode(content, holes=[(8192, 12288)])
    target = OverlayTarget(node)
    target.granule = 1024
    await target.write(0, memoryview(content))
    await target.zero(8192, 4096)
    assert (node.written, node.zeroed) == ([], [])
    # A byte more, a byte less, zeroes in the place of data, and all beyond a hole.
    changed = bytearray(content)
    changed[5000], changed[9000], changed[4096:4200] = 1, 2, bytes(104)
    await target.write(0, memoryview(changed))
    assert node.written == [(4096, 5120), (8192, 9216)]
    await target.zero(8192, 12288)
    assert node.zeroed == [(12288, 20480)]
    await target.write(2048, memoryview(bytes(4096)))
    assert node.zeroed[1:] == [(2048, 6144)]


async def test_past_the_end() -> None:
    disk = Disk(MemoryNode(b"x" * 100))
    assert [row[:3] for row in await disk.map(100, 50)] == [(100, 150, ZERO)]
    assert (await disk.map(90, 50)).end == 100


async def test_failures_are_named() -> None:
    node = MemoryNode(bytes(100), bad=[10])
    with pytest.raises(ReadError, match=r"^memory: cannot read 5 bytes at offset 10: bad sector$"):
        await Disk(node).read(10, memoryview(bytearray(5)))
    node.pwrite_batch = lambda *_, **__: _fails()  # type: ignore[method-assign]
    with pytest.raises(WriteError, match=r"^memory: cannot write 1 bytes at offset 7: no space$"):
        await Target(node).write(7, memoryview(b"x"))


async def _fails() -> list[OSError | None]:
    return [OSError(28, "no space")]
