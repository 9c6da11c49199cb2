"""The tables of the active layer, to be changed: which host cluster is linked where.

docs/interop/qcow2.rst, "Cluster mapping". An L2 table that an internal snapshot shares is copied
before its first change; one that is missing is made. The reading side, `Mapping`, sees every
change at once, as it looks at the same tables.
"""

from __future__ import annotations

import asyncio

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.commit import Commits
from pynbd.block.qcow2.entries import UInt64s, l2_table_offset
from pynbd.block.qcow2.format import COMPRESSED, COPIED, L1E_OFFSET_MASK, L2E_OFFSET_MASK
from pynbd.block.qcow2.mapping import Mapping
from pynbd.block.qcow2.places import Places
from pynbd.block.qcow2.refcounts import Refcounts
from pynbd.errors import CorruptImage


class Links:
    """The L1 table ``l1``, whose values are those of ``mapping``, and the L2 tables it names."""

    def __init__(
        self,
        file: HostFile,
        l1: Table,
        mapping: Mapping,
        refcounts: Refcounts,
        commits: Commits,
        places: Places,
    ) -> None:
        self._file = file
        self._l1 = l1
        self._mapping = mapping
        self._refcounts = refcounts
        self._commits = commits
        self._places = places
        self._one_at_a_time = asyncio.Lock()
        self.layout = mapping.layout
        places.add(l1.host_offset, l1.length, "L1 table")
        places.add_tables("L2 table", self._l2_offsets)

    def _l2_offsets(self) -> UInt64s:
        return self._l1.values & np.uint64(L1E_OFFSET_MASK)

    def at_hand(self, l1_index: int) -> Table | None:
        """The L2 table of an L1 entry, if it is in memory and may be changed as it is."""
        entry = int(self._l1.values[l1_index])
        if not entry & COPIED:
            return None
        table = self._mapping.tables.at_hand(entry & L1E_OFFSET_MASK)
        return table if table is not None and table.checked else None

    def is_missing(self, l1_index: int) -> bool:
        """Whether an L1 entry names no L2 table: all of its clusters are unallocated."""
        return not int(self._l1.values[l1_index]) & L1E_OFFSET_MASK

    async def table(self, l1_index: int) -> Table:
        """The L2 table of an L1 entry, to be changed. `CorruptImage` if it cannot be one."""
        table = self.at_hand(l1_index)
        if table is not None:
            return table
        async with self._one_at_a_time:
            entry = int(self._l1.values[l1_index])
            try:
                host_offset = l2_table_offset(entry, self.layout)
            except CorruptImage as error:
                raise CorruptImage(f"{self._file.path}: {error}") from None
            if host_offset:
                table = await self._mapping.tables.load(host_offset)
                if not table.checked:
                    # Not even to end the reference to it: somebody new may be there by then.
                    self._refcounts.check_there(host_offset, table.length, f"L2 table {l1_index}")
                if entry & COPIED:
                    self._check(table)
                    return table
            return await self._new_table(l1_index, table)

    def _check(self, table: Table) -> None:
        """Raise `CorruptImage` if a table cannot be changed. One that leads beyond the end of the
        file stays unchecked: then nothing is written in place before that was looked at.
        """
        if not table.checked:
            self._places.check(table, self._file.path)
            table.checked = self._leads_into_file(table.values)

    def _leads_into_file(self, values: UInt64s) -> bool:
        if self.layout.data_file:
            return True  # which is as long as the disk
        entries = values[:: self.layout.entry_words]
        named = entries[entries & np.uint64(COMPRESSED) == 0] & np.uint64(L2E_OFFSET_MASK)
        return int(named.max(initial=0)) < self._refcounts.file_end

    async def _new_table(self, l1_index: int, shared: Table | None) -> Table:
        self._places.check(self._l1, self._file.path)
        run = await self._refcounts.allocate_table()
        if shared is None:
            values = np.zeros(self.layout.cluster_size // 8, np.uint64)
        else:
            values = shared.values.copy()
            self._commits.free([(shared.host_offset, shared.length)])
        table = Table(run.host_offset, values)
        table.checked = self._leads_into_file(values)
        self._mapping.tables.add(table)
        self._places.mark(table.host_offset)
        self._commits.add_table(table)
        self._l1.values[l1_index] = table.host_offset | COPIED
        self._commits.link(self._l1, l1_index, l1_index + 1)
        return table

    def entry(self, table: Table, index: int) -> tuple[int, int]:
        """The L2 entry ``index``, and its subcluster bitmap (0 without extended L2)."""
        if self.layout.extended:
            return int(table.values[2 * index]), int(table.values[2 * index + 1])
        return int(table.values[index]), 0

    def link(self, table: Table, index: int, entry: int, bitmap: int) -> None:
        """Change the L2 entry ``index``, and its subcluster bitmap with extended L2."""
        words = self.layout.entry_words
        table.values[index * words] = entry
        if self.layout.extended:
            table.values[index * words + 1] = bitmap
        self._commits.link(table, index * words, (index + 1) * words)
