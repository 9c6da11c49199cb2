"""L1 and L2 entries: from bits to runs and back (pure).

docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries". `decode` turns a stretch of an
L2 table into runs, all entries at once. Like QEMU it ignores reserved bits. An entry that breaks a
rule becomes a run of kind CORRUPT, so that only the requests which touch it fail, and `explain`
says which rule; both ask `_violations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pynbd.block import extent
from pynbd.block.extent import NO_HOST, Int64s, Runs
from pynbd.block.qcow2.format import (
    COMPRESSED,
    COPIED,
    L1E_OFFSET_MASK,
    L2E_DESCRIPTOR_MASK,
    L2E_OFFSET_MASK,
    SECTOR,
    SUBCLUSTERS,
    ZERO,
)
from pynbd.errors import CorruptImage

UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_ALL = (1 << SUBCLUSTERS) - 1  # the bits of all subclusters, in one half of an entry's bitmap


@dataclass(frozen=True, slots=True)
class Layout:
    """What the header says about L2 tables.

    ``extended``: entries are 128 bits long. ``data_file``: guest clusters are in an external data
    file.
    """

    cluster_bits: int
    extended: bool = False
    version: int = 3
    data_file: bool = False

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entry_words(self) -> int:
        """64-bit words of an L2 entry."""
        return 2 if self.extended else 1

    @property
    def l2_bits(self) -> int:
        """Of a guest cluster's number: how many low bits index its L2 table."""
        return self.cluster_bits - (4 if self.extended else 3)

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which is one cluster long."""
        return 1 << self.l2_bits


# L2 entry, standard cluster descriptor:
#
#     63      62          61-56     55-9              8-1       0
#     COPIED  COMPRESSED  reserved  host offset >> 9  reserved  ZERO (version 3, not extended)
#
# Second word of an extended L2 entry (of no meaning for a compressed cluster):
#
#     63-32                                31-0
#     subcluster n - 32 reads as zeroes    subcluster n is allocated
#
# Compressed cluster descriptor, x = 62 - (cluster_bits - 8):
#
#     63  62  61-x                           x-1 - 0
#     0   1   sectors after the first one    host offset in bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Entries, column by column: their words and what follows from them alone."""

    words: UInt64s
    bitmaps: UInt64s | None  # the second words, with extended L2
    guest: Int64s  # guest offsets
    offset: UInt64s
    compressed: Bools
    zero: Bools  # the flag in bit 0
    allocated: Bools  # names a host cluster

    @classmethod
    def of(cls, words: UInt64s, bitmaps: UInt64s | None, guest: Int64s, layout: Layout) -> _Entries:
        offset = words & np.uint64(L2E_OFFSET_MASK)
        compressed = words & COMPRESSED != 0
        standard = ~compressed
        zero = np.zeros_like(compressed) if layout.extended else (words & ZERO != 0) & standard
        allocated = offset != 0
        if layout.data_file:
            # "The offset may only be 0 with bit 63 set [...] when an external data file is used."
            allocated |= (words & COPIED != 0) & ~zero
        return cls(words, bitmaps, guest, offset, compressed, zero, allocated & standard)


def _violations(entries: _Entries, layout: Layout) -> Iterator[tuple[Bools, str]]:
    """For each rule: which entries break it, and what to say of them."""
    yield (
        entries.allocated & (entries.offset & (layout.cluster_size - 1) != 0),
        "the host cluster offset is not aligned to a cluster",
    )
    if layout.version < 3:
        yield entries.zero, "the zero flag is set in an image of version 2"
    if layout.data_file:
        yield entries.compressed, "a compressed cluster in an image with an external data file"
        yield (
            entries.allocated & (entries.offset != entries.guest.view(np.uint64)),
            "the offset in the external data file differs from the guest offset",
        )
    if entries.bitmaps is not None:
        both = entries.bitmaps & entries.bitmaps >> SUBCLUSTERS & _ALL != 0
        yield both & entries.allocated, "a subcluster is both allocated and zero"
        dangling = (entries.bitmaps & _ALL != 0) & ~entries.allocated & ~entries.compressed
        yield dangling, "a subcluster is allocated in a cluster that has no host offset"


def explain(entry: int, bitmap: int, layout: Layout, guest_offset: int) -> str:
    """What is wrong with the L2 entry of the cluster at ``guest_offset``, "" if nothing is.

    A line for the log, which does not repeat the offset. ``bitmap``: the entry's second word with
    extended L2, else 0.
    """
    words = np.array([entry], np.uint64)
    bitmaps = np.array([bitmap], np.uint64) if layout.extended else None
    entries = _Entries.of(words, bitmaps, np.array([guest_offset], np.int64), layout)
    for broken, rule in _violations(entries, layout):
        if broken[0]:
            return f"L2 entry {entry:#018x}: {rule}"
    return ""


