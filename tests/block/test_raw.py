"""RawNode: guest offset = host offset; the guard of a guessed format; maps as qemu-img has them."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine
from pynbd.block.extent import DATA
from pynbd.block.file import open_host_file
from pynbd.block.node import PREFETCH_MAX
from pynbd.block.raw import RawNode
from tests.block.reading import contents, eventually, qemu_rows, rows

SIZE = 1 << 20
BYTES = random.Random(3).randbytes(SIZE)

# The first bytes of formats, each as its own specification has it, and QEMU's name for it.
MAGICS = {
    "qcow2": (0, b"QFI\xfb\0\0\0\3"),
    "qcow": (0, b"QFI\xfb\0\0\0\1"),
    "vmdk": (0, b"KDMV"),
    "qed": (0, b"QED\0"),
    "vhdx": (0, b"vhdxfile"),
    "vpc": (0, b"conectix"),
    "luks": (0, b"LUKS\xba\xbe"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
}


@asynccontextmanager
async def opened(path: Path, **options: object) -> AsyncIterator[RawNode]:
    node = await open_image(path, **{"read_only": False, **options})  # type: ignore[arg-type]
    assert isinstance(node, RawNode)
    try:
        yield node
    finally:
        await node.close()


def content(path: Path) -> bytes:
    return path.read_bytes()


def fill(path: Path, start: bytes = b"", size: int = SIZE) -> None:
    """Zeroes after ``start``."""
    path.write_bytes(start.ljust(size, b"\0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(BYTES)
    return path


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    path = tmp_path / "blank"
    path.write_bytes(bytes(SIZE))
    return path


# Reading and writing -----------------------------------------------------------------------------


async def test_reads_and_writes(path: Path) -> None:
    async with opened(path, format="raw") as node:
        assert (node.size, node.format, node.read_only) == (SIZE, "raw", False)
        assert await contents(node, 300_001) == BYTES
        assert await node.pwrite_batch([(0, b"a"), (SIZE - 1, b"z")], fua=True) == [None, None]
        assert await node.pread(SIZE - 2, 2) == BYTES[-2:-1] + b"z"
        await node.write_zeroes(4096, 8192, may_unmap=True, fast=False, fua=True)
        await node.discard(65536, 65536, fua=True)
        await node.flush()
    expected = bytearray(BYTES)
    expected[0:1], expected[-1:] = b"a", b"z"
    expected[4096:12288], expected[65536:131072] = bytes(8192), bytes(65536)
    assert content(path) == expected


async def test_a_read_only_node_writes_nothing(path: Path) -> None:
    async with opened(path, read_only=True) as node:
        (error,) = await node.pwrite_batch([(0, b"x")])
        assert error is not None
        assert error.errno in (errno.EROFS, errno.EBADF)
        await node.flush()
    assert content(path) == BYTES


async def test_a_file_that_became_shorter(path: Path) -> None:
    """Not zeroes, as past the end of a qcow2 file: the guest's own bytes are gone."""
    async with opened(path, format="raw") as node:
        os.truncate(path, SIZE // 2)
        assert await node.pread(SIZE // 2 - 10, 10) == BYTES[SIZE // 2 - 10 : SIZE // 2]
        for offset in (SIZE // 2 - 1, SIZE - 2):
            with pytest.raises(OSError, match="the file became shorter") as caught:
                await node.pread(offset, 2)
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
            # Nor is it a hole, which a client would take for zeroes as well.
            for sparse in (False, True):
                with pytest.raises(OSError, match="the file became shorter"):
                    await node.read_plain(node.file, offset, 2, sparse=sparse)


async def test_prefetch(tmp_path: Path) -> None:
    """One WILLNEED brings what Linux reads ahead at most, and a client may name a whole disk."""
    path = tmp_path / "long"
    path.touch()
    os.truncate(path, 1 << 40)
    async with opened(path, format="raw") as node:
        await node.pread(0, 4096)
        if not node.file.resident(0, 4096):
            pytest.skip("cachestat needs Linux 6.5")
        await node.prefetch(4096, (1 << 40) - 4096)
        end = 4096 + PREFETCH_MAX
        await eventually(lambda: node.file.resident(0, end))
        assert not node.file.resident(end + (1 << 20), 4096)


async def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    async with opened(path, format="raw") as node:
        assert node.size == 0
        assert node.resolved.windows == {}


# Maps --------------------------------------------------------------------------------------------


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        for offset, length in ((0, 4096), (1 << 20, 100_000), ((2 << 20) + 512, 512)):
            file.seek(offset)
            file.write(b"\x11" * length)
        file.truncate((5 << 20) + 512)
        os.fsync(file.fileno())


async def test_maps_as_qemu_img_does(tmp_path: Path) -> None:
    peers.require("qemu-img")
    path = tmp_path / "sparse"
    sparse(path)
    async with opened(path, format="raw", read_only=True) as node:
        assert await rows(node) == qemu_rows(path)


async def test_nobody_looks_for_holes_in_vain(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    sparse(path)
    async with opened(path, format="raw", read_only=True) as node:
        runs = await node.map(4096, 1 << 20, want_zero=False)
        assert list(runs) == [(4096, 4096 + (1 << 20), DATA, 4096, 1)]


async def test_a_map_of_many_holes_comes_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "comb"
    with path.open("wb") as file:
        for at in range(6000):
            os.pwrite(file.fileno(), b"x" * 4096, at * 8192)
        file.truncate(6000 * 8192)
    async with opened(path, format="raw", read_only=True) as node:
        first = await node.map(0, node.size)
        if len(first) == 1:
            pytest.skip("this file system has no SEEK_DATA")
        assert len(first) == 4096
        whole = await rows(node)
        assert len(whole) == 12000
        assert whole[-1][1] == node.size


# The guard ---------------------------------------------------------------------------------------


async def write(node: RawNode, offset: int, data: bytes) -> OSError | None:
    (error,) = await node.pwrite_batch([(offset, data)])
    return error


async def refused(node: RawNode, offset: int, data: bytes, looks_like: str) -> None:
    error = await write(node, offset, data)
    assert error is not None
    assert (error.errno, error.filename) == (errno.EPERM, node.name)
    assert f"make it look like {looks_like}" in str(error)
    assert "-f raw" in str(error)


@pytest.mark.parametrize("name", MAGICS)
async def test_no_magic_by_one_write(blank: Path, name: str) -> None:
    at, magic = MAGICS[name]
    async with opened(blank) as node:
        await refused(node, at, magic, name)
        await refused(node, 0, (bytes(at) + magic).ljust(4096, b"\0"), name)
        # Beside the first sector, or one byte off, it means nothing.
        assert await write(node, 512 + at, magic) is None
        assert await write(node, at + 1, magic) is None
    assert content(blank)[: at + 1] == bytes(at + 1)


@pytest.mark.parametrize("name", MAGICS)
async def test_no_magic_by_parts(blank: Path, name: str) -> None:
    """Neither forwards nor backwards, one byte at a time: the last byte is refused."""
    at, magic = MAGICS[name]
    positions = list(range(at, at + len(magic)))
    for order in (positions, positions[::-1]):
        async with opened(blank) as node:
            errors = [
                error.errno if (error := await write(node, n, magic[n - at : n - at + 1])) else 0
                for n in order
            ]
            assert errno.EPERM in errors
        probed = content(blank)[at : at + len(magic)]
        assert probed != magic
        fill(blank)


async def test_no_magic_by_one_batch(blank: Path) -> None:
    """Two harmless pieces make it together; the rest of the batch is written."""
    async with opened(blank) as node:
        errors = await node.pwrite_batch([(0, b"Q"), (2, b"I\xfb"), (1, b"F"), (4096, b"x")])
        assert [error and error.errno for error in errors] == [None, None, errno.EPERM, None]
    assert content(blank)[:5] == b"Q\0I\xfb\0"
    assert content(blank)[4096:4097] == b"x"


async def test_no_magic_by_zeroes(blank: Path) -> None:
    """Zeroes can complete a magic that ends in them."""
    fill(blank, b"QFI\0\0\0\0\2")  # harmless: its fourth byte is wrong
    async with opened(blank) as node:
        await refused(node, 3, b"\xfb", "qcow2")
    fill(blank, b"QEDx")
    for zeroing in (RawNode.write_zeroes, RawNode.discard):
        async with opened(blank) as node:
            options = {"may_unmap": True, "fast": False} if zeroing is RawNode.write_zeroes else {}
            with pytest.raises(OSError, match="make it look like qed"):
                await zeroing(node, 3, 1, **options)
            await zeroing(node, 0, 4096, **options)
        assert content(blank)[:4] == bytes(4)
        fill(blank, b"QEDx")


async def test_the_guest_may_write_what_guests_write(blank: Path) -> None:
    """A boot sector with a partition table, and a file system without one."""
    boot = (b"\xeb\x58\x90mkfs.fat" + bytes(435)).ljust(510, b"\0") + b"\x55\xaa"
    async with opened(blank) as node:
        assert await write(node, 0, boot) is None
        assert await write(node, 0, bytes(8192)) is None
        await node.write_zeroes(0, SIZE, may_unmap=True, fast=False)
        await node.discard(0, SIZE)
        assert await write(node, 1024, b"\x53\xef") is None


async def test_a_named_format_is_not_guarded(blank: Path) -> None:
    async with opened(blank, format="raw") as node:
        assert await write(node, 0, b"QFI\xfb\0\0\0\3") is None
    assert content(blank)[:4] == b"QFI\xfb"


async def test_qemu_guards_the_same(blank: Path) -> None:
    """What QEMU refuses to a guest of a guessed raw image, and what it allows."""
    peers.require("qemu-io")
    for pattern, (at, magic) in {"QED": (0, b"QED\0"), "boot": (0, b"\xeb\x58\x90\0")}.items():
        sector = (bytes(at) + magic).ljust(512, b"\0")
        source = blank.with_name(pattern)
        fill(source, sector, 512)
        done = peers.run("qemu-io", "-c", f"write -s {source} 0 512", blank, check=False)
        theirs = "Operation not permitted" in done.stdout + done.stderr
        fill(blank)
        async with opened(blank) as node:
            ours = await write(node, 0, sector) is not None
        fill(blank)
        assert theirs == ours == (pattern == "QED"), done.stdout + done.stderr


async def test_guarded_writes_go_one_by_one(blank: Path) -> None:
    """Many at once cannot slip past the guard between its look and its write."""
    magic = b"QFI\xfb\0\0\0\2"
    engine, busy = Engine(1), threading.Event()
    node = await open_image(blank, read_only=False, engine=engine)
    held = asyncio.ensure_future(engine.run(busy.wait, 10))
    writes = [
        asyncio.ensure_future(node.pwrite_batch([(at, magic[at : at + 1])])) for at in range(8)
    ]
    await asyncio.sleep(0.01)  # the writes that were looked at wait for the only thread
    busy.set()
    errors = [error for (error,) in await asyncio.gather(*writes) if error]
    assert [error.errno for error in errors] == [errno.EPERM]
    assert content(blank)[:8] != magic
    await held
    await node.close()
    engine.close()


async def test_the_guard_sees_the_sector_as_it_would_be(path: Path) -> None:
    asked: list[bytes] = []

    def guard(sector: bytes) -> str:
        asked.append(sector)
        return "raw"

    engine = Engine(1)
    file = open_host_file(engine, str(path), writable=True)
    node = RawNode(file, read_only=False, guard=guard)
    assert await write(node, 510, b"abcd") is None
    assert await write(node, 512, b"e") is None
    assert asked == [BYTES[:510] + b"ab"]
    file.close()
    engine.close()


# Whole sectors, and parts of a file


@pytest.mark.parametrize(
    "offset, data, size",
    [(1010, b"hello", 1015), (1020, b"hell", 1024), (990, b"over the end", 1002), (10, b"h", 1000)],
)
async def test_whole_sectors(tmp_path: Path, offset: int, data: bytes, size: int) -> None:
    """A file of 1000 bytes is a disk of 1024; sizes of the file afterwards as qemu-nbd leaves
    them.
    """
    path = tmp_path / "disk"
    content = random.Random(1).randbytes(1000)
    path.write_bytes(content)
    node = await open_image(path, format="raw", read_only=False, whole_sectors=True)
    try:
        assert node.size == 1024
        assert await node.pread(0, 1024) == content + bytes(24)
        tail = [(0, 1000, False, True, 0, 0), (1000, 1024, True, False, None, 0)]
        assert await rows(node) == tail
        assert await node.pwrite_batch([(offset, data)]) == [None]
        expected = bytearray(content + bytes(24))
        expected[offset : offset + len(data)] = data
        assert await node.pread(0, 1024) == expected
        assert [row[1] for row in await rows(node)] == sorted({size, 1024})
        assert path.stat().st_size == size
    finally:
        await node.close()
    assert path.read_bytes() == expected[:size]


@pytest.mark.parametrize(
    "offset, size", [(0, 1024), (400, 1024), (512, 512), (600, 512), (1000, 512), (1024, 0)]
)
async def test_whole_sectors_from_an_offset(tmp_path: Path, offset: int, size: int) -> None:
    """Of a file of 1000 bytes; sizes as qemu-img has them."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 1000)
    options = {"driver": "raw", "offset": offset, "file.filename": str(path)}
    node = await open_image(options, read_only=False, whole_sectors=True)
    try:
        assert node.size == size
        inside = max(1000 - offset, 0)
        assert await node.pread(0, size) == (b"x" * inside).ljust(size, b"\0")
        if size:
            assert await node.pwrite_batch([(size - 1, b"e")]) == [None]
            assert (await node.pread(0, size))[-1:] == b"e"
    finally:
        await node.close()


async def test_zeroes_in_the_last_sector(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 1000)
    node = await open_image(path, format="raw", read_only=False, whole_sectors=True)
    try:
        await node.write_zeroes(900, 110, may_unmap=True, fast=False)
        await node.discard(512, 512)
        await node.write_zeroes(1000, 24, may_unmap=False, fast=False)
        assert await node.pread(0, 1024) == b"x" * 512 + bytes(512)
    finally:
        await node.close()


@pytest.mark.parametrize("offset, size", [(0, 512), (512, 1024), (1024, None), (3584, None)])
async def test_parts_of_a_file(tmp_path: Path, offset: int, size: int | None) -> None:
    path = tmp_path / "disk"
    content = bytearray(random.Random(2).randbytes(4096))
    path.write_bytes(content)
    options: dict[str, object] = {"driver": "raw", "file.filename": str(path), "offset": offset}
    if size is not None:
        options["size"] = size
    end = 4096 if size is None else offset + size
    node = await open_image(options, read_only=False)
    try:
        assert await node.pread(0, node.size) == content[offset:end]
        await node.pwrite_batch([(10, b"new")])
        await node.write_zeroes(100, 50, may_unmap=False, fast=False)
        await node.discard(300, 50)
        content[offset + 10 : offset + 13] = b"new"
        content[offset + 100 : offset + 150] = bytes(50)
        content[offset + 300 : offset + 350] = bytes(50)
        assert await node.pread(0, node.size) == content[offset:end]
    finally:
        await node.close()
    assert path.read_bytes() == content
