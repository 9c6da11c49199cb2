"""The mapping of one image: guest range to runs, from the active L1 table or a snapshot's.

docs/interop/qcow2.rst, "Cluster mapping". One step is bounded: it loads at most `TABLES_PER_STEP`
L2 tables and looks at `GRANULES_PER_STEP` entries, whatever was asked for, and so never holds the
loop for long. Ranges that the L1 table leaves out cost nothing.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.extent import CORRUPT, UNALLOCATED, Runs, concatenate
from pynbd.block.qcow2 import entries
from pynbd.block.qcow2.cache import TableCache
from pynbd.block.qcow2.damage import DamageLog
from pynbd.block.qcow2.entries import Layout, UInt64s
from pynbd.block.qcow2.format import L1E_OFFSET_MASK, SUBCLUSTERS
from pynbd.errors import CorruptImage

# One step ends soon after the first of these: about two milliseconds' worth. A granule is a
# cluster, or a subcluster with extended L2 entries.
TABLES_PER_STEP = 32
GRANULES_PER_STEP = 1 << 17
RUNS_PER_STEP = 1 << 15
L1_ENTRIES_PER_STEP = 1 << 16


class Mapping:
    """What the L1 table ``l1`` and the L2 tables in ``file`` say."""

    def __init__(self, file: HostFile, l1: UInt64s, layout: Layout, damage: DamageLog) -> None:
        self.l1 = l1
        self.layout = layout
        self.tables = TableCache(file, layout.cluster_size)
        self._damage = damage
        self._span = layout.cluster_size * layout.l2_entries  # guest bytes of one L2 table
        granules = SUBCLUSTERS if layout.extended else 1
        self._clusters_at_once = RUNS_PER_STEP // granules
        self._reach = GRANULES_PER_STEP // granules << layout.cluster_bits

    async def runs(self, offset: int, length: int) -> Runs:
        """The runs of ``length`` guest bytes (> 0), or of fewer."""
        end = offset + length
        first = offset // self._span
        last = min(-(-end // self._span), first + L1_ENTRIES_PER_STEP)
        # An index past the end of the L1 table is unallocated, as an entry of zero is.
        named = np.flatnonzero(self.l1[first:last] & np.uint64(L1E_OFFSET_MASK)) + first
        pieces: list[Runs] = []
        at, found, enough = offset, 0, offset + self._reach
        for index in named[:TABLES_PER_STEP].tolist():
            if index * self._span > at:
                pieces.append(Runs.single(at, index * self._span - at, UNALLOCATED))
                at = index * self._span
            stop = min((index + 1) * self._span, end)
            while at < stop:
                if found >= RUNS_PER_STEP or at >= enough:
                    return concatenate(pieces)
                piece = await self._table_runs(index, at, stop)
                pieces.append(piece)
                at, found = piece.end, found + len(piece)
        unnamed = named[TABLES_PER_STEP] if len(named) > TABLES_PER_STEP else last
        end = min(int(unnamed) * self._span, end)
        if at < end:
            pieces.append(Runs.single(at, end - at, UNALLOCATED))
        return concatenate(pieces)

    async def _table_runs(self, index: int, start: int, stop: int) -> Runs:
        """Runs of [start, stop), all of one L2 table, or of the first of them."""
        base = index * self._span
        try:
            host_offset = entries.l2_table_offset(int(self.l1[index]), self.layout)
        except CorruptImage as error:
            self._damage.tell(base, partial(str, error))
            return Runs.single(start, stop - start, CORRUPT)
        table = await self.tables.load(host_offset)
        bits = self.layout.cluster_bits
        first = (start - base) >> bits
        count = min(((stop - base - 1) >> bits) + 1 - first, self._clusters_at_once)
        runs = entries.decode(table, first, count, self.layout, base + (first << bits))
        for guest_offset in runs.starts[runs.kind == CORRUPT].tolist():
            self._damage.tell(guest_offset, partial(self._explain, table, guest_offset))
        return runs.since(start).clip(stop)

    def _explain(self, table: UInt64s, guest_offset: int) -> str:
        row = (guest_offset % self._span >> self.layout.cluster_bits) * self.layout.entry_words
        bitmap = int(table[row + 1]) if self.layout.extended else 0
        return entries.explain(int(table[row]), bitmap, self.layout, guest_offset)
