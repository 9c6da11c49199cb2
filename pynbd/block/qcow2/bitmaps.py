"""Persistent dirty bitmaps (docs/interop/qcow2.rst, "Bitmaps extension", "Bitmaps"), the reading
side.

The bitmap directory and the bitmap tables are read and checked when the image is opened, and one
bad entry refuses the image, as QEMU does: nothing that is written later could tell which clusters
are the bitmaps'. Bitmap data is read at a bitmap's first use.

An entry that is in use was not saved: its bitmap keeps its name but cannot be used. Where autoclear
bit 0 is not set the whole extension is out of date, and it is as if there were no bitmaps.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from bitarray import bitarray
from construct import Container

from pynbd.block.bitmap import DirtyBitmap, blank
from pynbd.block.engine import HostFile
from pynbd.block.qcow2.cache import read_table
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.extensions import BitmapsExtension
from pynbd.block.qcow2.format import (
    BITMAP_DIRECTORY_ENTRY,
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


@dataclass(frozen=True, slots=True)
class PersistentBitmaps:
    """The bitmaps of an image that can be used, and the names of those that cannot."""

    usable: tuple[DirtyBitmap, ...] = ()
    inconsistent: tuple[str, ...] = ()


async def load(file: HostFile, header: Header) -> PersistentBitmaps:
    """The bitmaps of the image in ``file``. Raises `CorruptImage`."""
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
    directory = await file.read_bytes(extension.directory_size, extension.directory_offset)
    usable: dict[str, DirtyBitmap] = {}
    inconsistent: list[str] = []
    for entry, name in _entries(directory, extension, file.path):
        where = f"{file.path}: bitmap {name!r}"
        _check_entry(entry, header, where)
        if name in usable or name in inconsistent:
            raise CorruptImage(f"{where}: there are two of that name")
        if entry.flags & BitmapFlags.IN_USE:
            inconsistent.append(name)
            continue
        await _read_bitmap_table(file, header, entry, where)
        usable[name] = DirtyBitmap(
            name,
            header.virtual_size,
            1 << entry.granularity_bits,
            enabled=bool(entry.flags & BitmapFlags.AUTO),
            source=partial(_load_bits, file, header, entry, where),
        )
    return PersistentBitmaps(tuple(usable.values()), tuple(inconsistent))


def _entries(
    directory: bytes, extension: BitmapsExtension, path: str
) -> Iterator[tuple[Container, str]]:
    """(fields, name) of each entry; there must be exactly as many as the extension says."""
    at, size = 0, BITMAP_DIRECTORY_ENTRY.sizeof()
    for index in range(extension.nb_bitmaps):
        place = f"{path}: bitmap directory entry {index} at {extension.directory_offset + at:#x}"
        if at + size > len(directory):
            raise CorruptImage(f"{place}: the directory ends before it does")
        entry = BITMAP_DIRECTORY_ENTRY.parse(directory[at : at + size])
        if entry.extra_data_size:
            raise CorruptImage(f"{place}: it has extra data, and none is defined")
        if not 0 < entry.name_size <= MAX_BITMAP_NAME:
            raise CorruptImage(
                f"{place}: name_size is {entry.name_size}; 1 to {MAX_BITMAP_NAME} is allowed"
            )
        end = at + size + entry.name_size
        if end > len(directory):
            raise CorruptImage(f"{place}: the directory ends before it does")
        yield entry, directory[at + size : end].decode("utf-8", "surrogateescape")
        at = -(-end // 8) * 8
    if at != extension.directory_size:
        raise CorruptImage(
            f"{path}: the bitmap directory has {extension.directory_size} bytes; "
            f"its {extension.nb_bitmaps} entries take {at}"
        )


def _check_entry(entry: Container, header: Header, where: str) -> None:
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


async def _read_bitmap_table(
    file: HostFile, header: Header, entry: Container, where: str
) -> UInt64s:
    table = await read_table(file, entry.bitmap_table_offset, entry.bitmap_table_size)
    host = table & np.uint64(BITMAP_TABLE_OFFSET_MASK)
    bad = (table & np.uint64(BITMAP_TABLE_RESERVED_MASK) != 0) | (host % header.cluster_size != 0)
    bad |= (host != 0) & (table & np.uint64(BITMAP_TABLE_ALL_ONES) != 0)
    if bad.any():
        index = int(np.argmax(bad))
        raise CorruptImage(f"{where}: entry {index} of its table is {int(table[index]):#x}")
    return table


async def _load_bits(file: HostFile, header: Header, entry: Container, where: str) -> bitarray:
    """The bits of a bitmap. Its table is read again: those of many bitmaps are a lot to keep."""
    try:
        table = await _read_bitmap_table(file, header, entry, where)
    except CorruptImage as error:
        raise OSError(errno.EIO, str(error)) from error
    granularity = 1 << entry.granularity_bits
    bits = blank(header.virtual_size, granularity)
    cluster_bits = header.cluster_size * 8
    with memoryview(bits) as data:
        for index in np.flatnonzero(table).tolist():
            if table[index] == BITMAP_TABLE_ALL_ONES:
                bits[index * cluster_bits : (index + 1) * cluster_bits] = 1
            else:
                first = index * header.cluster_size
                await file.read(data[first : first + header.cluster_size], int(table[index]))
    bits[-(-header.virtual_size // granularity) :] = 0
    return bits
