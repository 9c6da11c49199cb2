"""What is dirty, of images; over NBD see interop/test_copy_incremental_backup.py."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import pynbd
from pynbd.block.qcow2.builder import Bitmap, Image
from pynbd.block.qcow2.format import BitmapFlags
from pynbd.client.dirty import dirty_ranges
from pynbd.client.ends import Reading, open_disk
from pynbd.errors import ImageError
from tests.client.playing import negotiate, playing, until_closed

K, M = 1 << 10, 1 << 20


async def ranges(path: Path | str, name: str) -> list[tuple[int, int]]:
    async with open_disk(str(path), Reading(bitmap=name)) as disk:
        return [each async for each in await dirty_ranges(disk, name)]


async def test_ranges(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 3 * M + 512
    dirty = [(0, 512), (64 * K, 64 * K + 1), (3 * M, 512)]
    bitmaps = [Bitmap("b", granularity=4096, dirty=dirty), Bitmap("clean")]
    Image(size=size, bitmaps=bitmaps).write(path)
    assert await ranges(path, "b") == [(0, 4096), (64 * K, 132 * K), (3 * M, size)]
    assert await ranges(path, "clean") == []


async def test_many_ranges(tmp_path: Path) -> None:
    """More than one step looks at."""
    path = tmp_path / "disk.qcow2"
    dirty = [(at, 512) for at in range(0, 256 * M, 1024)]
    Image(size=256 * M, bitmaps=[Bitmap("b", granularity=512, dirty=dirty)]).write(path)
    assert await ranges(path, "b") == [(at, at + 512) for at, _ in dirty]


async def test_bitmaps_that_do_not_do(tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    Image(size=M, bitmaps=[Bitmap("below")]).write(base)
    torn = Bitmap("torn", flags=BitmapFlags.AUTO | BitmapFlags.IN_USE)
    bitmaps = [torn, Bitmap("good"), Bitmap("fine")]
    Image(size=M, bitmaps=bitmaps, backing_file="base.qcow2", backing_format="qcow2").write(path)
    for name, reason in (
        ("nope", r"top\.qcow2: no bitmap 'nope'; there is 'good', 'fine'$"),
        ("torn", "'torn' is in use, or was when its last writer ended"),
        ("below", r"'below' is of its backing file .*base\.qcow2, and knows nothing of the writes"),
    ):
        with pytest.raises(ImageError, match=reason):
            await ranges(path, name)
    Image(size=M).write(base)
    with pytest.raises(ImageError, match=r"no bitmap 'x'; there is none$"):
        await ranges(base, "x")


async def test_a_server_for_one_client(tmp_path: Path) -> None:
    """Its bitmaps are asked for when the first connection is closed."""
    path = tmp_path / "disk.qcow2"
    Image(size=M, bitmaps=[Bitmap("good")]).write(path)
    async with pynbd.serve(path, max_clients=1) as server:
        with pytest.raises(ImageError, match=r"no bitmap 'x'; there is 'good'$"):
            await ranges(server.uri, "x")


async def test_a_server_that_ends_with_its_client() -> None:
    def play(sock: socket.socket) -> None:
        os.unlink(sock.getsockname())
        negotiate(sock)
        until_closed(sock)

    with playing(play) as uri, pytest.raises(ImageError, match=r"no bitmap 'x'$"):
        await ranges(uri, "x")
