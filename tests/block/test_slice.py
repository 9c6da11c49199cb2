"""SliceNode: the same bytes at other offsets, through every kind of extent."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Compressed, Data, Image, Zero
from pynbd.errors import ImageError
from tests.block.reading import contents

SIZE = 1 << 20
CLUSTER = 1 << 16


def image(folder: Path) -> Path:
    """Clusters of all kinds over a raw file."""
    (folder / "base").write_bytes(random.Random(1).randbytes(SIZE))
    path = folder / "top"
    Image(
        size=SIZE,
        clusters={
            0: Data(b"plain" * 1000),
            2 * CLUSTER: Compressed(b"compressed" * 6000),
            4 * CLUSTER: Zero(),
        },
        backing_file="base",
        backing_format="raw",
    ).write(path)
    return path


@pytest.mark.parametrize("offset", [512, 4096, 100, CLUSTER, 2 * CLUSTER + 1000, SIZE - 512])
async def test_contents(tmp_path: Path, offset: int) -> None:
    node = await open_image(image(tmp_path))
    whole = await contents(node)
    await node.close()
    node = await open_image(tmp_path / "top", offset=offset)
    try:
        assert node.size == -(-(SIZE - offset) // 512) * 512
        assert await contents(node) == whole[offset:].ljust(node.size, b"\0")
        assert await contents(node, 777) == whole[offset:].ljust(node.size, b"\0")
        assert [layer.format for layer in node.chain()] == ["qcow2", "raw"]
        assert not node.bitmaps()
    finally:
        await node.close()


async def test_a_slice_of_a_slice(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with await open_image(path) as node:
        whole = await contents(node)
    qcow2 = {"driver": "qcow2", "file.filename": str(path)}
    part = {"driver": "raw", "file": qcow2, "offset": CLUSTER, "size": 9 * CLUSTER}
    async with await open_image(part, offset=1000) as node:
        expected = whole[CLUSTER + 1000 : 10 * CLUSTER]
        assert await contents(node) == expected.ljust(node.size, b"\0")


@pytest.mark.parametrize("offset", [0, 1000, 2 * CLUSTER + 1000])
async def test_what_is_decompressed_at_once(tmp_path: Path, offset: int) -> None:
    path = image(tmp_path)
    async with await open_image(path) as node:
        whole = await contents(node)
    wrapped = {"driver": "raw", "file": {"driver": "qcow2", "file.filename": str(path)}}
    for form in (path, wrapped):
        async with await open_image(form, offset=offset) as node:
            at = 2 * CLUSTER + 5000 - offset
            (extent,) = await node.resolve(at, at + 100)
            view = memoryview(bytearray(100))
            await asyncio.sleep(0)  # a turn of the loop has its share
            assert node.decompressed_now(extent.depth, extent.host, at, view)
            assert view == whole[offset + at :][:100]


async def test_depth(tmp_path: Path) -> None:
    """What the layers below hold is at depth 0, as in QEMU."""
    node = await open_image(image(tmp_path), offset=CLUSTER)
    runs = await node.map(0, node.size)
    assert [(start, end, depth) for start, end, _, _, depth in runs] == [
        (0, CLUSTER, 0),
        (CLUSTER, 2 * CLUSTER, 1),
        (2 * CLUSTER, 3 * CLUSTER, 0),
        (3 * CLUSTER, 4 * CLUSTER, 1),
        (4 * CLUSTER, 15 * CLUSTER, 0),
    ]
    await node.close()


@pytest.mark.parametrize("offset", [SIZE + 512, SIZE + 1])
async def test_beyond_the_end(tmp_path: Path, offset: int) -> None:
    with pytest.raises(ImageError, match="is outside of them"):
        await open_image(image(tmp_path), offset=offset)


async def test_changes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    content = bytearray(random.Random(2).randbytes(10000))
    path.write_bytes(content)
    node = await open_image(path, format="raw", read_only=False, offset=512, whole_sectors=True)
    try:
        assert node.size == 9728
        assert await node.pread(9400, 328) == content[9912:] + bytes(240)
        assert await node.pwrite_batch([(10, b"new"), (9500, b"tail")]) == [None, None]
        content[522:525] = b"new"
        content += bytes(12) + b"tail"
        await node.write_zeroes(1000, 100, may_unmap=False, fast=False)
        content[1512:1612] = bytes(100)
        await node.discard(2000, 50)
        content[2512:2562] = bytes(50)
        await node.flush()
        assert await node.pread(0, 9728) == content[512:].ljust(9728, b"\0")
    finally:
        await node.close()
    assert path.read_bytes() == content


async def test_the_last_sector_may_be_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 10240)
    node = await open_image(path, format="raw", read_only=False, offset=100)
    try:
        assert node.size == 10240
        assert await node.pread(10000, 240) == b"x" * 140 + bytes(100)
        error, none = await node.pwrite_batch([(10139, b"yy"), (1, b"z")])
        assert error is not None
        assert none is None
        assert error.errno == errno.ENOSPC
        await node.write_zeroes(10000, 240, may_unmap=True, fast=False)
        await node.discard(10200, 40)
    finally:
        await node.close()
    assert path.read_bytes() == b"x" * 101 + b"z" + b"x" * 9998 + bytes(140)
