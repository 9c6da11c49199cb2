"""Persistent dirty bitmaps (docs/interop/qcow2.rst, "Bitmaps extension", "Bitmaps"), the reading
side.

The bitmap directory and the bitmap tables are read and checked when the image is opened, and one
bad entry refuses the image, as QEMU does: nothing that is written later could tell which clusters
are the bitmaps'. Tables beyond `TABLE_BYTES_AT_OPEN` are checked when they are used. Bitmap data is
read when a bitmap is used, one at a time; what was used last is kept (`ImageLimits.bitmaps`).

An entry that is in use was not saved: its bitmap keeps its name but cannot be used. Where autoclear
bit 0 is not set the whole extension is out of date, and it is as if there were no bitmaps.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from bitarray import bitarray

from pynbd.block.bitmap import DirtyBitmap, blank
from pynbd.block.engine import HostFile
from pynbd.block.limits import Budget, ChainMemory
from pynbd.block.qcow2.cache import LEAST_READ, SharedReads, read_table, read_up_to
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.extensions import BitmapsExtension
from pynbd.block.qcow2.format import (
    BITMAP_FLAGS_OFFSET,
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TABLE_OFFSET_MASK,
    BITMAP_TABLE_RESERVED_MASK,
    BITMAP_TYPE_DIRTY_TRACKING,
    MAX_BITMAP_BYTES,
    MAX_BITMAP_GRANULARITY_BITS,
    MAX_BITMAP_NAME,
    MAX_OFFSET,
    MIN_BITMAP_GRANULARITY_BITS,
    Autoclear,
    BitmapFlags,
)
from pynbd.block.qcow2.header import Header
from pynbd.errors import CorruptImage

log = logging.getLogger("pynbd")

# Of the flags, QEMU does not know extra_data_compatible, nor any extra data.
_KNOWN_FLAGS = int(BitmapFlags.IN_USE | BitmapFlags.AUTO)


# Of bitmap tables: 65535 bitmaps of a disk of 4 TiB, with the usual granularity and clusters.
TABLE_BYTES_AT_OPEN = 64 << 20

# What a bitmap takes in memory without its bits, and how many copies of its name there are.
_ENTRY_BYTES = 1024
_NAME_COPIES = 4

# One step reads and checks so many table entries, or reads so many clusters or bytes of bits: about
# a millisecond's worth.
_ENTRIES_PER_STEP = 1 << 16
_CLUSTERS_PER_STEP = 128
_BYTES_PER_STEP = 2 << 20


@dataclass(frozen=True, slots=True)
class BitmapTable:
    """Where a bitmap table is, what for, and how to call it."""

    where: str  # the image file and the bitmap
    offset: int
    size: int  # entries
    granularity: int  # bytes

    @classmethod
    def of(cls, entry: DirectoryEntry, where: str) -> BitmapTable:
        return cls(
            where, entry.bitmap_table_offset, entry.bitmap_table_size, 1 << entry.granularity_bits
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """A bitmap on disk. ``bitmap``: None if it cannot be used."""

    name: str
    bitmap: DirtyBitmap | None
    table: BitmapTable
    flags: BitmapFlags
    flags_offset: int  # in the file


@dataclass(frozen=True, slots=True)
class PersistentBitmaps:
    """The bitmaps of an image that can be used, and the names of those that cannot."""

    usable: tuple[DirtyBitmap, ...] = ()
    inconsistent: tuple[str, ...] = ()
    data: BitmapData | None = None
    stored: tuple[Stored, ...] = ()  # all of them


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """A bitmap as the directory describes it, whether it can be used or not."""

    name: str
    granularity: int  # bytes
    flags: BitmapFlags


async def directory(file: HostFile, header: Header) -> list[BitmapEntry]:
    """The bitmap directory of the image in ``file``; none where it is out of date. Raises
    `CorruptImage`.
    """
    extension = header.bitmaps
    if extension is None or Autoclear.BITMAPS not in header.autoclear:
        return []
    data = await file.read_bytes(extension.directory_size, extension.directory_offset)
    return [
        BitmapEntry(name, 1 << entry.granularity_bits, BitmapFlags(entry.flags))
        for entry, name, _ in _entries(data, extension, file.path)
    ]


async def tables(file: HostFile, header: Header) -> AsyncIterator[tuple[BitmapTable, UInt64s]]:
    """Where the bitmap table of each bitmap is, and its entries; also of those that are in use.
    Raises `CorruptImage`.
    """
    extension = header.bitmaps
    assert extension is not None
    data = await file.read_bytes(extension.directory_size, extension.directory_offset)
    for entry, name, _ in _entries(data, extension, file.path):
        table = BitmapTable.of(entry, f"{file.path}: bitmap {name!r}")
        _check_entry(entry, header, table.where)
        yield table, await read_bitmap_table(file, header, table)


async def load(file: HostFile, header: Header, memory: ChainMemory) -> PersistentBitmaps:
    """The bitmaps of the image in ``file``. Raises `CorruptImage`, or `ImageError` if they would
    need too much ``memory``.
    """
    extension = header.bitmaps
    if extension is None:
        return PersistentBitmaps()
    if Autoclear.BITMAPS not in header.autoclear:
        log.warning(
            "%s: its %d bitmaps are ignored: a program without them has written to the image",
            file.path,
            extension.nb_bitmaps,
        )
        return PersistentBitmaps()
    memory.take(
        extension.nb_bitmaps * _ENTRY_BYTES + extension.directory_size * _NAME_COPIES,
        "bitmap directory",
        file.path,
    )
    directory = await read_up_to(file, extension.directory_size, extension.directory_offset)
    data = BitmapData(file, header, memory.bitmaps)
    usable: list[DirtyBitmap] = []
    inconsistent: list[str] = []
    stored: list[Stored] = []
    names: set[str] = set()
    table_bytes = 0
    for entry, name, place in _entries(directory, extension, file.path):
        table = BitmapTable.of(entry, f"{file.path}: bitmap {name!r}")
        _check_entry(entry, header, table.where)
        if name in names:
            raise CorruptImage(f"{table.where}: there are two of that name")
        names.add(name)
        flags = BitmapFlags(entry.flags)
        flags_offset = extension.directory_offset + place + BITMAP_FLAGS_OFFSET
        if flags & BitmapFlags.IN_USE:
            inconsistent.append(name)
            stored.append(Stored(name, None, table, flags, flags_offset))
            continue
        memory.check_bits(_data_bytes(header, table.granularity), f"bitmap {name!r}", file.path)
        table_bytes += max(table.size * 8, LEAST_READ)
        if table_bytes <= TABLE_BYTES_AT_OPEN:
            await read_bitmap_table(file, header, table)
        bitmap = DirtyBitmap(
            name,
            header.virtual_size,
            1 << entry.granularity_bits,
            enabled=BitmapFlags.AUTO in flags,
            source=data.source(table),
        )
        usable.append(bitmap)
        stored.append(Stored(name, bitmap, table, flags, flags_offset))
    return PersistentBitmaps(tuple(usable), tuple(inconsistent), data, tuple(stored))


class DirectoryEntry(NamedTuple):
    """The fields of `BITMAP_DIRECTORY_ENTRY`: there may be very many."""

    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    type: int
    granularity_bits: int
    name_size: int
    extra_data_size: int


ENTRY = struct.Struct(">QIIBBHI")


def _entries(
    directory: bytes | bytearray, extension: BitmapsExtension, path: str
) -> Iterator[tuple[DirectoryEntry, str, int]]:
    """(fields, name, place in the directory) of each entry; there must be exactly as many as the
    extension says.
    """
    at, size = 0, ENTRY.size
    for index in range(extension.nb_bitmaps):
        place = f"{path}: bitmap directory entry {index} at {extension.directory_offset + at:#x}"
        if at + size > len(directory):
            raise CorruptImage(f"{place}: the directory ends before it does")
        entry = DirectoryEntry(*ENTRY.unpack_from(directory, at))
        if entry.extra_data_size:
            raise CorruptImage(f"{place}: it has extra data, and none is defined")
        if not 0 < entry.name_size <= MAX_BITMAP_NAME:
            raise CorruptImage(
                f"{place}: name_size is {entry.name_size}; 1 to {MAX_BITMAP_NAME} is allowed"
            )
        end = at + size + entry.name_size
        if end > len(directory):
            raise CorruptImage(f"{place}: the directory ends before it does")
        yield entry, directory[at + size : end].decode("utf-8", "surrogateescape"), at
        at = -(-end // 8) * 8
    if at != extension.directory_size:
        raise CorruptImage(
            f"{path}: the bitmap directory has {extension.directory_size} bytes; "
            f"its {extension.nb_bitmaps} entries take {at}"
        )


def _check_entry(entry: DirectoryEntry, header: Header, where: str) -> None:
    longest = MAX_BITMAP_BYTES // header.cluster_size
    rules = (
        (entry.type == BITMAP_TYPE_DIRTY_TRACKING, f"type {entry.type}; 1 is allowed"),
        (not entry.flags & ~_KNOWN_FLAGS, f"flags {entry.flags:#x}; bits 0 and 1 are allowed"),
        (
            MIN_BITMAP_GRANULARITY_BITS <= entry.granularity_bits <= MAX_BITMAP_GRANULARITY_BITS,
            f"granularity_bits {entry.granularity_bits}; 9 to 31 is allowed",
        ),
        (
            0 < entry.bitmap_table_offset < MAX_OFFSET - MAX_BITMAP_BYTES
            and not entry.bitmap_table_offset % header.cluster_size,
            f"bitmap table at {entry.bitmap_table_offset:#x}, not at a cluster",
        ),
        (
            0 < entry.bitmap_table_size <= longest,
            f"bitmap_table_size {entry.bitmap_table_size}; 1 to {longest} is allowed",
        ),
    )
    for obeyed, otherwise in rules:
        if not obeyed:
            raise CorruptImage(f"{where}: {otherwise}")
    if entry.flags & BitmapFlags.IN_USE:
        return  # "the metadata (such as the auto flag or bitmap size) [...] may be outdated"
    needed = -(-_data_bytes(header, 1 << entry.granularity_bits) // header.cluster_size)
    if entry.bitmap_table_size != needed:
        raise CorruptImage(
            f"{where}: bitmap_table_size {entry.bitmap_table_size}, where the disk needs {needed}"
        )


def _data_bytes(header: Header, granularity: int) -> int:
    """Bytes of bitmap data that cover the disk, in whole 64-bit words, as QEMU stores them."""
    return -(-header.virtual_size // (granularity * 64)) * 8


class BitmapData:
    """The bits of an image's bitmaps: those that were used last, and how to read the others."""

    def __init__(self, file: HostFile, header: Header, memory: Budget) -> None:
        self._file = file
        self._header = header
        self._tables: list[BitmapTable] = []
        self._one_at_a_time = asyncio.Lock()  # what is being read is not counted as kept
        self.reads = SharedReads(self._read, memory, lambda bits: bits.nbytes)

    def source(self, table: BitmapTable) -> Callable[[], Awaitable[bitarray]]:
        """What brings the bits that ``table`` leads to; ``OSError`` if they cannot be read."""
        self._tables.append(table)
        return partial(self.reads.load, len(self._tables) - 1)

    async def _read(self, index: int) -> bitarray:
        async with self._one_at_a_time:
            # Its table is read again: those of many bitmaps are a lot to keep.
            table = self._tables[index]
            try:
                entries = await read_bitmap_table(self._file, self._header, table)
            except CorruptImage as error:
                raise OSError(errno.EIO, str(error)) from error
            return await self._read_bits(entries, table.granularity)

    async def _read_bits(self, table: UInt64s, granularity: int) -> bitarray:
        size, cluster_size = self._header.virtual_size, self._header.cluster_size
        bits = blank(size, granularity)
        in_cluster = cluster_size * 8
        named = np.flatnonzero(table)
        at_once = max(min(_CLUSTERS_PER_STEP, _BYTES_PER_STEP // cluster_size), 1)
        with memoryview(bits) as data:
            for step in range(0, len(named), at_once):
                for index in named[step : step + at_once].tolist():
                    if table[index] == BITMAP_TABLE_ALL_ONES:
                        bits[index * in_cluster : (index + 1) * in_cluster] = 1
                    else:
                        first = index * cluster_size
                        await self._file.read(data[first : first + cluster_size], int(table[index]))
                await asyncio.sleep(0)
        bits[-(-size // granularity) :] = 0
        return bits


async def read_bitmap_table(file: HostFile, header: Header, table: BitmapTable) -> UInt64s:
    """The entries of a bitmap table. Raises `CorruptImage`."""
    parts: list[UInt64s] = []
    for first in range(0, table.size, _ENTRIES_PER_STEP):
        if parts:
            await asyncio.sleep(0)
        count = min(_ENTRIES_PER_STEP, table.size - first)
        part = await read_table(file, table.offset + first * 8, count)
        host = part & np.uint64(BITMAP_TABLE_OFFSET_MASK)
        bad = (part & np.uint64(BITMAP_TABLE_RESERVED_MASK) != 0) | (
            host % header.cluster_size != 0
        )
        bad |= (host != 0) & (part & np.uint64(BITMAP_TABLE_ALL_ONES) != 0)
        if bad.any():
            index = int(np.argmax(bad))
            problem = f"entry {first + index} of its table is {int(part[index]):#x}"
            raise CorruptImage(f"{table.where}: {problem}")
        parts.append(part)
    return np.concatenate(parts)
