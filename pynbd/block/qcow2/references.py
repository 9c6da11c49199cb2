"""The references to host clusters: who there is, counted from the tables themselves.

docs/interop/qcow2.rst, "Host cluster management": what is referenced are the header; the L1 tables
of the active layer and of the snapshots, their L2 tables and the clusters that these name; the
snapshot table; the bitmap directory, bitmap tables and bitmap data; refcount table and blocks.

1. What ``qemu-img check`` calls a corruption is one here, and is counted as often.
2. A reference that reaches past the end of the file by a cluster or more is a corruption, and
   counts for no cluster; the last cluster may be there in part. Files end with a sector.
3. L2 tables are looked at many at once, with numpy; long steps run in the pool.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pynbd.block.engine import HostFile
from pynbd.block.extent import Int64s
from pynbd.block.qcow2 import bitmaps, snapshots
from pynbd.block.qcow2.cache import read_table
from pynbd.block.qcow2.entries import Bools, UInt64s
from pynbd.block.qcow2.format import (
    BITMAP_TABLE_OFFSET_MASK,
    COPIED,
    L1E_OFFSET_MASK,
    L1E_RESERVED_MASK,
    L1E_SIZE,
    MAX_SNAPSHOT_L1_BYTES,
    Autoclear,
)
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.l2_tables import L2Entries, Tables, l2_tables
from pynbd.block.qcow2.recorded import Recorded
from pynbd.block.qcow2.report import Report
from pynbd.block.qcow2.snapshots import Snapshot
from pynbd.block.window import round_up
from pynbd.errors import ImageError

MAX_CLUSTERS = (1 << 31) - 1  # of an image file that is checked, as in QEMU

UInt32s = npt.NDArray[np.uint32]
_REFCOUNT_TABLE = "the refcount table"
_WIDEST = (1 << 32) - 1  # no cluster has more references

# No cluster has this number.
NOWHERE = 1 << 62

# So many numbers are collected before those that are the same are told.
_NEW_NUMBERS = 1 << 19

# So many L2 entries are looked at in the loop's own time, more of them in the pool.
_ENTRIES_IN_THE_LOOP = 1 << 14


class Named:
    """Numbers that entries name, and how often: each is in memory once, as tables may name the same
    ones, or be the same.
    """

    def __init__(self) -> None:
        self._numbers = np.zeros(0, np.int64)
        self._times = np.zeros(0, np.int64)
        self._new: list[Int64s] = []
        self._room = _NEW_NUMBERS

    def add(self, numbers: Int64s) -> None:
        self._new.append(numbers)
        self._room -= len(numbers) + 1
        if self._room < 0:
            self.distinct()

    def distinct(self) -> tuple[Int64s, Int64s]:
        """The numbers in ascending order, and how often each was named."""
        every = np.concatenate((self._numbers, *self._new))
        added = np.ones(len(every) - len(self._numbers), np.int64)
        times = np.concatenate((self._times, added))
        self._numbers, places = np.unique(every, return_inverse=True)
        self._times = np.zeros(len(self._numbers), np.int64)
        np.add.at(self._times, places, times)
        self._new, self._room = [], _NEW_NUMBERS + len(self._numbers)
        return self._numbers, self._times


class References:
    """The references to each host cluster of ``file``, and what was found while they were counted.

    ``counts`` has an element for each cluster, and one to spare: a misaligned cluster at the end of
    the file may touch the next. ``clusters``: how many of them are there. For a repair there is
    more: ``recorded``, the refcounts on disk; ``layers``, (host offset, entries) of all L1 tables,
    the active one first; ``tables``, the host offsets of all L2 tables, as often as they are named;
    ``beyond``, the numbers of clusters that are named, and are past the end of the file;
    ``hidden``: there may be references that were not found, as a table or a cluster is not where an
    entry says; ``cut_off_from``: the number of the first cluster of the tables, other than that of
    the refcounts, that go on past the end of the file, `NOWHERE` if none does: what is put behind
    it would be taken for entries; ``copied_wrong``, how many of the corruptions are COPIED flags of
    the active layer; ``snapshots``, and whether entries of their table are ``incomplete``;
    ``nameless``, whether L1 entries have bits set, but no offset. For QEMU the header is their L2
    table, and so it is here ``as_qemu``.
    """

    def __init__(
        self,
        file: HostFile,
        header: Header,
        recorded: Recorded,
        report: Report,
        *,
        as_qemu: bool = True,
    ) -> None:
        self.file_size = round_up(file.size())
        self.clusters = -(-self.file_size >> header.cluster_bits)
        if self.clusters > MAX_CLUSTERS:
            raise ImageError(f"{file.path}: it has {self.clusters} clusters: too many to check")
        self.counts = np.zeros(self.clusters + 1, np.uint32)
        self.most = (1 << header.refcount_bits) - 1
        self.layers: list[tuple[int, int]] = []
        self.tables = Named()
        self.beyond = Named()
        self.hidden = False
        self.cut_off_from = NOWHERE
        self.copied_wrong = 0
        self.nameless = False
        self.snapshots: list[Snapshot] = []
        self.incomplete = False
        self._as_qemu = as_qemu
        self._file = file
        self._header = header
        self.recorded = recorded
        self._report = report

    async def count(self) -> None:
        """Count all of them. Raises `CorruptImage` where bitmaps or snapshots cannot be found."""
        header = self._header
        self._add_metadata(0, header.cluster_size, "the header")
        await self._count_layer(header.l1_table_offset, header.l1_size, "L1 table", active=True)
        await self._count_snapshots()
        length = header.refcount_table_clusters * header.cluster_size
        self._add_metadata(header.refcount_table_offset, length, _REFCOUNT_TABLE)
        await self._count_bitmaps()
        self._count_blocks()

    def true_counts(self, first: int, last: int) -> UInt32s:
        """What the refcounts of clusters [first, last) have to be, or the most that they can."""
        counts = self.counts[first:last]
        return counts if self.most > _WIDEST else np.minimum(counts, np.uint32(self.most))

    def tell_overflow(self, first: int, last: int) -> None:
        """Tell of references to clusters [first, last) that no refcount of the image can count."""
        if self.most > _WIDEST:
            return
        over = np.flatnonzero(self.counts[first:last] > self.most) + first
        lines = (
            f"cluster {cluster} has {self.counts[cluster]} references;"
            f" a refcount of this image can be {self.most} at most"
            for cluster in over.tolist()
        )
        total = int(self.counts[over].sum(dtype=np.int64)) - len(over) * self.most
        self._report.corrupt(total, lines)

    def wrong_copied_in_l1(self, l1: UInt64s) -> Bools:
        """Of entries of the active L1 table: whose COPIED contradicts the refcount on disk."""
        places = l1 & np.uint64(L1E_OFFSET_MASK)
        wrong: Bools = self.recorded.contradict(places, l1 & COPIED != 0) & (places != 0)
        return wrong

    def wrong_copied(self, tables: Tables, entries: L2Entries) -> Bools:
        """The same of ``entries`` of some of its L2 tables."""
        wrong: Bools = ~entries.copied  # in a data file COPIED is always set
        if not self._header.has_data_file:
            wrong = self.recorded.contradict(entries.offset, entries.copied)
        # QEMU leaves tables in the first cluster alone, and those with an unknown refcount.
        looked_at = self.recorded.known(tables.offsets) & (tables.offsets != 0)
        wrong &= entries.allocated & looked_at[entries.table]
        return wrong

    def _add_metadata(self, offset: int, length: int, what: str) -> None:
        if not length:
            return
        size, bits = self._header.cluster_size, self._header.cluster_bits
        missing = offset + length - self.file_size
        self.hidden |= missing > 0
        if missing >= size:
            self._report.corrupt(1, [self._tell_beyond(what, offset)])
            if what != _REFCOUNT_TABLE:
                self.cut_off_from = min(self.cut_off_from, offset >> bits)
            return
        first, last = offset >> bits, (offset + length - 1) >> bits
        self.counts[first : last + 1] += np.uint32(1)
        self.clusters = max(self.clusters, last + 1)

    def _tell_beyond(self, what: str, offset: int) -> str:
        return f"{what} at {offset:#x} is past the end of the file, {self.file_size:#x}"

    def _add(self, offsets: Int64s, lengths: Int64s | int, what: str) -> None:
        """Count many ranges of host bytes."""
        bits = self._header.cluster_bits
        inside = offsets + lengths - self.file_size < self._header.cluster_size
        if not inside.all():
            beyond = offsets[~inside]
            self._report.corrupt(
                len(beyond), (self._tell_beyond(what, offset) for offset in beyond.tolist())
            )
            self.hidden = True
            self.beyond.add(beyond >> bits)
            self.beyond.add((beyond >> bits) + 1)
            offsets = offsets[inside]
            lengths = lengths if isinstance(lengths, int) else lengths[inside]
        if not len(offsets):
            return
        first, last = offsets >> bits, (offsets + lengths - 1) >> bits
        self.clusters = max(self.clusters, int(last.max()) + 1)
        one = np.uint32(1)
        np.add.at(self.counts, first, one)
        for more in range(1, int((last - first).max()) + 1):
            np.add.at(self.counts, (first + more)[first + more <= last], one)

    async def _count_layer(self, offset: int, entries: int, name: str, *, active: bool) -> None:
        """An L1 table, what it names, and what that names."""
        if not entries:
            return
        self.layers.append((offset, entries))
        self._add_metadata(offset, entries * L1E_SIZE, f"the {name}")
        table = await read_table(self._file, offset, entries)
        named = np.flatnonzero(table)
        names = np.flatnonzero(table & np.uint64(L1E_OFFSET_MASK))
        if len(names) < len(named):
            self.nameless = True
            named = named if self._as_qemu else names
        l1 = table[named]
        places = l1 & np.uint64(L1E_OFFSET_MASK)
        self.tables.add(places.view(np.int64))

        def told(broken: Bools, rule: str) -> None:
            rows = np.flatnonzero(broken)
            self._report.corrupt(
                len(rows), (f"{name}: entry {named[n]}, {l1[n]:#018x}: {rule}" for n in rows)
            )

        told(l1 & np.uint64(L1E_RESERVED_MASK) != 0, "reserved bits are set")
        misaligned = places & (self._header.cluster_size - 1) != 0
        told(misaligned, "the L2 table is not aligned to a cluster")
        ends = places + np.uint64(self._header.cluster_size)
        self.hidden |= bool((misaligned | (ends > self.file_size)).any())
        self._add(places.view(np.int64), self._header.cluster_size, f"{name}: the L2 table")
        if active:
            wrong = self.wrong_copied_in_l1(l1)
            self.copied_wrong += int(np.count_nonzero(wrong))
            told(wrong, "COPIED contradicts the refcount of the L2 table")
        async for tables in l2_tables(self._file, self._header, l1):
            if len(tables.words) > _ENTRIES_IN_THE_LOOP:
                await self._file.engine.run(self._count_tables, tables, name, active)
            else:
                self._count_tables(tables, name, active)

    def _count_tables(self, tables: Tables, name: str, active: bool) -> None:
        header, report = self._header, self._report
        entries = L2Entries(tables, header.layout)
        if not len(entries.index):
            return

        def told(broken: Bools, rule: str) -> None:
            if count := int(np.count_nonzero(broken)):
                places = entries.places(broken)
                lines = (f"{name}: L2 entry {e:#018x} at {at:#x}: {rule}" for e, at in places)
                report.corrupt(count, lines)

        for broken, rule in entries.corruptions():
            told(broken, rule)
        allocated = entries.allocated
        if not header.has_data_file:
            self.hidden |= bool(entries.misaligned().any())
            places = entries.offset[allocated].view(np.int64)
            self._add(places, header.cluster_size, f"{name}: the cluster")
            self._add(*entries.compressed_ranges(), f"{name}: the compressed cluster")
        if active:
            wrong = self.wrong_copied(tables, entries)
            self.copied_wrong += int(np.count_nonzero(wrong))
            told(wrong, "COPIED contradicts the refcount of its cluster")
            self._count_fragments(entries)

    def _count_fragments(self, entries: L2Entries) -> None:
        report = self._report
        if not self._header.has_data_file:
            compressed = len(entries.compressed_ranges()[0])
            report.compressed_clusters += compressed
            report.fragmented_clusters += compressed
            report.allocated_clusters += compressed
        places, table = entries.offset[entries.allocated], entries.table[entries.allocated]
        report.allocated_clusters += len(places)
        apart = places[1:] != places[:-1] + np.uint64(self._header.cluster_size)
        report.fragmented_clusters += int(np.count_nonzero(apart & (table[1:] == table[:-1])))

    async def _count_snapshots(self) -> None:
        header, report = self._header, self._report
        if not header.nb_snapshots:
            return
        self.snapshots = await snapshots.load(self._file, header, padded=True)
        for number, one in enumerate(self.snapshots):
            name = f"{one}: L1 table"
            if header.version >= 3 and len(one.extra) < snapshots.EXTRA_V3:
                line = f"snapshot table entry {number}: it has {len(one.extra)} bytes of extra data"
                report.corrupt(1, [f"{line}; version 3 demands {snapshots.EXTRA_V3}"])
                self.incomplete = True
            if one.l1_table_offset % header.cluster_size:
                report.corrupt(1, [f"{name} at {one.l1_table_offset:#x}: it is not aligned"])
                self.hidden = True
            elif one.l1_size * L1E_SIZE > MAX_SNAPSHOT_L1_BYTES:
                report.corrupt(1, [f"{name}: {one.l1_size} entries are too many"])
                self.hidden = True
            else:
                await self._count_layer(one.l1_table_offset, one.l1_size, name, active=False)
        length = snapshots.table_length(self.snapshots)
        self._add_metadata(header.snapshots_offset, length, "the snapshot table")

    async def _count_bitmaps(self) -> None:
        extension = self._header.bitmaps
        if extension is None or Autoclear.BITMAPS not in self._header.autoclear:
            return
        self._add_metadata(
            extension.directory_offset, extension.directory_size, "the bitmap directory"
        )
        async for table, entries in bitmaps.tables(self._file, self._header):
            self._add_metadata(table.offset, table.size * 8, f"{table.where}: the bitmap table")
            places = entries & np.uint64(BITMAP_TABLE_OFFSET_MASK)
            places = places[places != 0]
            self._add(places.view(np.int64), self._header.cluster_size, f"{table.where}: its data")

    def _count_blocks(self) -> None:
        """The refcount blocks; they come last, as nobody else may refer to them."""
        recorded, report = self.recorded, self._report
        for index, problem in recorded.bad_entries(self.clusters).items():
            report.corrupt(1, [f"refcount table entry {index}: {problem}"])
        indexes = recorded.good_entries(self.clusters)
        blocks = (recorded.blocks >> self._header.cluster_bits)[indexes]
        others = self.counts[blocks] != 0
        _, first_of_each = np.unique(blocks, return_index=True)
        again = np.ones(len(blocks), np.bool_)
        again[first_of_each] = False
        shared = (others | again) & (self.most > 1)
        others |= blocks >= self.cut_off_from
        np.add.at(self.counts, blocks, np.uint32(1))
        rows = indexes[shared].tolist()
        recorded.shared.update(indexes[others | again].tolist())
        report.corrupt(
            len(rows),
            (
                f"refcount block {index} at {int(recorded.blocks[index]):#x}: its cluster has other"
                " references"
                for index in rows
            ),
        )
