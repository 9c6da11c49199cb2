"""Images that are as large as the format allows where that costs a reader memory or time, and small
on disk: mostly holes, and tables whose entries all name the same cluster.

Each is made in a folder, and named by the function; `IMAGES` has them all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from pynbd.block.qcow2.extensions import BitmapsExtension
from pynbd.block.qcow2.format import (
    BITMAP_DIRECTORY_ENTRY,
    COPIED,
    L1E_SIZE,
    MAX_BITMAPS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    SNAPSHOT_ENTRY,
    Autoclear,
    Incompatible,
)
from pynbd.block.qcow2.header import Header, encode

MIB = 1 << 20
MOST_SNAPSHOTS = 65535


def header(cluster_bits: int, **fields: object) -> Header:
    """One whose L1 table is at the second cluster and refcount table at the third, both empty."""
    size = 1 << cluster_bits
    chosen: dict[str, object] = {
        "version": 3,
        "cluster_bits": cluster_bits,
        "size": 0,
        "l1_size": 0,
        "l1_table_offset": size,
        "refcount_table_offset": 2 * size,
        "refcount_table_clusters": 1,
        "header_length": 104,
    }
    return Header(**(chosen | fields))  # type: ignore[arg-type]


def written(path: Path, fields: Header, parts: dict[int, bytes], end: int = 0) -> Path:
    """The image of ``fields``, with bytes at some places, ``end`` bytes long or more."""
    with path.open("wb") as file:
        file.write(encode(fields))
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
        file.truncate(max(end, file.seek(0, 2)))
    return path


def l1_tables(folder: Path, layers: int = 200, entry: int = 0) -> Path:
    """Layers whose L1 tables have 32 MiB each, of holes unless there is an ``entry``."""
    entries = MAX_L1_BYTES // L1E_SIZE
    path = folder / "none"
    for number in range(layers):
        below = {"backing_file": path.name, "backing_format": "qcow2"} if number else {}
        path = folder / f"{number}.qcow2"
        fields = header(9, size=128 << 30, l1_size=entries, l1_table_offset=2048, **below)
        parts = {2048: struct.pack(">Q", entry) * entries} if entry else {}
        written(path, fields, parts, 2048 + MAX_L1_BYTES)
    return path


def l1_tables_of_one(folder: Path) -> Path:
    """A layer, of whose L1 table all entries name the same L2 table."""
    return l1_tables(folder, 1, COPIED | 1024)


def snapshots(folder: Path) -> Path:
    """As many snapshots as there may be, in a table that is as long as it may be."""
    entry = {
        "l1_table_offset": 0,
        "l1_size": 0,
        "id_size": 8,
        "name_size": 952,
        "date_sec": 0,
        "date_nsec": 0,
        "vm_clock_nsec": 0,
        "vm_state_size": 0,
        "extra_data_size": 24,
    }
    first = SNAPSHOT_ENTRY.build(entry) + bytes(24)
    table = b"".join(first + b"%08d" % number + b"n" * 952 for number in range(MOST_SNAPSHOTS))
    fields = header(16, size=MIB, l1_size=1, nb_snapshots=MOST_SNAPSHOTS, snapshots_offset=MIB)
    return written(folder / "snapshots.qcow2", fields, {MIB: table})


def bitmaps(folder: Path, name: int = 1000, table: int = 1) -> Path:
    """As many bitmaps as there may be, with names of so many bytes, whose tables of so many entries
    are in one place.
    """
    bits = table << 16 + 3 + 16  # of guest bytes: in clusters of 64 KiB, and so are granules
    entry = {
        "bitmap_table_offset": 128 << 20,
        "bitmap_table_size": table,
        "flags": 0,
        "type": 1,
        "granularity_bits": 16,
        "name_size": name,
        "extra_data_size": 0,
    }
    first = BITMAP_DIRECTORY_ENTRY.build(entry)
    entries = b"".join(
        first + (b"%08d" % number).ljust(name, b"n") + bytes(-name % 8)
        for number in range(MAX_BITMAPS)
    )
    fields = header(
        16,
        size=bits,
        l1_size=-(-bits >> 29),
        l1_table_offset=196608,
        bitmaps=BitmapsExtension(MAX_BITMAPS, len(entries), MIB),
        autoclear=Autoclear.BITMAPS,
    )
    return written(folder / "bitmaps.qcow2", fields, {MIB: entries}, (128 << 20) + (table << 3))


def bitmap_of_ones(folder: Path) -> Path:
    """A bitmap of 512 MiB, all of whose bits are set by 64 KiB of table."""
    size = 1 << 48
    entry = {
        "bitmap_table_offset": 2 * MIB,
        "bitmap_table_size": 8192,
        "flags": 2,
        "type": 1,
        "granularity_bits": 16,
        "name_size": 1,
        "extra_data_size": 0,
    }
    fields = header(
        16,
        size=size,
        l1_size=size >> 29,
        l1_table_offset=4 * MIB,
        bitmaps=BitmapsExtension(1, 32, MIB),
        autoclear=Autoclear.BITMAPS,
    )
    directory = BITMAP_DIRECTORY_ENTRY.build(entry) + b"b" + bytes(7)
    ones = struct.pack(">Q", 1) * 8192
    return written(folder / "ones.qcow2", fields, {MIB: directory, 2 * MIB: ones}, 8 * MIB)


def refcount_blocks(folder: Path) -> Path:
    """A refcount table of 8 MiB, all of whose blocks are in one cluster."""
    clusters = MAX_REFCOUNT_TABLE_BYTES >> 9
    fields = header(
        9,
        size=MIB,
        l1_size=32,
        l1_table_offset=1024,
        refcount_table_offset=2048,
        refcount_table_clusters=clusters,
    )
    table = struct.pack(">Q", 512) * (clusters * 64)
    return written(folder / "refcounts.qcow2", fields, {512: b"\0\1" * 256, 2048: table})


def invalid_subclusters(folder: Path) -> Path:
    """An extended L2 table of 2 MiB, no entry of which obeys the rules, for all of 2 TiB."""
    size = 2 << 40
    tables = size >> 21 + 17
    l1 = struct.pack(">Q", COPIED | 4 << 20) * tables
    l2 = struct.pack(">QQ", COPIED | 8 << 20, (1 << 64) - 1) * (1 << 17)
    fields = header(
        21,
        size=size,
        l1_size=tables,
        incompatible=Incompatible.EXTENDED_L2,
    )
    return written(folder / "subclusters.qcow2", fields, {2 << 20: l1, 4 << 20: l2}, 10 << 20)


def largest(folder: Path) -> Path:
    """A disk of 2^63 - 512 bytes: an L1 table cannot map it."""
    fields = header(21, l1_size=MAX_L1_BYTES // L1E_SIZE)
    return written(folder / "largest.qcow2", fields, {24: struct.pack(">Q", 2**63 - 512)})


def largest_mapped(folder: Path) -> Path:
    """The largest disk that an L1 table can map: 2^61 bytes."""
    entries = MAX_L1_BYTES // L1E_SIZE
    fields = header(
        21, size=1 << 61, l1_size=entries, l1_table_offset=4 * MIB, refcount_table_offset=2 * MIB
    )
    return written(folder / "mapped.qcow2", fields, {}, 36 * MIB)


IMAGES: dict[str, Callable[[Path], Path]] = {
    "L1 tables of 32 MiB in 200 layers": l1_tables,
    "L1 tables of 32 MiB in two layers": lambda folder: l1_tables(folder, 2),
    "an L1 table of 32 MiB that names one L2 table": l1_tables_of_one,
    "65535 snapshots": snapshots,
    "65535 bitmaps with long names": bitmaps,
    "65535 bitmaps with short names": lambda folder: bitmaps(folder, 8),
    "a bitmap of ones": bitmap_of_ones,
    "a refcount table of 8 MiB of one block": refcount_blocks,
    "subclusters that are all invalid": invalid_subclusters,
    "a disk of 2^63 - 512 bytes": largest,
    "a disk of 2^61 bytes": largest_mapped,
}
