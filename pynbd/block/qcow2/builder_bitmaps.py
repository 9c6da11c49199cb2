"""Persistent bitmaps of an image that is being built (docs/interop/qcow2.rst, "Bitmaps")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pynbd.block.qcow2.builder_host import HostClusters
from pynbd.block.qcow2.extensions import BitmapsExtension
from pynbd.block.qcow2.format import (
    BITMAP_DIRECTORY_ENTRY,
    BITMAP_TABLE_ALL_ONES,
    BITMAP_TYPE_DIRTY_TRACKING,
    BitmapFlags,
)


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent dirty bitmap. ``dirty``: (guest offset, length) of dirty ranges."""

    name: str
    granularity: int = 65536
    dirty: Sequence[tuple[int, int]] = ()
    flags: BitmapFlags = BitmapFlags.AUTO


def write_bitmaps(bitmaps: Sequence[Bitmap], size: int, host: HostClusters) -> BitmapsExtension:
    """Write ``bitmaps``, their tables and the bitmap directory."""
    directory = b""
    for bitmap in bitmaps:
        bits = np.zeros(-(-size // bitmap.granularity), np.uint8)
        for offset, length in bitmap.dirty:
            bits[offset // bitmap.granularity : -(-(offset + length) // bitmap.granularity)] = 1
        data = np.packbits(bits, bitorder="little").tobytes()
        table = [
            _write_bitmap_cluster(data[at : at + host.cluster_size], host)
            for at in range(0, len(data), host.cluster_size)
        ]
        name = bitmap.name.encode()
        fields = BITMAP_DIRECTORY_ENTRY.build(
            {
                "bitmap_table_offset": host.append(np.array(table, ">u8").tobytes()),
                "bitmap_table_size": len(table),
                "flags": bitmap.flags,
                "type": BITMAP_TYPE_DIRTY_TRACKING,
                "granularity_bits": bitmap.granularity.bit_length() - 1,
                "name_size": len(name),
                "extra_data_size": 0,
            }
        )
        entry = fields + name
        directory += entry + bytes(-len(entry) % 8)
    return BitmapsExtension(len(bitmaps), len(directory), host.append(directory))


def _write_bitmap_cluster(data: bytes, host: HostClusters) -> int:
    """The bitmap table entry of up to a cluster of bitmap data; only mixed data is stored."""
    if not any(data):
        return 0
    if data == b"\xff" * host.cluster_size:
        return BITMAP_TABLE_ALL_ONES
    return host.append(data)
