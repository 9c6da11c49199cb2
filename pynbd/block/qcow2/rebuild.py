"""Refcounts as a repair writes them: in place, or in a new refcount table where the old one, or
one of its blocks, is damaged or missing.

docs/interop/qcow2.rst, "Host cluster management". The order of a rebuild, with a flush after each
step: new table and new blocks, behind the end of the file; in the blocks that are kept, refcounts
are raised; the header names the new table; refcounts are lowered, also those of what was the old
one. Until the header names them, nothing refers to the new ones.
"""

from __future__ import annotations

import asyncio
import errno
import struct
from dataclasses import replace

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.qcow2 import snapshots
from pynbd.block.qcow2.format import MAX_REFCOUNT_TABLE_BYTES
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.header_fields import HeaderFields
from pynbd.block.qcow2.mending import Piece, write_all
from pynbd.block.qcow2.references import NOWHERE, References
from pynbd.block.qcow2.widths import Values, encode
from pynbd.block.window import round_up
from pynbd.errors import ImageError

# The header's snapshots_offset.
_SNAPSHOTS_OFFSET_AT = 64
_SNAPSHOTS_OFFSET = struct.Struct(">Q")

_BYTES_AT_ONCE = 8 << 20


class TrueRefcounts:
    """The refcounts that an image has to have, and their places."""

    def __init__(self, file: HostFile, header: Header, references: References) -> None:
        self._file = file
        self._header = header
        self._references = references
        self._recorded = references.recorded
        self._in_block = references.recorded.in_block
        self._good = self._recorded.good_entries(references.clusters).tolist()
        # The places of the blocks that can be kept, by index.
        self._kept = {
            index: int(self._recorded.blocks[index])
            for index in self._good
            if index not in self._recorded.shared
        }

    def have_no_place(self) -> bool:
        """Whether the refcount table or a block cannot be used where it is, or one is missing."""
        if self._recorded.shared or self._recorded.bad_entries(self._references.clusters):
            return True
        table = self._references.counts[self._old_table()]
        if len(table) < self._header.refcount_table_clusters or (table != 1).any():
            return True
        return not self._wanted() <= self._kept.keys()

    def can_be_placed(self) -> bool:
        """Whether there is a place behind the end of the file, and the header can name it: not if
        that is somebody's table as well, to whom it is something else. The old refcount table goes.
        """
        old = self._old_table()
        others = int(self._references.counts[0]) - (old.start == 0 < old.stop) - 1
        return self._references.cut_off_from == NOWHERE and others <= 0

    async def write(self, *, raised: bool = True, lowered: bool = True) -> None:
        """Write them into the blocks that are kept: those that are too low, if they are to be
        ``raised``, and those that are too high. A flush at the end.
        """
        pieces: list[Piece] = []
        for index, place in self._kept.items():
            there = self._recorded.counts[index * self._in_block : (index + 1) * self._in_block]
            wanted = self._block(index)
            if not raised:
                wanted = np.minimum(wanted, there)
            if not lowered:
                wanted = np.maximum(wanted, there)
            if (wanted != there).any():
                there[:] = wanted
                pieces.append((encode(there, self._header.refcount_bits), place))
            if len(pieces) << self._header.cluster_bits >= _BYTES_AT_ONCE:
                await write_all(self._file, pieces)
                pieces.clear()
            await asyncio.sleep(0)
        await write_all(self._file, pieces)
        await self._file.flush()

    async def rebuild(self) -> Header:
        """Write them all, with a new table, and a new snapshot table where the old one is
        incomplete: the header that names them, which is written.
        """
        header, bits = self._header, self._header.refcount_bits
        known = self._references.snapshots if self._references.incomplete else []
        snapshot_table = snapshots.build(known)
        self._drop_old()
        more = -(-len(snapshot_table) // header.cluster_size)
        start, table_clusters, new = await self._file.engine.run(self._find_room, more)
        header = replace(
            header,
            refcount_table_offset=start << header.cluster_bits,
            refcount_table_clusters=table_clusters,
        )
        places = {
            index: (start + table_clusters + number) << header.cluster_bits
            for number, index in enumerate(new)
        }
        table = np.zeros(table_clusters * header.cluster_size // 8, ">u8")
        for index, place in (self._kept | places).items():
            table[index] = place
        await write_all(self._file, [(table.tobytes(), header.refcount_table_offset)])
        for index, place in places.items():
            await write_all(self._file, [(encode(self._block(index), bits), place)])
        if known:
            place = (start + table_clusters + len(new)) << header.cluster_bits
            header = replace(header, snapshots_offset=place)
            whole = snapshot_table.ljust(round_up(len(snapshot_table), header.cluster_size), b"\0")
            await write_all(self._file, [(whole, place)])
        await self._file.flush()
        await self.write(lowered=False)
        fields = HeaderFields(self._file, header)
        await fields.place_refcount_table(header.refcount_table_offset, table.nbytes)
        await self._file.flush()
        if known:
            offset = _SNAPSHOTS_OFFSET.pack(header.snapshots_offset)
            await write_all(self._file, [(offset, _SNAPSHOTS_OFFSET_AT)])
            await self._file.flush()
        await self.write()
        return header

    def _old_table(self) -> slice:
        first = self._header.refcount_table_offset >> self._header.cluster_bits
        return slice(first, first + self._header.refcount_table_clusters)

    def _block(self, index: int) -> Values:
        """The refcounts that block ``index`` is to have."""
        first = index * self._in_block
        known = self._references.true_counts(first, first + self._in_block)
        block = np.zeros(self._in_block, self._recorded.counts.dtype)
        block[: len(known)] = known
        if self._references.hidden:
            there = self._recorded.counts[first : first + self._in_block]
            np.maximum(block[: len(there)], there, out=block[: len(there)])
        return block

    def _wanted(self) -> set[int]:
        """The indexes of the blocks that somebody's refcount is in."""
        counts, step = self._references.counts, self._in_block
        return {at // step for at in range(0, len(counts), step) if counts[at : at + step].any()}

    def _drop_old(self) -> None:
        """Nobody refers to the table and the blocks that are given up."""
        references = self._references
        given_up = [self._old_table()]
        if references.incomplete:
            first = self._header.snapshots_offset >> self._header.cluster_bits
            length = snapshots.table_length(references.snapshots)
            given_up.append(slice(first, first - (-length >> self._header.cluster_bits)))
        for clusters in given_up:
            if clusters.stop <= len(references.counts):
                references.counts[clusters] -= np.minimum(references.counts[clusters], 1)
        for index in self._good:
            if index not in self._kept:
                cluster = int(self._recorded.blocks[index]) >> self._header.cluster_bits
                references.counts[cluster] -= np.uint32(1)

    def _find_room(self, more: int) -> tuple[int, int, list[int]]:
        """(first cluster, clusters of the new table, indexes of the new blocks behind it); ``more``
        clusters are behind these.
        """
        references, kept = self._references, self._kept
        start = references.clusters
        if self._file.is_device:
            used = references.counts[:start] != 0
            used |= self._recorded.counts[:start] != 0
            start = int(np.flatnonzero(used)[-1]) + 1
        named, _ = references.beyond.distinct()
        wanted, total = self._wanted(), 0
        while True:
            # Not where an entry points to that has lost its cluster.
            hit = named[(named >= start) & (named < start + total)]
            if len(hit):
                start = int(hit.max()) + 1
            blocks = range(start // self._in_block, (start + total) // self._in_block + 1)
            new = sorted({*wanted, *blocks} - kept.keys())
            length = (max(*wanted, *blocks, *kept.keys()) + 1) * 8
            clusters = -(-length >> self._header.cluster_bits)
            needed = len(new) + clusters + more
            if len(hit) == 0 and needed == total:
                break
            total = needed
        if clusters << self._header.cluster_bits > MAX_REFCOUNT_TABLE_BYTES:
            raise ImageError(f"{self._file.path}: its refcount table would be too large")
        if self._file.is_device and start + total > references.clusters:
            raise OSError(errno.ENOSPC, "no room for new refcounts", self._file.path)
        longer = np.zeros(max(start + total - len(references.counts), 0), np.uint32)
        references.counts = np.concatenate((references.counts, longer))
        references.counts[start : start + total] = 1
        return start, clusters, new
