"""Zeroes and discards: ranges that read as zeroes because their entries say so.

docs/interop/qcow2.rst, "Standard Cluster Descriptor" (the zero flag, version 3) and "Extended L2
Entries". Whole clusters, or subclusters, are changed a table at a time; what of a range is less is
written as zero bytes, or in a discard left alone. A discarded cluster reads as zeroes: what is
below it in the chain never shows again.

A raw external data file can be read without this image's tables: there zeroes are written through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from enum import Enum

import numpy as np

from pynbd.block import file as host
from pynbd.block.engine import HostFile
from pynbd.block.extent import COMPRESSED as COMPRESSED_EXTENT
from pynbd.block.extent import CORRUPT
from pynbd.block.extent import ZERO as ZERO_EXTENT
from pynbd.block.node import BlockNode
from pynbd.block.pins import Pins
from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.commit import Commits, HostRange
from pynbd.block.qcow2.cow import ALL, CopyOnWrite, references
from pynbd.block.qcow2.entries import Bools, UInt64s, decode, explain
from pynbd.block.qcow2.format import COMPRESSED, COPIED, L2E_OFFSET_MASK, SUBCLUSTERS, ZERO
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.in_flight import InFlight
from pynbd.block.qcow2.links import Links
from pynbd.block.qcow2.refcounts import Refcounts, Run
from pynbd.errors import CorruptImage

# One step changes so many entries at most, about a millisecond's worth, and reserves so many
# clusters.
_ENTRIES_PER_STEP = 1 << 14
_CLUSTERS_RESERVED_PER_STEP = 1 << 10
_ZERO_PIECE = bytes(1 << 20)
_ALL_ZERO = ALL << SUBCLUSTERS
_PLACE = np.uint64(L2E_OFFSET_MASK | COMPRESSED)
_HOME = np.uint64(L2E_OFFSET_MASK | COPIED)


class Space(Enum):
    """What becomes of the host clusters of a range that is made zero."""

    GIVEN_BACK = "may_unmap"
    KEPT = "those that are there"
    RESERVED = "no_hole: all are there afterwards"


class Zeroing:
    """Zeroes and discards of one image. Bytes are written through ``cow``."""

    def __init__(
        self,
        node: BlockNode,
        file: HostFile,
        header: Header,
        links: Links,
        refcounts: Refcounts,
        commits: Commits,
        in_flight: InFlight,
        cow: CopyOnWrite,
        pins: Pins,
    ) -> None:
        self._node = node
        self._file = file
        self._header = header
        self._layout = header.layout
        self._links = links
        self._refcounts = refcounts
        self._commits = commits
        self._in_flight = in_flight
        self._cow = cow
        self._pins = pins
        self._bits = header.cluster_bits
        self._granule = header.subcluster_size
        self._in_cluster = header.subclusters

    async def is_fast(self, offset: int, length: int, space: Space) -> bool:
        """Whether nothing but entries has to be written to make a range zero."""
        first, last, edges = self._divided(offset, length)
        if self._layout.version < 3 and not self._unallocates(space):
            return False
        if space is Space.RESERVED and (edges or not await self._can_reserve()):
            return False
        if self._layout.extended and await self._has_compressed(first, last):
            return False
        return all([await self._rest_is_zero(*edge) for edge in edges])

    async def _can_reserve(self) -> bool:
        """Whether the host gives space without writes: tried with the header, which has its own."""
        if self._layout.data_file:
            return True  # `_zero_data_file` sees it before it touches anything
        return await host.reserve(self._file, 0, self._layout.cluster_size)

    async def _has_compressed(self, first: int, last: int) -> bool:
        """Whether granules at either end of [first, last) are parts of a compressed cluster, whose
        other parts would have to be written.
        """
        ends = {first} if first % self._in_cluster else set()
        ends |= {last - 1} if last % self._in_cluster else set()
        for granule in ends if first < last else ():
            start = granule * self._granule
            (extent, *_) = await self._node.resolve(start, start + 1)
            if extent.kind == COMPRESSED_EXTENT and extent.depth == 1:
                return True
        return False

    async def zero(self, offset: int, length: int, space: Space, *, fast: bool) -> None:
        """Make guest bytes read as zeroes. ``fast``, if `is_fast` said so: ENOTSUP, untouched, if
        the host would have to write bytes all the same.
        """
        first, last, edges = self._divided(offset, length)
        if first < last:
            if self._layout.version < 3 and not self._unallocates(space):
                end = min(last * self._granule, self._node.size)
                await self._write_zeroes(first * self._granule, end)
            else:
                await self._change(first, last, space, discard=False, fast=fast)
        for edge in edges:
            await self._zero_edge(*edge, space)

    def _divided(self, offset: int, length: int) -> tuple[int, int, list[tuple[int, int]]]:
        """A range as granules [first, last), and what of it is less than one: the edges."""
        end = offset + length
        first, last = self._whole(offset, end)
        if first > last:
            return first, last, [(offset, end)]
        start, stop = min(first * self._granule, end), min(last * self._granule, end)
        edges = [(offset, start), (max(stop, start), end)]
        return first, last, [edge for edge in edges if edge[0] < edge[1]]

    async def discard(self, offset: int, length: int) -> None:
        """Give back what of a guest range is whole clusters (or subclusters); that reads as zeroes
        then.
        """
        if self._layout.version < 3 and self._node.backing is not None:
            return  # without the zero flag the backing node would show
        first, last = self._whole(offset, offset + length)
        if first < last:
            await self._change(first, last, Space.GIVEN_BACK, discard=True, fast=False)

    def _whole(self, offset: int, end: int) -> tuple[int, int]:
        """Granules [first, last) that lie in a range; the last cluster ends with the disk, and so
        does the last granule that begins on it.
        """
        first, last = -(-offset // self._granule), end // self._granule
        if end == self._node.size:
            last = -(-end // self._granule)
            if first < last:
                last = -(-last // self._in_cluster) * self._in_cluster
        return first, last

    def _unallocates(self, space: Space) -> bool:
        """Whether version 2 can make clusters zero: as unallocated ones, with nothing below."""
        return self._node.backing is None and space is not Space.RESERVED

    # Less than a cluster or subcluster

    async def _zero_edge(self, offset: int, end: int, space: Space) -> None:
        """Make a part of one granule zero: the whole of it, if the rest of it is zero anyway."""
        number = offset >> self._bits
        if self._unallocates(space) or (space is not Space.RESERVED and self._layout.version >= 3):
            async with self._in_flight.alone([(number, number + 1)]):
                if await self._rest_is_zero(offset, end):
                    is_zero = await self._is_zero(offset, end)
                    granule = offset // self._granule
                    # What the entries call zero a crash may have left in a raw data file.
                    if not is_zero or self._header.raw_data_file:
                        await self._zero_data_file(granule, granule + 1, space, fast=False)
                    if not is_zero:
                        await self._change_table(granule, granule + 1, space, discard=False)
                    return
        await self._write_zeroes(offset, end)

    async def _rest_is_zero(self, offset: int, end: int) -> bool:
        start = offset // self._granule * self._granule
        stop = min(start + self._granule, self._node.size)
        return await self._is_zero(start, offset) and await self._is_zero(end, stop)

    async def _is_zero(self, offset: int, end: int) -> bool:
        """Whether the mapping says so."""
        if offset >= end:
            return True
        extents = await self._node.resolve(offset, end)
        return all(extent.kind == ZERO_EXTENT for extent in extents)

    async def _write_zeroes(self, offset: int, end: int) -> None:
        while offset < end:
            count = min(len(_ZERO_PIECE), end - offset)
            (error,) = await self._node.pwrite_batch(
                [(offset, memoryview(_ZERO_PIECE)[:count])], fua=False
            )
            if error:
                raise error
            offset += count

    # Whole clusters and subclusters

    async def _change(
        self, first: int, last: int, space: Space, *, discard: bool, fast: bool
    ) -> None:
        """Change granules [first, last), step by step."""
        in_table = self._layout.l2_entries * self._in_cluster
        most = _ENTRIES_PER_STEP * self._in_cluster
        if space is Space.RESERVED:
            most = _CLUSTERS_RESERVED_PER_STEP * self._in_cluster
        while first < last:
            stop = min(last, (first // in_table + 1) * in_table, (first // most + 1) * most)
            clusters = first // self._in_cluster, -(-stop // self._in_cluster)
            async with self._in_flight.alone([clusters]):
                await self._zero_data_file(first, stop, space, fast=fast)
                if not self._is_zero_already(first, stop, space):
                    await self._change_table(first, stop, space, discard=discard)
            first = stop
            if self._commits.much:
                await self._commits.commit()
            await asyncio.sleep(0)

    def _is_zero_already(self, first: int, last: int, space: Space) -> bool:
        """Whether a range inside one L2 table has neither a table nor anything below it."""
        l1_index = first // self._in_cluster >> self._layout.l2_bits
        backing = self._node.backing
        return (
            space is not Space.RESERVED
            and self._links.is_missing(l1_index)
            and (backing is None or first * self._granule >= backing.size)
        )

    async def _zero_data_file(self, first: int, last: int, space: Space, *, fast: bool) -> None:
        if not self._layout.data_file:
            return
        if self._header.raw_data_file:
            # Writes in place that have begun end first: what they write later would stay there.
            await self._pins.drained()
        start, end = first * self._granule, min(last * self._granule, self._node.size)
        unmap = space is Space.GIVEN_BACK
        if self._header.raw_data_file or space is Space.RESERVED:
            await host.write_zeroes(self._file, start, end - start, may_unmap=unmap, fast=fast)
        elif unmap:
            await host.discard(self._file, start, end - start)

    async def _change_table(self, first: int, last: int, space: Space, *, discard: bool) -> None:
        """Change granules [first, last) of one L2 table; nobody else changes them."""
        in_cluster, layout = self._in_cluster, self._layout
        table = await self._links.table(first // in_cluster >> layout.l2_bits)
        head, tail = -(-first // in_cluster), last // in_cluster
        if head > tail:  # inside one cluster
            await self._change_subclusters(table, first, last, space, discard=discard)
        else:
            if head < tail:
                await self._change_clusters(table, head, tail, space, discard=discard)
            for start, stop in ((first, head * in_cluster), (tail * in_cluster, last)):
                if start < stop:
                    await self._change_subclusters(table, start, stop, space, discard=discard)

    async def _change_clusters(
        self, table: Table, first: int, last: int, space: Space, *, discard: bool
    ) -> None:
        layout = self._layout
        at = first & layout.l2_entries - 1
        rows = slice(at * layout.entry_words, (at + last - first) * layout.entry_words)
        self._check(table, at, first, last)
        words = table.values[rows][:: layout.entry_words]
        homes = await self._homes(words, first, space)
        # From here on nothing waits. What was looked up is as it was: nobody else changes it.
        old = words.copy()
        zero = np.uint64(0 if layout.extended or layout.version < 3 else ZERO)
        new = homes | zero
        changed = np.ones(len(old), np.bool_)
        if discard and self._node.backing is None:
            changed = old & np.uint64(L2E_OFFSET_MASK | COMPRESSED | COPIED | ZERO) != 0
            new[~changed] = old[~changed]
        if not layout.data_file:
            moved = (old & np.uint64(COMPRESSED) != 0) | (
                (new ^ old) & np.uint64(L2E_OFFSET_MASK) != 0
            )
            self._commits.free(self._references(old[moved & (old & _PLACE != 0)]))
        words[:] = new
        if layout.extended:
            table.values[rows][1::2][changed] = _ALL_ZERO
        self._commits.link(table, rows.start, rows.stop)
        self._node.resolved.forget(first << self._bits, last << self._bits)

    async def _homes(self, words: UInt64s, first: int, space: Space) -> UInt64s:
        """Host offset and COPIED flag that the clusters from ``first``, with the entries ``words``,
        are to have; 0 for no host cluster.
        """
        if space is Space.GIVEN_BACK or self._layout.version < 3:
            return np.zeros(len(words), np.uint64)
        homes = np.where(words & np.uint64(COMPRESSED), np.uint64(0), words & _HOME)
        if not self._layout.data_file:
            homes[homes == COPIED] = 0
        if space is Space.KEPT:
            return homes
        if self._layout.data_file:
            numbers = np.arange(first, first + len(words), dtype=np.uint64)
            return numbers << np.uint64(self._bits) | np.uint64(COPIED)
        own = _own(words)
        for host_offset, size in self._references(words[own]):
            await host.reserve(self._file, host_offset, size)
        runs = await self._reserve(int(np.count_nonzero(~own)))
        homes[~own] = _host_offsets(runs, self._bits) | np.uint64(COPIED)
        return homes

    async def _reserve(self, clusters: int) -> list[Run]:
        """New host clusters, with space on the host for all their bytes: whatever these are, the
        entries say that they read as zeroes.
        """
        runs = await self._refcounts.allocate(clusters) if clusters else []
        try:
            for run in runs:
                offset, length = run.host_offset, run.clusters << self._bits
                if not await host.reserve(self._file, offset, length):
                    await host.write_zeroes(self._file, offset, length, may_unmap=False, fast=False)
        except OSError:
            await self._refcounts.unallocate(runs)
            raise
        return runs

    def _references(self, entries: UInt64s) -> Iterator[HostRange]:
        compressed = entries & np.uint64(COMPRESSED) != 0
        for entry in entries[compressed].tolist():
            yield from references(entry, self._bits)
        offsets = np.sort(entries[~compressed] & np.uint64(L2E_OFFSET_MASK))
        size = self._layout.cluster_size
        edges = np.flatnonzero(np.diff(offsets) != size) + 1
        for stretch in np.split(offsets, edges):
            if len(stretch):
                yield int(stretch[0]), len(stretch) * size

    async def _change_subclusters(
        self, table: Table, first: int, last: int, space: Space, *, discard: bool
    ) -> None:
        """Change subclusters [first, last) of one cluster, not all of them."""
        number = first // SUBCLUSTERS
        index = number & self._layout.l2_entries - 1
        self._check(table, index, number, number + 1)
        entry, bitmap = self._links.entry(table, index)
        start, stop = first * self._granule, min(last * self._granule, self._node.size)
        if entry & COMPRESSED or space is Space.RESERVED:
            # These have no subclusters; and to reserve some of them is to write them.
            if not discard:
                zeroes = [(start, memoryview(bytes(stop - start)))]
                (error,) = await self._cow.write_alone(zeroes)
                if error:
                    raise error
            return
        mask = (1 << (last - number * SUBCLUSTERS)) - (1 << (first - number * SUBCLUSTERS))
        allocated, zero = bitmap & ALL, bitmap >> SUBCLUSTERS
        if discard and self._node.backing is None:
            zero |= mask & allocated
        else:
            zero |= mask
        allocated &= ~mask
        if not allocated and space is Space.GIVEN_BACK and not self._layout.data_file:
            self._commits.free(references(entry, self._bits))
            entry = 0
        self._links.link(table, index, entry, zero << SUBCLUSTERS | allocated)
        self._node.resolved.forget(number << self._bits, number + 1 << self._bits)

    def _check(self, table: Table, at: int, first: int, last: int) -> None:
        """Raise `CorruptImage` if one of clusters [first, last), from index ``at``, breaks a rule
        of its entry's form, or is past the end of the file.
        """
        runs = decode(table.values, at, last - first, self._layout, first << self._bits)
        for guest_offset in runs.starts[runs.kind == CORRUPT].tolist():
            row = at + (guest_offset >> self._bits) - first
            problem = explain(*self._links.entry(table, row), self._layout, guest_offset)
            raise CorruptImage(f"{self._node.name}: guest offset {guest_offset:#x}: {problem}")
        if not table.checked:
            words = self._layout.entry_words
            entries = table.values[at * words : (at + last - first) * words : words]
            for host_offset, size in self._references(entries[entries & _PLACE != 0]):
                what = f"a cluster of guest offsets from {first << self._bits:#x} on"
                self._refcounts.check_there(host_offset, size, what)


def _own(words: UInt64s) -> Bools:
    """Which entries name a host cluster that is theirs alone."""
    own: Bools = (words & np.uint64(COPIED | COMPRESSED) == np.uint64(COPIED)) & (
        words & np.uint64(L2E_OFFSET_MASK) != 0
    )
    return own


def _host_offsets(runs: list[Run], cluster_bits: int) -> UInt64s:
    """Where each cluster of ``runs`` is."""
    pieces = [
        (np.arange(run.clusters, dtype=np.uint64) << np.uint64(cluster_bits))
        + np.uint64(run.host_offset)
        for run in runs
    ]
    return np.concatenate([*pieces, np.zeros(0, np.uint64)])