def decode(table: UInt64s, first: int, count: int, layout: Layout, guest_offset: int) -> Runs:
    """The runs of ``count`` clusters (1 or more) from entry ``first`` of ``table``.

    ``table``: one L2 table, or several that follow one another in the guest, in native byte order.
    ``guest_offset``: where the first of the clusters begins. A preallocated ZERO run has its host
    offset. Neighbours are merged as `Runs.coalesced` does, so a COMPRESSED run is one cluster, or
    several with the same data each.
    """
    words = table[first * layout.entry_words : (first + count) * layout.entry_words]
    bitmaps = None
    if layout.extended:
        words, bitmaps = words[::2], words[1::2]
    starts = _uniform(words, bitmaps, layout)
    guest = (starts << layout.cluster_bits) + np.int64(guest_offset)
    rows = None if bitmaps is None else bitmaps[starts]
    entries = _Entries.of(words[starts], rows, guest, layout)
    corrupt = np.zeros(len(starts), np.bool_)
    for broken, _ in _violations(entries, layout):
        corrupt |= broken

    offset, has_host = entries.offset.view(np.int64), entries.allocated
    if entries.bitmaps is None:
        compressed, zero, data = entries.compressed, entries.zero, entries.allocated
        descriptor = entries.words
    else:
        # Within each entry: one run from each subcluster that differs from the one before it.
        bits = np.where(entries.compressed | corrupt, 0, entries.bitmaps)
        row, subcluster = _subcluster_runs(bits)
        moved = subcluster * (layout.cluster_size // SUBCLUSTERS)
        bits = bits[row] >> subcluster.view(np.uint64)
        compressed, corrupt, has_host = entries.compressed[row], corrupt[row], has_host[row]
        guest, offset, descriptor = guest[row] + moved, offset[row] + moved, entries.words[row]
        data, zero = bits & 1 != 0, bits & (1 << SUBCLUSTERS) != 0

    # The later line wins: ZERO over DATA, as the flag is set on a cluster that is still allocated.
    kind = np.where(data, np.uint8(extent.DATA), np.uint8(extent.UNALLOCATED))
    kind[zero] = extent.ZERO
    kind[compressed] = extent.COMPRESSED
    kind[corrupt] = extent.CORRUPT
    host = np.where(has_host & (data | zero) & ~corrupt, offset, NO_HOST)
    host = np.where(compressed & ~corrupt, (descriptor & L2E_DESCRIPTOR_MASK).view(np.int64), host)

    ends = np.append(guest[1:], guest_offset + (count << layout.cluster_bits))
    depth = (kind != extent.UNALLOCATED).astype(np.int16)
    return Runs(guest_offset, ends, kind, host, depth).coalesced()


def _uniform(words: UInt64s, bitmaps: UInt64s | None, layout: Layout) -> Int64s:
    """Indexes at which stretches of like entries begin, found by comparing neighbours only.

    Alike are entries without host offset that are equal, and entries whose host offset goes on
    with the next cluster. What else is to be merged is left to the end, when few runs are left.
    """
    step = words[1:] - words[:-1]
    # Offset 0 is a place in a data file, and then has COPIED.
    place = L2E_OFFSET_MASK | COMPRESSED | (COPIED if layout.data_file else 0)
    somewhere = words & place != 0
    # Bit 55 carries into reserved bits: the next offset is 0 then, and the entries are not alike.
    alike = np.where(somewhere[:-1] & somewhere[1:], step == layout.cluster_size, step == 0)
    alike &= (words[1:] | words[:-1]) & COMPRESSED == 0
    if bitmaps is not None:
        left = bitmaps[:-1]
        whole = (left == 0) | (left == _ALL) | (left == _ALL << SUBCLUSTERS)
        alike &= whole & (left == bitmaps[1:])
    return np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~alike) + 1))


def _subcluster_runs(bitmaps: UInt64s) -> tuple[Int64s, Int64s]:
    """(row, first subcluster) of each run of subclusters with equal bits, in ascending order."""
    changes = bitmaps ^ bitmaps >> 1
    changes = (changes | changes >> SUBCLUSTERS) & (_ALL >> 1) | 1 << (SUBCLUSTERS - 1)
    last = np.flatnonzero(np.unpackbits(changes.astype("<u4").view(np.uint8), bitorder="little"))
    first = np.concatenate((np.zeros(1, np.int64), last[:-1] + 1))
    return first // SUBCLUSTERS, first % SUBCLUSTERS


def l2_table_offset(l1_entry: int, layout: Layout) -> int:
    """Host offset of the L2 table that ``l1_entry`` names, 0 if none is allocated.

    Raises `CorruptImage`, whose text does not name the file, if it is not aligned to a cluster.
    """
    # L1 entry:  63 COPIED | 62-56 reserved | 55-9 host offset >> 9 | 8-0 reserved
    offset = l1_entry & L1E_OFFSET_MASK
    if offset % layout.cluster_size:
        raise CorruptImage(f"L1 entry {l1_entry:#018x}: the L2 table is not aligned to a cluster")
    return offset


def compressed_range(descriptor: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, length) in bytes of a compressed cluster's data, up to the end of its last
    sector.

    The data may end anywhere in the last sector. Bits 62 and 63 of ``descriptor`` are ignored.
    """
    x = 62 - (cluster_bits - 8)
    descriptor &= L2E_DESCRIPTOR_MASK
    offset = descriptor & (1 << x) - 1
    return offset, ((descriptor >> x) + 1) * SECTOR - offset % SECTOR


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster of ``length`` bytes that begin at host ``offset``."""
    x = 62 - (cluster_bits - 8)
    more_sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | more_sectors << x | offset
