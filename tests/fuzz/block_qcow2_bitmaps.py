"""The bitmaps extension, the bitmap directory and the bitmap tables (docs/interop/qcow2.rst,
"Bitmaps extension", "Bitmaps").

Allowed: `CorruptImage`, which refuses the image. A bitmap that can be used has a name of its own,
and says what its table and its bits say, read here for themselves, or EIO.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.chain import open_image
from pynbd.errors import CorruptImage
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = (CorruptImage,)
MAX_LEN = 512
SMOKE = 250

_EXTENSION = b"\x23\x85\x28\x75\0\0\0\x18"
_ROOM = 512  # of the directory, in a cluster of its own
_TABLES = 4  # words of each table that are told


def _places() -> tuple[bytes, int, int, list[int]]:
    """The image, where its extension is and its directory, and where its tables are."""
    data, _ = disk.image("bitmaps")
    extension = data.index(_EXTENSION) + len(_EXTENSION)
    number, _, size, directory = struct.unpack_from(">IIQQ", data, extension)
    tables, at = [], directory
    for _ in range(number):
        table, _, _, _, _, name_size, _ = struct.unpack_from(">QIIBBHI", data, at)
        tables.append(table)
        at += -(-(24 + name_size) // 8) * 8
    assert at == directory + size
    return data, extension, directory, tables


def seeds() -> Iterable[bytes]:
    data, extension, directory, tables = _places()
    number, _, size, _ = struct.unpack_from(">IIQQ", data, extension)
    entries = data[directory : directory + size]
    words = b"".join(data[table : table + 8 * _TABLES] for table in tables)
    for count in (number, 1, 0):
        for flags in (0, 1, 2, 4):
            first = bytearray(entries)
            first[15] = flags
            yield bytes([count, 0]) + words + bytes(first)
    for word in (1, 0, 1 << 63, 512 * 3, (1 << 55) + 512):
        yield bytes([number, 0]) + word.to_bytes(8, "big") * _TABLES * len(tables) + entries


def one_input(data: bytes) -> None:
    taking = Taking(data)
    built, extension, directory, tables = _places()
    image = bytearray(built)
    number, autoclear = taking.number(1), not taking.flag()
    for table in tables:
        words = taking.bytes(8 * _TABLES)
        image[table : table + len(words)] = words
    entries = taking.bytes(_ROOM)
    image[directory : directory + len(entries)] = entries
    struct.pack_into(">IIQ", image, extension, number, 0, len(entries))
    struct.pack_into(">Q", image, 88, autoclear)
    disk.run(_used(disk.put(bytes(image)), bytes(image), entries if autoclear else b""))


async def _used(path: disk.Path, image: bytes, entries: bytes) -> None:
    async with await open_image(path, format="qcow2", engine=disk.engine()) as node:
        names = [bitmap.name for bitmap in node.bitmaps()] + [*node.inconsistent_bitmaps()]
        assert len(set(names)) == len(names)
        assert len(entries) >= 24 * len(names)
        at = 0
        for _ in names:
            table, size, flags, kind, bits, length, extra = struct.unpack_from(
                ">QIIBBHI", entries, at
            )
            name = entries[at + 24 : at + 24 + length].decode("utf-8", "surrogateescape")
            at += -(-(24 + length) // 8) * 8
            assert (kind, extra) == (1, 0)
            assert not flags & ~3  # in_use and auto
            if flags & 1:
                assert name in node.inconsistent_bitmaps()
                continue
            (bitmap,) = (one for one in node.bitmaps() if one.name == name)
            assert bitmap.granularity == 1 << bits
            assert bitmap.enabled == bool(flags & 2)
            await _judge(bitmap, node.size, image, table, size)


async def _judge(bitmap: DirtyBitmap, disk_size: int, image: bytes, table: int, size: int) -> None:
    try:
        await bitmap.load()
    except OSError as error:
        disk.check_errno(error)
        return
    granules = -(-disk_size // bitmap.granularity)
    content = b""
    for index in range(size):
        (entry,) = struct.unpack(">Q", image[table + 8 * index :][:8].ljust(8, b"\0"))
        offset = entry & 0x00FFFFFFFFFFFE00
        assert not entry & ~0x00FFFFFFFFFFFE01
        assert not offset % 512
        assert not (offset and entry & 1)
        filler = b"\xff" if entry & 1 else b"\0"
        content += image[offset : offset + 512].ljust(512, b"\0") if offset else filler * 512
    for granule in range(granules):
        assert bitmap.bits[granule] == content[granule // 8] >> granule % 8 & 1
    runs = await bitmap.runs(0, disk_size, granules + 2)
    start = 0
    for end, dirty in zip(runs.ends.tolist(), runs.dirty.tolist(), strict=True):
        assert start < end
        for granule in range(start // bitmap.granularity, -(-end // bitmap.granularity)):
            assert bitmap.bits[granule] == dirty
        start = end
    assert start == disk_size
