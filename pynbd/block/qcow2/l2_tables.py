"""L2 tables as a check looks at them: many at once, all their entries as columns.

docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries". `pynbd.block.qcow2.entries`
decodes for those who read the disk; here every entry is judged by itself, and its place is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.extent import Int64s
from pynbd.block.qcow2.entries import Bools, Layout, UInt64s
from pynbd.block.qcow2.format import (
    COMPRESSED,
    COPIED,
    L1E_OFFSET_MASK,
    L2E_OFFSET_MASK,
    L2E_RESERVED_MASK,
    SECTOR,
    SUBCLUSTERS,
    ZERO,
)
from pynbd.block.qcow2.header import Header

# One step looks at this many entries, or at one table.
_ENTRIES_PER_STEP = 1 << 16
_TABLES_PER_STEP = 256

_ALL = (1 << SUBCLUSTERS) - 1


@dataclass(frozen=True, slots=True)
class Tables:
    """L2 tables that are looked at together: their places, and their words one behind the other."""

    offsets: UInt64s
    words: UInt64s  # in native byte order; extended entries have two each


async def l2_tables(file: HostFile, header: Header, l1: UInt64s) -> AsyncIterator[Tables]:
    """The L2 tables that the entries of ``l1`` name, which are not 0, in this order.

    Past the end of the file they read as zeroes, wherever that is.
    """
    size = header.cluster_size
    offsets = l1 & np.uint64(L1E_OFFSET_MASK)
    at_once = min(max(_ENTRIES_PER_STEP // header.layout.l2_entries, 1), _TABLES_PER_STEP)
    for first in range(0, len(offsets), at_once):
        some = offsets[first : first + at_once]
        data = bytearray(len(some) * size)
        with memoryview(data) as view:
            for number, offset in enumerate(some.tolist()):
                await file.read(view[number * size : (number + 1) * size], offset)
        yield Tables(some, np.frombuffer(data, ">u8").astype(np.uint64))
        await asyncio.sleep(0)


class L2Entries:
    """The entries of some L2 tables that are not zero, column by column."""

    def __init__(self, tables: Tables, layout: Layout) -> None:
        words, bitmaps = tables.words, None
        if layout.extended:
            words, bitmaps = words[::2], words[1::2]
        self.index = np.flatnonzero(words if bitmaps is None else words | bitmaps)
        self.words = words[self.index]
        self.table = self.index >> layout.l2_bits  # which one, in the order of ``tables``
        # Subclusters: bits that say zero, bits that say allocated. None without extended entries.
        self.bitmaps = None if bitmaps is None else bitmaps[self.index]
        self.offset = self.words & np.uint64(L2E_OFFSET_MASK)
        self.compressed: Bools = self.words & COMPRESSED != 0
        self.zero_flag: Bools = np.zeros_like(self.compressed)
        if not layout.extended:
            self.zero_flag = self.words & ZERO != 0
        somewhere = self.offset != 0
        if layout.data_file:  # offset 0 is a place in a data file, and then has COPIED
            somewhere |= (self.words & COPIED != 0) & ~self.zero_flag
        self.allocated: Bools = somewhere & ~self.compressed
        self.copied: Bools = self.words & COPIED != 0
        self._tables = tables
        self._layout = layout

    def places(self, chosen: Bools) -> Iterator[tuple[int, int]]:
        """(entry, its host offset) of those that are ``chosen``."""
        size = self._layout.entry_words * 8
        for row in np.flatnonzero(chosen).tolist():
            inside = int(self.index[row]) % self._layout.l2_entries * size
            yield int(self.words[row]), int(self._tables.offsets[self.table[row]]) + inside

    def misaligned(self) -> Bools:
        off: Bools = self.offset & (self._layout.cluster_size - 1) != 0
        return self.allocated & off

    def without_data(self) -> Bools:
        """Which of them have no data in their cluster: it is only preallocated."""
        if self.bitmaps is None:
            return self.zero_flag
        nothing: Bools = self.bitmaps & _ALL == 0
        return nothing

    def corruptions(self) -> Iterator[tuple[Bools, str]]:
        """For each rule: which entries break it, and what to say of them."""
        yield ~self.compressed & (self.words & L2E_RESERVED_MASK != 0), "reserved bits are set"
        yield self.compressed & self.copied, "COPIED is set, of a compressed cluster"
        if self._layout.data_file:
            yield self.compressed, "a compressed cluster, in an image with an external data file"
        elif self.bitmaps is not None:
            rule = "a compressed cluster has a subcluster bitmap"
            yield self.compressed & (self.bitmaps != 0), rule
        if self.bitmaps is not None:
            both = self.bitmaps & self.bitmaps >> SUBCLUSTERS & _ALL != 0
            yield self.allocated & both, "a subcluster is both allocated and zero"
            nowhere = ~self.allocated & ~self.compressed & (self.bitmaps & _ALL != 0)
            yield nowhere, "a subcluster is allocated in a cluster that has no host offset"
        yield self.misaligned(), "the host cluster offset is not aligned to a cluster"

    def compressed_ranges(self) -> tuple[Int64s, Int64s]:
        """(host offsets, lengths) of compressed clusters whose entries obey the rules."""
        chosen = self.compressed
        if self.bitmaps is not None:
            chosen = chosen & (self.bitmaps == 0)
        x = 62 - (self._layout.cluster_bits - 8)
        descriptor = self.words[chosen].view(np.int64) & (COMPRESSED - 1)
        offset = descriptor & (1 << x) - 1
        return offset, ((descriptor >> x) + 1) * SECTOR - offset % SECTOR
