"""Damaged images: sound ones of every kind, each with a few bytes changed.

`DAMAGES` names what is changed and where. What is wrong with it is not written down: qemu-img says
it, and pynbd has to say the same.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pynbd.block.qcow2.builder import (
    Bitmap,
    Cluster,
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Subclusters,
    Written,
    Zero,
    poke,
)
from pynbd.block.qcow2.format import (
    AUTOCLEAR_OFFSET,
    COMPRESSED,
    COPIED,
    INCOMPATIBLE_OFFSET,
    SNAPSHOT_ENTRY,
    BitmapFlags,
)

CLUSTER = 1 << 12
OFFSET = 0x00FFFFFFFFFFF000  # of a host cluster of 4 KiB or more, in an L1 or L2 entry
FAR = 1 << 54

# What is where in the images below, by guest cluster.
FIRST, SECOND, PACKED, PACKED_TOO, EMPTY, KEPT, PIECES, OTHER_TABLE = 0, 1, 2, 3, 4, 5, 6, 600


def clusters(size: int, *, packed: bool = True, extended: bool = False) -> dict[int, Cluster]:
    found: dict[int, Cluster] = {FIRST: Data(b"first"), SECOND: Data(b"second")}
    if packed:
        found |= {PACKED: Compressed(b"p" * size), PACKED_TOO: Compressed(b"q" * size)}
    found |= {EMPTY: Zero(), KEPT: Zero(preallocated=True), OTHER_TABLE: Data(b"third")}
    if extended:
        found[PIECES] = Subclusters(b"pieces", allocated=0x0000FFFF, zero=0x00FF0000)
    return {number * size: cluster for number, cluster in found.items()}


SIZE = 1024 * CLUSTER
SHARED = clusters(CLUSTER)
IMAGES: dict[str, Image] = {
    "plain": Image(size=SIZE, cluster_bits=12, clusters=clusters(CLUSTER)),
    "narrow": Image(
        size=SIZE, cluster_bits=12, refcount_bits=1, clusters=clusters(CLUSTER, packed=False)
    ),
    "wide": Image(size=SIZE, cluster_bits=12, refcount_bits=64, clusters=clusters(CLUSTER)),
    "old": Image(
        size=SIZE,
        cluster_bits=12,
        version=2,
        clusters={0: Data(b"first"), CLUSTER: Data(b"second"), 2 * CLUSTER: Compressed(b"p")},
    ),
    "extended": Image(
        size=2048 << 14,
        cluster_bits=14,
        extended_l2=True,
        clusters=clusters(1 << 14, extended=True),
    ),
    "data file": Image(
        size=SIZE, cluster_bits=12, data_file="disk.data", clusters=clusters(CLUSTER, packed=False)
    ),
    "snapshots": Image(
        size=SIZE,
        cluster_bits=12,
        clusters=SHARED | {7 * CLUSTER: Data(b"later")},
        snapshots=[
            InternalSnapshot("one", SHARED),
            InternalSnapshot("two", {0: Data(b"its own")}, size=SIZE // 2),
        ],
    ),
    "bitmaps": Image(
        size=SIZE,
        cluster_bits=12,
        clusters=clusters(CLUSTER),
        bitmaps=[
            Bitmap("recording", granularity=512, dirty=[(0, 4096)]),
            Bitmap("torn", granularity=4096, dirty=[(0, 8192)], flags=BitmapFlags.IN_USE),
        ],
    ),
}


@dataclass(frozen=True)
class Target:
    """An image to be damaged. Offsets are those of the file."""

    path: Path
    written: Written

    def word(self, offset: int) -> int:
        with self.path.open("rb") as file:
            file.seek(offset)
            (word,) = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
        return int(word)

    def put(self, offset: int, word: int) -> None:
        poke(self.path, offset, struct.pack(">Q", word))

    def change(self, offset: int, flip: int = 0, to: int | None = None) -> None:
        """Flip bits of the entry at ``offset``, and let it name the host offset ``to``."""
        word = self.word(offset)
        if to is not None:
            word = word & ~OFFSET | to
        self.put(offset, word ^ flip)

    @property
    def cluster(self) -> int:
        return self.written.header.cluster_size

    @property
    def end(self) -> int:
        return self.path.stat().st_size

    def l1(self, index: int = 0) -> int:
        return self.written.header.l1_table_offset + index * 8

    def l2(self, number: int) -> int:
        return self.written.entry_offset(number * self.cluster)

    def host(self, number: int) -> int:
        """The host offset that the L2 entry of a guest cluster names."""
        return self.word(self.l2(number)) & OFFSET

    @property
    def table(self) -> int:
        return self.written.header.refcount_table_offset

    @property
    def block(self) -> int:
        return self.word(self.table)

    def refcount(self, offset: int, count: int) -> None:
        """Set the refcount of the host cluster at ``offset``."""
        bits = self.written.header.refcount_bits
        number = offset // self.cluster
        if bits < 8:
            at = self.block + number * bits // 8
            shift = number * bits % 8
            byte = self.word(at) >> 56
            byte = byte & ~(((1 << bits) - 1) << shift) | count << shift
            poke(self.path, at, bytes([byte]))
        else:
            poke(self.path, self.block + number * bits // 8, count.to_bytes(bits // 8, "big"))

    @property
    def snapshot(self) -> int:
        return self.written.header.snapshots_offset

    def snapshot_l1(self) -> int:
        return self.word(self.snapshot)

    def snapshot_l2(self, index: int = 0) -> int:
        return (self.word(self.snapshot_l1()) & OFFSET) + index * 8

    @property
    def bitmaps(self) -> int:
        assert self.written.header.bitmaps is not None
        return self.written.header.bitmaps.directory_offset


Change = Callable[[Target], object]


def both(*changes: Change) -> Change:
    def change(target: Target) -> None:
        for one in changes:
            one(target)

    return change


# By image and name. The places of entries: t.l1() and t.l2(guest cluster).
DAMAGES: dict[str, dict[str, Change]] = {
    "plain": {
        "nothing": lambda t: None,
        "refcount of data 0": lambda t: t.refcount(t.host(FIRST), 0),
        "refcount of data 2": lambda t: t.refcount(t.host(FIRST), 2),
        "refcount of a compressed cluster 1": lambda t: t.refcount(t.host(PACKED), 1),
        "refcount of a compressed cluster 0": lambda t: t.refcount(t.host(PACKED), 0),
        "refcount of a compressed cluster 9": lambda t: t.refcount(t.host(PACKED), 9),
        "refcount of the header 0": lambda t: t.refcount(0, 0),
        "refcount of the header 2": lambda t: t.refcount(0, 2),
        "refcount of the L1 table 0": lambda t: t.refcount(t.l1(), 0),
        "refcount of an L2 table 0": lambda t: t.refcount(t.word(t.l1()) & OFFSET, 0),
        "refcount of an L2 table 2": lambda t: t.refcount(t.word(t.l1()) & OFFSET, 2),
        "refcount of the refcount table 0": lambda t: t.refcount(t.table, 0),
        "refcount of the refcount block 0": lambda t: t.refcount(t.block, 0),
        "refcount of the refcount block 3": lambda t: t.refcount(t.block, 3),
        "refcount of nobody's cluster": both(
            lambda t: os.truncate(t.path, t.end + t.cluster),
            lambda t: t.refcount(t.end - t.cluster, 1),
        ),
        "refcount behind the end": lambda t: t.refcount(t.end, 1),
        "all refcounts 0": lambda t: poke(t.path, t.block, bytes(t.cluster)),
        "all refcounts 1": lambda t: poke(t.path, t.block, b"\0\1" * (t.cluster // 2)),
        "no refcount block": lambda t: t.put(t.table, 0),
        "refcount block misaligned": lambda t: t.change(t.table, 0x200),
        "refcount table entry, bit 0": lambda t: t.change(t.table, 1),
        "refcount table entry, bit 8": lambda t: t.change(t.table, 0x100),
        "refcount block at the end": lambda t: t.put(t.table, t.end),
        "refcount block far away": lambda t: t.put(t.table, FAR),
        "refcount block nowhere": lambda t: t.put(t.table, 1 << 63),
        "second refcount block far away": lambda t: t.put(t.table + 8, FAR),
        "second refcount block misaligned": lambda t: t.put(t.table + 8, t.block + 0x200),
        "second refcount block is the first": lambda t: t.put(t.table + 8, t.block),
        "refcount block in data": lambda t: t.put(t.table, t.host(FIRST)),
        "refcount block in an L2 table": lambda t: t.put(t.table, t.word(t.l1()) & OFFSET),
        "refcount block in the L1 table": lambda t: t.put(t.table, t.l1()),
        "second refcount block in data": lambda t: t.put(t.table + 8, t.host(FIRST)),
        "refcount table longer": lambda t: poke(t.path, 56, b"\0\0\0\2"),
        "refcount table in data": lambda t: t.put(48, t.host(FIRST)),
        "refcount table at the end": lambda t: t.put(48, t.end),
        "L1 entry without COPIED": lambda t: t.change(t.l1(), COPIED),
        "L1 entry, bit 0": lambda t: t.change(t.l1(), 1),
        "L1 entry, bit 8": lambda t: t.change(t.l1(), 0x100),
        "L1 entry, bit 56": lambda t: t.change(t.l1(), 1 << 56),
        "L1 entry, bit 62": lambda t: t.change(t.l1(), 1 << 62),
        "unused L1 entry, bit 62": both(
            lambda t: t.put(t.l1(1), 1 << 62),
        ),
        "L1 entry with nothing but COPIED": lambda t: t.put(t.l1(), COPIED),
        "L2 table misaligned": lambda t: t.change(t.l1(), 0x200),
        "L2 table at the end": lambda t: t.change(t.l1(), to=t.end),
        "L2 table far away": lambda t: t.change(t.l1(), to=FAR),
        "L2 table is gone": lambda t: t.put(t.l1(), 0),
        "L2 table in data": lambda t: t.change(t.l1(), to=t.host(FIRST)),
        "L2 table in a refcount block": lambda t: t.change(t.l1(), to=t.block),
        "L2 table twice": lambda t: t.change(t.l1(), to=t.word(t.l1(1)) & OFFSET),
        "L1 table longer": lambda t: poke(t.path, 36, b"\0\0\0\7"),
        "L1 table in data": lambda t: t.put(40, t.host(FIRST)),
        "L1 table at the end": lambda t: t.put(40, t.end),
        "data without COPIED": lambda t: t.change(t.l2(FIRST), COPIED),
        "data, bit 1": lambda t: t.change(t.l2(FIRST), 2),
        "data, bit 8": lambda t: t.change(t.l2(FIRST), 0x100),
        "data, bit 56": lambda t: t.change(t.l2(FIRST), 1 << 56),
        "data, bit 61": lambda t: t.change(t.l2(FIRST), 1 << 61),
        "data with the zero flag": lambda t: t.change(t.l2(FIRST), 1),
        "data that claims to be compressed": lambda t: t.change(t.l2(FIRST), COMPRESSED | COPIED),
        "data misaligned": lambda t: t.change(t.l2(FIRST), 0x200),
        "data at the end": lambda t: t.change(t.l2(FIRST), to=t.end),
        "data far away": lambda t: t.change(t.l2(FIRST), to=FAR),
        "data is gone": lambda t: t.put(t.l2(FIRST), 0),
        "data twice": lambda t: t.change(t.l2(FIRST), to=t.host(SECOND)),
        "data in the L1 table": lambda t: t.change(t.l2(FIRST), to=t.l1()),
        "data in another L2 table": lambda t: t.change(t.l2(FIRST), to=t.word(t.l1(1)) & OFFSET),
        "data in the refcount table": lambda t: t.change(t.l2(FIRST), to=t.table),
        "data in a refcount block": lambda t: t.change(t.l2(FIRST), to=t.block),
        "data in compressed data": lambda t: t.change(t.l2(FIRST), to=t.host(PACKED)),
        "unused entry, bit 1": lambda t: t.put(t.l2(100), 2),
        "unused entry with COPIED": lambda t: t.put(t.l2(100), COPIED),
        "zero cluster, bit 56": lambda t: t.change(t.l2(EMPTY), 1 << 56),
        "preallocated without COPIED": lambda t: t.change(t.l2(KEPT), COPIED),
        "preallocated misaligned": lambda t: t.change(t.l2(KEPT), 0x200),
        "preallocated at the end": lambda t: t.change(t.l2(KEPT), to=t.end),
        "compressed with COPIED": lambda t: t.change(t.l2(PACKED), COPIED),
        "compressed over more sectors": lambda t: t.change(t.l2(PACKED), 0xF << 58),
        "compressed far away": lambda t: t.change(t.l2(PACKED), FAR),
        "compressed is gone": lambda t: t.put(t.l2(PACKED), 0),
        "file ends a cluster early": lambda t: os.truncate(t.path, t.end - t.cluster),
        "file ends half a cluster early": lambda t: os.truncate(t.path, t.end - t.cluster // 2),
        "file ends with 100 bytes of a cluster": lambda t: os.truncate(
            t.path, t.end - t.cluster + 100
        ),
        "file ends after the header": lambda t: os.truncate(t.path, t.cluster),
        "dirty": lambda t: t.change(INCOMPATIBLE_OFFSET, 1),
        "dirty, without refcounts": both(
            lambda t: t.change(INCOMPATIBLE_OFFSET, 1),
            lambda t: poke(t.path, t.block, bytes(t.cluster)),
        ),
        "marked corrupt": lambda t: t.change(INCOMPATIBLE_OFFSET, 2),
        "unknown autoclear bit": lambda t: t.change(AUTOCLEAR_OFFSET, 1 << 40),
        "unknown autoclear bit, and a leak": both(
            lambda t: t.change(AUTOCLEAR_OFFSET, 1 << 40),
            lambda t: t.refcount(t.host(FIRST), 2),
        ),
    },
    "narrow": {
        "nothing": lambda t: None,
        "refcount of data 0": lambda t: t.refcount(t.host(FIRST), 0),
        "refcount behind the end": lambda t: t.refcount(t.end, 1),
        "data twice": lambda t: t.change(t.l2(FIRST), to=t.host(SECOND)),
        "data in a refcount block": lambda t: t.change(t.l2(FIRST), to=t.block),
        "second refcount block is the first": lambda t: t.put(t.table + 8, t.block),
        "no refcount block": lambda t: t.put(t.table, 0),
    },
    "wide": {
        "nothing": lambda t: None,
        "refcount of data 2^40": lambda t: t.refcount(t.host(FIRST), 1 << 40),
        "refcount of data 2^63": lambda t: t.refcount(t.host(FIRST), 1 << 63),
        "refcount of data 0": lambda t: t.refcount(t.host(FIRST), 0),
        "no refcount block": lambda t: t.put(t.table, 0),
        "data twice": lambda t: t.change(t.l2(FIRST), to=t.host(SECOND)),
    },
    "old": {
        "nothing": lambda t: None,
        "refcount of data 0": lambda t: t.refcount(t.host(FIRST), 0),
        "data without COPIED": lambda t: t.change(t.l2(FIRST), COPIED),
        "data with the zero flag": lambda t: t.change(t.l2(FIRST), 1),
        "no refcount block": lambda t: t.put(t.table, 0),
    },
    "extended": {
        "nothing": lambda t: None,
        "refcount of data 0": lambda t: t.refcount(t.host(PIECES), 0),
        "a subcluster both allocated and zero": lambda t: t.change(t.l2(PIECES) + 8, 1 << 32),
        "a subcluster allocated nowhere": lambda t: t.put(t.l2(100) + 8, 1),
        "data misaligned": lambda t: t.change(t.l2(PIECES), 0x200),
        "preallocated misaligned": lambda t: t.change(t.l2(KEPT), 0x200),
        "preallocated, bit 0": lambda t: t.change(t.l2(KEPT), 1),
        "compressed with subclusters": lambda t: t.put(t.l2(PACKED) + 8, 1 << 40),
        "compressed with COPIED": lambda t: t.change(t.l2(PACKED), COPIED),
        "data without COPIED": lambda t: t.change(t.l2(FIRST), COPIED),
        "data, bit 8": lambda t: t.change(t.l2(FIRST), 0x100),
    },
    "data file": {
        "nothing": lambda t: None,
        "data without COPIED": lambda t: t.change(t.l2(SECOND), COPIED),
        "first cluster without COPIED": lambda t: t.change(t.l2(FIRST), COPIED),
        "data misaligned": lambda t: t.change(t.l2(SECOND), 0x200),
        "data elsewhere": lambda t: t.change(t.l2(SECOND), to=0x5000),
        "data that claims to be compressed": lambda t: t.change(t.l2(SECOND), COMPRESSED | COPIED),
        "refcount of an L2 table 0": lambda t: t.refcount(t.word(t.l1()) & OFFSET, 0),
        "refcount of an L2 table 2": lambda t: t.refcount(t.word(t.l1()) & OFFSET, 2),
    },
    "snapshots": {
        "nothing": lambda t: None,
        "refcount of shared data 1": lambda t: t.refcount(t.host(FIRST), 1),
        "refcount of shared data 3": lambda t: t.refcount(t.host(FIRST), 3),
        "shared data with COPIED": lambda t: t.change(t.l2(FIRST), COPIED),
        "its data with COPIED": lambda t: t.change(t.snapshot_l2(), COPIED),
        "its data misaligned": lambda t: t.change(t.snapshot_l2(), 0x200),
        "its data at the end": lambda t: t.change(t.snapshot_l2(), to=t.end),
        "its data, bit 8": lambda t: t.change(t.snapshot_l2(), 0x100),
        "its preallocated cluster misaligned": lambda t: t.change(t.snapshot_l2(KEPT), 0x200),
        "its compressed data with COPIED": lambda t: t.change(t.snapshot_l2(PACKED), COPIED),
        "its L2 table misaligned": lambda t: t.change(t.snapshot_l1(), 0x200),
        "its L2 table without COPIED": lambda t: t.change(t.snapshot_l1(), COPIED),
        "its L1 entry, bit 56": lambda t: t.change(t.snapshot_l1(), 1 << 56),
        "its L1 table misaligned": lambda t: t.change(t.snapshot, 0x200),
        "its L1 table at the end": lambda t: t.put(t.snapshot, t.end),
        "its L1 table too long": lambda t: poke(t.path, t.snapshot + 8, b"\x10\0\0\0"),
        "one is gone": lambda t: poke(t.path, 60, b"\0\0\0\1"),
        "one more": lambda t: poke(t.path, 60, b"\0\0\0\3"),
        "their table misaligned": lambda t: t.change(64, 0x200),
        "their table at the end": lambda t: t.put(64, t.end),
        "too much extra data": lambda t: poke(t.path, t.snapshot + 36, b"\0\0\x10\0"),
        "less extra data": lambda t: poke(
            t.path, t.snapshot + 36, b"\0\0\0\x08" + bytes(SNAPSHOT_ENTRY.sizeof() - 40)
        ),
    },
    "bitmaps": {
        "nothing": lambda t: None,
        "autoclear bit 0 clear": lambda t: t.change(AUTOCLEAR_OFFSET, 1),
        "directory entry of an unknown type": lambda t: poke(t.path, t.bitmaps + 16, b"\7"),
        "directory entry, unknown flags": lambda t: poke(t.path, t.bitmaps + 12, b"\1"),
        "bitmap table misaligned": lambda t: t.change(t.bitmaps, 0x200),
        "bitmap table at the end": lambda t: t.put(t.bitmaps, t.end),
        "bitmap table in data": lambda t: t.put(t.bitmaps, t.host(FIRST)),
        "bitmap table of another size": lambda t: poke(t.path, t.bitmaps + 8, b"\0\0\0\5"),
        "bitmap data misaligned": lambda t: t.change(t.word(t.bitmaps), 0x200),
        "bitmap data at the end": lambda t: t.put(t.word(t.bitmaps), t.end),
        "bitmap data in data": lambda t: t.put(t.word(t.bitmaps), t.host(FIRST)),
        "bitmap table entry, bit 3": lambda t: t.change(t.word(t.bitmaps), 8),
        "refcount of bitmap data 0": lambda t: t.refcount(t.word(t.word(t.bitmaps)), 0),
        "refcount of the directory 2": lambda t: t.refcount(t.bitmaps, 2),
    },
}


def every_damage() -> Sequence[tuple[str, str]]:
    return [(image, damage) for image, damages in DAMAGES.items() for damage in damages]


def damaged(image: str, damage: str, folder: Path) -> Path:
    """Write an image of ``IMAGES`` into ``folder``, and damage it."""
    path = folder / "disk.qcow2"
    written = IMAGES[image].write(path)
    DAMAGES[image][damage](Target(path, written))
    return path
