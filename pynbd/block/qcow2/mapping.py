"""The mapping of one image: guest range to runs, from the active L1 table or a snapshot's.

docs/interop/qcow2.rst, "Cluster mapping". One step is bounded, whatever was asked for: it loads at
most `TABLES_PER_STEP` L2 tables of about `GRANULES_PER_STEP` entries together, and so never holds
the loop for long. Neighbouring tables are decoded as one, because small tables are many. Ranges
that the L1 table leaves out cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from pynbd.block.engine import HostFile
from pynbd.block.extent import CORRUPT, UNALLOCATED, Runs, concatenate
from pynbd.block.limits import Budget
from pynbd.block.qcow2 import entries
from pynbd.block.qcow2.cache import TableCache
from pynbd.block.qcow2.damage import DamageLog
from pynbd.block.qcow2.entries import Layout, UInt64s
from pynbd.block.qcow2.format import L1E_OFFSET_MASK, SUBCLUSTERS
from pynbd.errors import CorruptImage

# One step ends with the first of these: about two milliseconds' worth. A granule is a cluster, or a
# subcluster with extended L2 entries.
TABLES_PER_STEP = 256
GRANULES_PER_STEP = 1 << 17
RUNS_PER_STEP = 1 << 15
L1_ENTRIES_PER_STEP = 1 << 16

IndexArray = npt.NDArray[np.intp]


class Mapping:
    """What the L1 table ``l1`` and the L2 tables in ``file`` say; ``memory`` is for these."""

    def __init__(
        self, file: HostFile, l1: UInt64s, layout: Layout, damage: DamageLog, memory: Budget
    ) -> None:
        self.l1 = l1
        self.layout = layout
        self.tables = TableCache(file, layout.cluster_size, memory)
        self._damage = damage
        self._span = layout.cluster_size * layout.l2_entries  # guest bytes of one L2 table
        granules = SUBCLUSTERS if layout.extended else 1
        self._clusters_at_once = RUNS_PER_STEP // granules
        self._reach = GRANULES_PER_STEP // granules << layout.cluster_bits
        self._tables_per_step = min(max(self._reach // self._span, 1), TABLES_PER_STEP)

    async def runs(self, offset: int, length: int) -> Runs:
        """The runs of ``length`` guest bytes (> 0), or of fewer."""
        first = offset // self._span
        last = min(-(-(offset + length) // self._span), first + L1_ENTRIES_PER_STEP)
        # An index past the end of the L1 table is unallocated, as an entry of zero is.
        named = np.flatnonzero(self.l1[first:last] & np.uint64(L1E_OFFSET_MASK)) + first
        if len(named) > self._tables_per_step:
            last = int(named[self._tables_per_step])
            named = named[: self._tables_per_step]
        end = min(offset + length, last * self._span)
        pieces: list[Runs] = []
        at, found, enough = offset, 0, offset + self._reach
        for group in self._groups(named):
            base = int(group[0]) * self._span
            if base > at:
                pieces.append(Runs.single(at, base - at, UNALLOCATED))
                at = base
            stop = min(base + len(group) * self._span, end)
            try:
                tables = await self._load(group)
            except CorruptImage as error:
                self._damage.tell(base, partial(str, error))
                pieces.append(Runs.single(at, stop - at, CORRUPT))
                at = stop
                continue
            while at < stop:
                if found >= RUNS_PER_STEP or (at >= enough and found):
                    return concatenate(pieces)
                pieces.append(self._decode(tables, base, at, stop))
                at, found = pieces[-1].end, found + len(pieces[-1])
        if at < end:
            pieces.append(Runs.single(at, end - at, UNALLOCATED))
        return concatenate(pieces)

    def _groups(self, named: IndexArray) -> Iterator[IndexArray]:
        """L1 indices that follow one another, to be decoded together; bad ones by themselves."""
        if len(named):
            misaligned = np.uint64(L1E_OFFSET_MASK & self.layout.cluster_size - 1)
            bad = self.l1[named] & misaligned != 0
            apart = (np.diff(named) != 1) | bad[1:] | bad[:-1]
            yield from np.split(named, np.flatnonzero(apart) + 1)

    async def _load(self, group: IndexArray) -> UInt64s:
        """The L2 tables of some L1 entries, one behind the other. Raises `CorruptImage`."""
        places = [entries.l2_table_offset(entry, self.layout) for entry in self.l1[group].tolist()]
        tables = [(await self.tables.load(host_offset)).values for host_offset in places]
        return tables[0] if len(tables) == 1 else np.concatenate(tables)

    def _decode(self, tables: UInt64s, base: int, start: int, stop: int) -> Runs:
        """Runs of [start, stop), or the first of them; ``tables`` begin at guest ``base``."""
        bits = self.layout.cluster_bits
        first = (start - base) >> bits
        count = min(((stop - base - 1) >> bits) + 1 - first, self._clusters_at_once)
        runs = entries.decode(tables, first, count, self.layout, base + (first << bits))
        for guest_offset in runs.starts[runs.kind == CORRUPT].tolist():
            row = ((guest_offset - base) >> bits) * self.layout.entry_words
            self._damage.tell(guest_offset, partial(self._explain, tables, row, guest_offset))
        return runs.since(start).clip(stop)

    def _explain(self, tables: UInt64s, row: int, guest_offset: int) -> str:
        bitmap = int(tables[row + 1]) if self.layout.extended else 0
        return entries.explain(int(tables[row]), bitmap, self.layout, guest_offset)
