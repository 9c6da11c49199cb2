"""Writes of nothing but zeroes, on a file: what is punched, what stays allocated."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.server.zeroes import DetectZeroes, pwrite_detecting

K64 = 1 << 16
FULL = b"\xaa" * (4 * K64)


@pytest_asyncio.fixture
async def node(tmp_path: Path) -> AsyncIterator[BlockNode]:
    path = tmp_path / "disk.raw"
    path.write_bytes(FULL)
    node = await open_image(path, format="raw", read_only=False)
    yield node
    await node.close()


def on_disk(node: BlockNode) -> tuple[bytes, int]:
    """The bytes of its file, and how many it takes."""
    path = Path(node.name)
    return path.read_bytes(), path.stat().st_blocks * 512


@pytest.mark.parametrize("detect, blocks", [(DetectZeroes.ON, 4), (DetectZeroes.UNMAP, 3)])
async def test_zeroes(node: BlockNode, detect: DetectZeroes, blocks: int) -> None:
    """Mixed with others; each has its own result, in the order of the pieces."""
    pieces = [(0, b"x" * 512), (K64, bytes(K64)), (2 * K64, bytes(512) + b"y"), (512, bytes(512))]
    assert await pwrite_detecting(node, pieces, detect, fua=False) == [None] * 4
    await node.flush()
    expected = bytearray(FULL)
    for offset, data in pieces:
        expected[offset : offset + len(data)] = data
    assert on_disk(node) == (bytes(expected), blocks * K64)


async def test_one_that_fails(node: BlockNode, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = OSError(errno.ENOSPC, "no space")

    async def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(node, "write_zeroes", fail)
    pieces = [(0, bytes(512)), (512, b"x" * 512), (1024, bytes(1))]
    found = await pwrite_detecting(node, pieces, DetectZeroes.ON, fua=True)
    assert found == [failure, None, failure]
