"""Persistent bitmaps: those of QEMU, as it serves them, and damaged ones, which it refuses too."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.chain import open_image
from pynbd.block.limits import ImageLimits
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import bitmaps
from pynbd.block.qcow2 import header as headers
from pynbd.block.qcow2.bitmaps import BitmapData
from pynbd.block.qcow2.builder import Bitmap, Image, Written
from pynbd.block.qcow2.extensions import BitmapsExtension
from pynbd.block.qcow2.format import BitmapFlags
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.errors import CorruptImage

SIZE = 8 << 20

Row = tuple[int, int, int]  # start, length, dirty


async def rows(bitmap: DirtyBitmap, size: int, limit: int = 1000) -> list[Row]:
    found: list[Row] = []
    at = 0
    while at < size:
        runs = await bitmap.runs(at, size - at, limit)
        for end, dirty in zip(runs.ends.tolist(), runs.dirty.tolist(), strict=True):
            if found and found[-1][2] == dirty:
                found[-1] = (found[-1][0], end - found[-1][0], dirty)
            else:
                found.append((at, end - at, dirty))
            at = end
    return found


def served_by_qemu(path: Path, name: str) -> list[Row]:
    with peers.qemu_nbd(path, "-r", "-f", "qcow2", "-B", name) as uri:
        said = peers.run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", uri).stdout
    return [(row["offset"], row["length"], row["type"]) for row in json.loads(said)]


@pytest.mark.parametrize(
    "granularity, cluster", [(512, 512), (4096, 512), (65536, 65536), (1 << 20, 4096)]
)
async def test_qemus_bitmaps(tmp_path: Path, granularity: int, cluster: int) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    path = tmp_path / "disk.qcow2"
    peers.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(SIZE)
    )
    peers.run("qemu-img", "bitmap", "--add", "-g", str(granularity), path, "on")
    peers.run("qemu-img", "bitmap", "--add", "-g", str(granularity), "--disable", path, "off")
    peers.run("qemu-io", path, "-c", "write 0 512", "-c", "write 1M 3M", "-c", "write 8380416 8k")
    node = await open_image(path)
    on, off = node.bitmaps()
    assert [(one.name, one.granularity, one.size) for one in (on, off)] == [
        ("on", granularity, SIZE),
        ("off", granularity, SIZE),
    ]
    assert (on.enabled, off.enabled) == (True, False)
    assert on.persistent
    assert await rows(on, SIZE) == served_by_qemu(path, "on")
    assert await rows(off, SIZE) == [(0, SIZE, 0)]
    await node.close()


async def test_a_bitmap_is_read_at_its_first_use(tmp_path: Path) -> None:
    """What is changed in the file after the image was opened is seen: nothing had been read yet."""
    path = tmp_path / "disk.qcow2"
    written = image(path, Bitmap("b", 65536, [(0, 65536)]))
    node = await open_image(path)
    table = number(path, directory(written))
    poke(path, number(path, table), b"\x06")
    (bitmap,) = node.bitmaps()
    assert await rows(bitmap, SIZE) == [
        (0, 65536, 0),
        (65536, 131072, 1),
        (196608, SIZE - 196608, 0),
    ]
    assert isinstance(node, Qcow2Node)
    assert node.mapping.tables.lookups == 0
    await node.close()


async def test_a_table_entry_of_ones(tmp_path: Path) -> None:
    """512 bytes of bitmap data are 4096 bits: of 64 KiB granules, 256 MiB."""
    path = tmp_path / "disk.qcow2"
    size = (600 << 20) + 512
    written = image(path, Bitmap("b", 65536, [(0, 65536)]), size=size, cluster_bits=9)
    table = number(path, directory(written))
    for index, entry in enumerate([0, 0, 1]):
        poke(path, table + index * 8, entry.to_bytes(8, "big"))
    node = await open_image(path)
    (bitmap,) = node.bitmaps()
    assert await rows(bitmap, size) == [(0, 512 << 20, 0), (512 << 20, size - (512 << 20), 1)]
    await bitmap.load()
    assert bitmap.dirty_bytes() == size - (512 << 20)
    await node.close()


async def test_who_wants_a_bitmap_at_the_same_time_shares_its_reading(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, Bitmap("b", 65536, [(0, 65536)]))
    node = await open_image(path)
    (bitmap,) = node.bitmaps()
    found = await asyncio.gather(*(rows(bitmap, SIZE) for _ in range(20)))
    assert found == [[(0, 65536, 1), (65536, SIZE - 65536, 0)]] * 20
    assert data(node).reads.loads == 1
    await node.close()


async def test_the_bits_in_memory_are_bounded_over_all_bitmaps(tmp_path: Path) -> None:
    """Each has 16384 bits, 2 KiB; those used last are kept, and one if it is larger."""
    path = tmp_path / "disk.qcow2"
    image(path, *(Bitmap(str(index), 512, [(index << 20, 512)]) for index in range(4)))
    for limit, kept in ((5000, 2), (2048, 1), (100, 1)):
        node = await open_image(path, limits=ImageLimits(bitmaps=limit))
        for index, bitmap in enumerate(node.bitmaps()):
            assert (index << 20, 512, 1) in await rows(bitmap, SIZE)
            assert len(data(node).reads) == min(index + 1, kept)
        await node.close()


async def test_reading_bits_does_not_hold_the_loop(tmp_path: Path) -> None:
    """1024 clusters of bits."""
    path = tmp_path / "disk.qcow2"
    size = 1024 * 4096 * 512
    image(path, Bitmap("b", 512, [(0, size - 512)]), size=size, cluster_bits=9)
    node = await open_image(path)
    (bitmap,) = node.bitmaps()
    loading = asyncio.create_task(bitmap.load())
    turns = 0
    while not loading.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 1024 // 256
    assert bitmap.dirty_bytes() == size - 512
    await node.close()


async def test_tables_beyond_the_bound_are_checked_when_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    written = image(path, Bitmap("a"), Bitmap("b"))
    poke(path, number(path, directory(written) + 32), b"\0\0\0\0\0\5\2\0")
    assert await refusal(path) == (True, True)
    monkeypatch.setattr(bitmaps, "TABLE_BYTES_AT_OPEN", 8)
    node = await open_image(path)
    whole, damaged = node.bitmaps()
    assert await rows(whole, SIZE) == [(0, SIZE, 0)]
    with pytest.raises(OSError, match="bitmap 'b': entry 0 of its table") as caught:
        await rows(damaged, SIZE)
    assert caught.value.errno == errno.EIO
    await node.close()


def test_opening_takes_no_longer_for_each_of_many_bitmaps(tmp_path: Path) -> None:
    """For ten times as many about ten times as long, and not a hundred times."""
    path = tmp_path / "disk.qcow2"

    async def opened(count: int) -> float:
        with_directory(path, count)
        gc.disable()  # which looks at all that other tests have left, too
        try:
            before = time.thread_time()
            node = await open_image(path)
            taken = time.thread_time() - before
        finally:
            gc.enable()
        assert len(node.inconsistent_bitmaps()) == count
        await node.close()
        return taken

    assert asyncio.run(opened(20_000)) < 25 * asyncio.run(opened(2_000))


async def test_in_use_is_named_but_not_usable(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, Bitmap("open", flags=BitmapFlags.IN_USE | BitmapFlags.AUTO), Bitmap("closed"))
    node = await open_image(path)
    assert [bitmap.name for bitmap in node.bitmaps()] == ["closed"]
    assert list(node.inconsistent_bitmaps()) == ["open"]
    await node.close()


async def test_without_the_autoclear_bit_there_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, Bitmap("b"))
    poke(path, 88, bytes(8))
    node = await open_image(path)
    assert list(node.bitmaps()) == []
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pynbd", logging.WARNING)
    assert str(path) in record.getMessage()
    await node.close()


# (offset in the directory entry, bytes, what our line says)
BAD_ENTRIES = {
    "no table": (0, bytes(8), "bitmap table at 0x0"),
    "misaligned table": (0, (0x50200).to_bytes(8, "big"), "not at a cluster"),
    "empty table": (8, bytes(4), "bitmap_table_size 0"),
    "huge table": (8, b"\x08\0\0\0", "bitmap_table_size 134217728"),
    "short table": (8, b"\0\0\0\2", "bitmap_table_size 2"),
    "unknown flag": (12, b"\0\0\0\x0a", "flags 0xa"),
    "a flag that QEMU does not know": (12, b"\0\0\0\6", "flags 0x6"),
    "unknown type": (16, b"\2", "type 2"),
    "granularity 8": (17, b"\x08", "granularity_bits 8"),
    "granularity 32": (17, b"\x20", "granularity_bits 32"),
    "long name": (18, b"\4\0", "name_size is 1024"),
    "longer name than directory": (18, b"\0\x40", "the directory ends"),
    "extra data": (20, b"\0\0\0\1", "extra data"),
    "table entry with reserved bits": (-1, b"\0\0\0\0\0\5\0\2", "entry 0 of its table"),
    "table entry with offset and ones": (-1, b"\0\0\0\0\0\5\0\1", "entry 0 of its table"),
    "misaligned table entry": (-1, b"\0\0\0\0\0\5\2\0", "entry 0 of its table"),
}


@pytest.mark.parametrize("offset, data, said", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
async def test_one_bad_entry_refuses_the_image(
    tmp_path: Path, offset: int, data: bytes, said: str
) -> None:
    peers.require("qemu-io")
    path = tmp_path / "disk.qcow2"
    written = image(path, Bitmap("b", 65536))
    place = directory(written)
    poke(path, number(path, place) if offset < 0 else place + offset, data)
    assert await refusal(path) == (True, True)
    with pytest.raises(CorruptImage) as caught:
        await open_image(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("data", [b"\0\0\0\2", b"\0\0\0\1"], ids=["too few", "too many"])
async def test_the_directory_holds_as_many_as_the_header_says(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, *([Bitmap("b")] if data[-1] == 2 else [Bitmap("b"), Bitmap("c")]))
    first_cluster = path.read_bytes()[:65536]
    extension = first_cluster.index(bytes.fromhex("23852875"))
    poke(path, extension + 8, data)
    assert await refusal(path) == (True, True)


async def test_two_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image(path, Bitmap("same"), Bitmap("same"))
    assert await refusal(path) == (True, True)


def image(path: Path, *bitmaps: Bitmap, size: int = SIZE, cluster_bits: int = 16) -> Written:
    return Image(size=size, bitmaps=bitmaps, cluster_bits=cluster_bits).write(path)


def with_directory(path: Path, count: int) -> None:
    """An image with ``count`` bitmaps in use, whose entries all lead to one table."""
    header = image(path, Bitmap("b")).header
    assert header.bitmaps is not None
    table = number(path, header.bitmaps.directory_offset)
    entries = b"".join(
        struct.pack(">QIIBBHI8s", table, 1, BitmapFlags.IN_USE, 1, 16, 8, 0, b"%08d" % index)
        for index in range(count)
    )
    place = -(-path.stat().st_size >> 16) << 16
    extension = BitmapsExtension(count, len(entries), place)
    poke(path, 0, headers.encode(replace(header, bitmaps=extension)))
    poke(path, place, entries)


def data(node: BlockNode) -> BitmapData:
    assert isinstance(node, Qcow2Node)
    assert node._persistent.data is not None
    return node._persistent.data


def directory(written: Written) -> int:
    assert written.header.bitmaps is not None
    return written.header.bitmaps.directory_offset


def number(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(8), "big")


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def refusal(path: Path) -> tuple[bool, bool]:
    """Whether we refuse the image, and whether QEMU does."""
    peers.require("qemu-io")
    theirs = peers.run("qemu-io", "-r", "-f", "qcow2", path, "-c", "read 0 512", check=False)
    try:
        node: BlockNode = await open_image(path)
    except CorruptImage:
        return True, theirs.returncode != 0
    await node.close()
    return False, theirs.returncode != 0
