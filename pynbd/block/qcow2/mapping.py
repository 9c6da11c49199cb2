"""The mapping of one image: guest range to runs, from the active L1 table or a snapshot's.

docs/interop/qcow2.rst, "Cluster mapping". One step is bounded: it loads at most `TABLES_PER_STEP`
L2 tables and looks at `GRANULES_PER_STEP` entries, whatever was asked for, and so never holds the
loop for long. Ranges that the L1 table leaves out cost nothing.
"""

from __future__ import annotations

import logging

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.extent import CORRUPT, UNALLOCATED, Runs, concatenate
from pynbd.block.qcow2 import entries
from pynbd.block.qcow2.cache import TableCache
from pynbd.block.qcow2.entries import Layout, UInt64s
from pynbd.block.qcow2.format import L1E_OFFSET_MASK, SUBCLUSTERS
from pynbd.errors import CorruptImage

log = logging.getLogger("pynbd")

TABLES_PER_STEP = 32
# Clusters, or subclusters of extended L2 entries: about two milliseconds' worth.
GRANULES_PER_STEP = 1 << 18
L1_ENTRIES_PER_STEP = 1 << 16
# Damaged places are told once each, and not more of them than this.
_CORRUPT_PLACES_TOLD = 100


class Mapping:
    """What the L1 table ``l1`` and the L2 tables in ``file`` say. ``name`` is for the log."""

    def __init__(self, file: HostFile, l1: UInt64s, layout: Layout, *, name: str) -> None:
        self.l1 = l1
        self.layout = layout
        self.tables = TableCache(file, layout.cluster_size)
        self._name = name
        self._span = layout.cluster_size * layout.l2_entries  # guest bytes of one L2 table
        self._clusters_per_step = GRANULES_PER_STEP // (SUBCLUSTERS if layout.extended else 1)
        self._told: set[int] = set()

    async def runs(self, offset: int, length: int) -> Runs:
        """The runs of ``length`` guest bytes (> 0), or of fewer."""
        end = offset + length
        first = offset // self._span
        last = min(-(-end // self._span), first + L1_ENTRIES_PER_STEP)
        # An index past the end of the L1 table is unallocated, as an entry of zero is.
        named = np.flatnonzero(self.l1[first:last] & np.uint64(L1E_OFFSET_MASK)) + first
        pieces: list[Runs] = []
        at = offset
        clusters = self._clusters_per_step
        for index in named[:TABLES_PER_STEP].tolist():
            start = max(index * self._span, at)
            if start > at:
                pieces.append(Runs.single(at, start - at, UNALLOCATED))
            stop = min((index + 1) * self._span, end)
            piece = await self._table_runs(index, start, stop, clusters)
            pieces.append(piece)
            at = piece.end
            clusters -= (at - start) >> self.layout.cluster_bits
            if at < stop or clusters <= 0:
                break
        else:
            if len(named) > TABLES_PER_STEP:
                end = int(named[TABLES_PER_STEP]) * self._span
            end = min(end, last * self._span)
            if at < end:
                pieces.append(Runs.single(at, end - at, UNALLOCATED))
        return concatenate(pieces)

    async def _table_runs(self, index: int, start: int, stop: int, clusters: int) -> Runs:
        """Runs of [start, stop), all of one L2 table, or of the first ``clusters`` of them."""
        base = index * self._span
        try:
            host_offset = entries.l2_table_offset(int(self.l1[index]), self.layout)
        except CorruptImage as error:
            self._tell(base, str(error))
            return Runs.single(start, stop - start, CORRUPT)
        table = await self.tables.load(host_offset)
        bits = self.layout.cluster_bits
        first = (start - base) >> bits
        count = min(((stop - base - 1) >> bits) + 1 - first, clusters)
        runs = entries.decode(table, first, count, self.layout, base + (first << bits))
        for guest_offset in runs.starts[runs.kind == CORRUPT].tolist():
            row = ((guest_offset - base) >> bits) * self.layout.entry_words
            bitmap = int(table[row + 1]) if self.layout.extended else 0
            self._tell(
                guest_offset, entries.explain(int(table[row]), bitmap, self.layout, guest_offset)
            )
        return runs.since(start).clip(stop)

    def _tell(self, guest_offset: int, problem: str) -> None:
        if guest_offset not in self._told and len(self._told) < _CORRUPT_PLACES_TOLD:
            self._told.add(guest_offset)
            log.error("%s: guest offset %#x: %s", self._name, guest_offset, problem)
