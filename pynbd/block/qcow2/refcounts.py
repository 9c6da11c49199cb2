"""Refcounts of host clusters: allocating them and giving them back (docs/interop/qcow2.rst, "Host
cluster management").

Refcounts are changed in memory; `Commits` writes them before what relies on them. A new cluster is
a hole that was found, or the next one at the end: the file is searched for holes once, a few blocks
at each allocation, so that no request pays for all of them; what is given back later is
remembered. A refcount block counts itself, if it is the first in what it speaks of.

Whoever gets a cluster has it to himself: refcounts above one come from internal snapshots and
compressed clusters, and only ever fall.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pynbd.block.engine import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, HostFile
from pynbd.block.qcow2.cache import Table, TableCache, read_table
from pynbd.block.qcow2.commit import Commits, HostRange
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.format import (
    L2E_OFFSET_MASK,
    MAX_OFFSET,
    MAX_REFCOUNT_TABLE_BYTES,
    REFT_OFFSET_MASK,
)
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.places import Places
from pynbd.block.qcow2.widths import Values
from pynbd.errors import CorruptImage

log = logging.getLogger("pynbd")

REFCOUNT_TABLE = "refcount table"

# Of blocks that were not changed.
BLOCK_CACHE_BYTES = 2 << 20
# Blocks that are looked through for the end of what is in use. If that is before all of them, what
# is free there will be found as holes.
_BLOCKS_AT_OPEN = 1 << 10
_BYTES_AT_OPEN = 64 << 20
# Steps in which one allocation looks for holes.
_STEPS_PER_SEARCH = 4
# Holes that are remembered; with more than these the file is searched again.
_MAX_HOLES = 1 << 14
# Clusters that are looked at, or given back, in one step: those of one block, or so many of them.
_CLUSTERS_PER_STEP = 1 << 16
# Clusters behind those that an allocation takes that are looked at for the next ones.
_FRESH = 1 << 8
# The file becomes longer in steps of a sixteenth, within these limits: a file that grows with every
# write makes every flush slow.
_MIN_GROWTH = 1 << 20
_MAX_GROWTH = 64 << 20

_Clusters = tuple[int, int]  # number of the first, and how many


class Run(NamedTuple):
    """Allocated host clusters. ``blank``: they read as zeroes."""

    host_offset: int
    clusters: int
    blank: bool


class Refcounts:
    """The refcount table and blocks of one image that is written. Raises `CorruptImage` where a
    change would make damage worse.
    """

    def __init__(
        self, file: HostFile, header: Header, table: Table, commits: Commits, places: Places
    ) -> None:
        self._file = file
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._width = header.refcount_bits
        self._in_block = header.cluster_size * 8 // header.refcount_bits
        self._in_step = min(self._in_block, _CLUSTERS_PER_STEP)
        self._commits = commits
        self._places = places
        self.table = table
        self._blocks = TableCache(file, header.cluster_size, BLOCK_CACHE_BYTES, self._width)
        self._lock = asyncio.Lock()
        self._told = False  # that the host takes nothing back
        self._holes: list[_Clusters] = []  # each inside what one block speaks of
        self._searched = 0  # holes before this cluster are known
        self._end = 0  # of what is in use
        # Up to here, all clusters from there are free and blank, inside the file, and no metadata.
        self._fresh_end = 0
        self._fresh_block: Table | None = None  # which counts them
        self._written_end = -(-file.size() // self._cluster_size)  # beyond is nothing but zeroes
        self._first_size = self._size = file.size()
        places.add(table.host_offset, table.length, REFCOUNT_TABLE)
        places.add_tables("refcount block", self._block_offsets)

    @classmethod
    async def open(
        cls, file: HostFile, header: Header, commits: Commits, places: Places
    ) -> Refcounts:
        """Read the refcount table, and find the end of what is in use."""
        entries = header.refcount_table_clusters * header.cluster_size // 8
        offset = header.refcount_table_offset
        table = Table(offset, await read_table(file, offset, entries))
        refcounts = cls(file, header, table, commits, places)
        named = np.flatnonzero(refcounts._block_offsets())
        most = min(_BLOCKS_AT_OPEN, _BYTES_AT_OPEN // header.cluster_size)
        for index in named[-most:][::-1].tolist():
            try:
                block = await refcounts._load(index)
            except CorruptImage as error:
                raise CorruptImage(f"{error} (pynbd check tells more; -r reads it)") from None
            used = np.flatnonzero(block.values)
            refcounts._end = index * refcounts._in_block
            if len(used):
                refcounts._end += int(used[-1]) + 1
                break
        return refcounts

    @property
    def end(self) -> int:
        """Where the last cluster that has a refcount ends."""
        return self._end << self._bits

    @property
    def file_end(self) -> int:
        """Where the file ended, or what has a refcount: who writes beyond makes the file as long,
        and what is allocated next cuts that off again.
        """
        return max(self.end, -(-self._first_size // self._cluster_size) << self._bits)

    def check_there(self, host_offset: int, length: int, what: str) -> None:
        """Raise `CorruptImage` if ``what`` is to be written beyond `file_end`."""
        if host_offset + length > self.file_end:
            raise CorruptImage(
                f"{self._file.path}: {what} at {host_offset:#x} is past the end of the file, and"
                " has no refcount"
            )

    def _block_offsets(self) -> UInt64s:
        return self.table.values & np.uint64(REFT_OFFSET_MASK)

    # Allocating

    async def allocate(self, clusters: int) -> list[Run]:
        """So many host clusters, in as few runs as there are; each with a refcount of 1.

        ``OSError`` ENOSPC if there is no room for them.
        """
        run = self._take_fresh(clusters)
        if run:
            return [run]
        async with self._lock:
            runs: list[Run] = []
            try:
                await self._search()
                while clusters:
                    run = await self._take(clusters)
                    runs.append(run)
                    clusters -= run.clusters
            except BaseException:
                for run in runs:
                    await self._unallocate(run)
                raise
            return runs

    def _take_fresh(self, clusters: int) -> Run | None:
        """Clusters of which all is known, if nobody is looking for others, and there are no holes
        that come first.
        """
        first, last = self._end, self._end + clusters
        if last > self._fresh_end or self._holes or self._searched < first or self._lock.locked():
            return None
        assert self._fresh_block is not None
        at = first % self._in_block
        self._fresh_block.values[at : at + clusters] = 1
        self._commits.count(self._fresh_block, at, at + clusters)
        self._end = last
        return Run(first << self._bits, clusters, blank=True)

    async def allocate_table(self) -> Run:
        """A cluster for a table, with space on the host: a commit that writes it will find it."""
        (run,) = await self.allocate(1)
        try:
            await self._have_space(run.host_offset >> self._bits, 1)
        except OSError:
            await self.unallocate([run])
            raise
        return run

    async def _have_space(self, first: int, count: int) -> None:
        await self._file.fallocate(0, first << self._bits, count << self._bits)

    async def unallocate(self, runs: Sequence[Run]) -> None:
        """Give back clusters that nothing ever referred to."""
        async with self._lock:
            for run in runs:
                await self._unallocate(run)

    async def _unallocate(self, run: Run) -> None:
        first = run.host_offset >> self._bits
        for number, count in self._split(first, run.clusters):
            await self._set(number, count, 0)
            self._holes.append((number, count))

    async def _take(self, want: int) -> Run:
        """Up to ``want`` clusters that follow one another."""
        if not self._holes:
            return await self._take_from_end(want)
        first, there = self._holes.pop()
        count = min(there, want)
        if count < there:
            self._holes.append((first + count, there - count))
        await self._set(first, count, 1)
        return Run(first << self._bits, count, blank=False)

    async def _search(self) -> None:
        """Look for holes, if none is known."""
        for _ in range(_STEPS_PER_SEARCH):
            if self._holes or self._searched >= self._end:
                return
            first, last = self._searched, min(self._searched + self._in_step, self._end)
            index, at = divmod(first, self._in_block)
            block = await self._block(index)
            if block is not None:
                self._holes = _runs(block.values[at : at + last - first] == 0, first)[::-1]
            self._searched += self._in_step

    async def _take_from_end(self, want: int) -> Run:
        while True:
            index, within = divmod(self._end, self._in_block)
            block = await self._block(index)
            if block is None:
                await self._add_block(index)
                continue
            ahead = block.values[within : within + max(want, _FRESH)]
            in_use = np.flatnonzero(ahead)
            count = int(in_use[0]) if len(in_use) else len(ahead)
            if count:
                break
            self._end += 1  # in use, though beyond the end of the file
        first, free_end = self._end, self._end + count
        count = min(count, want)
        blank = first >= self._written_end and not self._file.is_device
        if not blank:
            count = min(count, max(self._written_end - first, 1))
        self._check_room(first, count)
        await self._set(first, count, 1)
        self._end += count
        await self._make_longer()
        if blank and not self._places.hold(first << self._bits, free_end - first << self._bits):
            self._fresh_block, self._fresh_end = block, min(free_end, self._size >> self._bits)
        return Run(first << self._bits, count, blank)

    def _check_room(self, first: int, count: int) -> None:
        end = first + count << self._bits
        if end > L2E_OFFSET_MASK or (self._file.is_device and end > self._size):
            raise OSError(errno.ENOSPC, "there is no room for more clusters", self._file.path)

    async def _make_longer(self) -> None:
        end = self._end << self._bits
        if end > self._size and not self._file.is_device:
            growth = min(max(end // 16, _MIN_GROWTH), _MAX_GROWTH)
            try:
                await self._file.resize(end + growth)
            except OSError:
                return  # whoever writes there will be told
            self._size = end + growth

    async def finish(self) -> None:
        """Give back what the file was made longer than it needs."""
        needed = max(self._end << self._bits, self._first_size)
        if needed < self._size and not self._file.is_device:
            await self._file.resize(needed)
            self._size = needed

    # Giving back

    async def release(self, ranges: Sequence[HostRange]) -> None:
        """One reference less for each cluster; those without any are punched, and free.

        Nothing on disk refers to them any more, and nobody uses them.
        """
        for first, ended in self._ended(ranges):
            async with self._lock:
                block = await self._counted(first)
            at = first % self._in_block
            counts = block.values[at : at + len(ended)]
            self._check_counts(first, counts, ended)
            ending = _runs((counts == ended) & (ended != 0), first)
            for run in ending:
                self._check_place(*run, "was a guest's")
                await self._punch(*run)
            async with self._lock:
                counts -= ended.astype(counts.dtype)
                self._commits.count(block, at, at + len(ended))
                self._holes += ending
                if len(self._holes) > _MAX_HOLES:
                    self._holes.clear()
                    self._searched = 0
            await asyncio.sleep(0)

    def _ended(self, ranges: Sequence[HostRange]) -> Iterator[tuple[int, UInt64s]]:
        """How many references ended of some clusters that follow one another (the first, and one
        number for each): step by step, each inside one block.
        """
        steps: dict[int, list[_Clusters]] = {}
        for host_offset, length in ranges:
            for first, count in self._split(host_offset >> self._bits, length >> self._bits):
                steps.setdefault(first // self._in_step, []).append((first, first + count))
        for _, clusters in sorted(steps.items()):
            firsts, ends = np.array(clusters).T
            first = int(firsts.min())
            changes = np.zeros(int(ends.max()) - first + 1, np.int64)
            np.add.at(changes, firsts - first, 1)
            np.add.at(changes, ends - first, -1)
            yield first, np.cumsum(changes[:-1]).astype(np.uint64)

    def _split(self, first: int, count: int) -> Iterator[_Clusters]:
        """Clusters as one step takes them, inside one block."""
        end = first + count
        while first < end:
            stop = min(end, (first // self._in_step + 1) * self._in_step)
            yield first, stop - first
            first = stop

    def _check_counts(self, first: int, counts: Values, ended: UInt64s) -> None:
        short = counts < ended
        if short.any():
            row = int(np.argmax(short))
            raise CorruptImage(
                f"{self._file.path}: {ended[row]} references to the cluster at"
                f" {first + row << self._bits:#x} ended, but its refcount is {counts[row]}"
            )

    async def _punch(self, first: int, count: int) -> None:
        host_offset, length = first << self._bits, count << self._bits
        mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
        try:
            await self._file.fallocate(mode, host_offset, length)
        except OSError as error:  # the host keeps the space, and we use it again
            if not self._told:
                log.warning("%s: freed clusters keep their space: %s", self._file.path, error)
            self._told = True

    # Blocks

    async def _set(self, first: int, count: int, refcount: int) -> None:
        """Set the refcounts of clusters that one block speaks of, and that are no metadata."""
        self._check_place(first, count)
        block = await self._counted(first)
        at = first % self._in_block
        block.values[at : at + count] = refcount
        self._commits.count(block, at, at + count)

    async def shared(self, host_offset: int) -> bool:
        """Whether a cluster has more than one reference, as far as its refcount says."""
        cluster = host_offset >> self._bits
        async with self._lock:
            block = await self._counted(cluster)
        return int(block.values[cluster % self._in_block]) > 1

    async def _counted(self, cluster: int) -> Table:
        """The block that counts ``cluster``, to be changed."""
        index = cluster // self._in_block
        block = await self._block(index)
        if block is None:
            raise CorruptImage(
                f"{self._file.path}: the cluster at {cluster << self._bits:#x} is in use, but"
                " there is no refcount block for it"
            )
        return block

    async def _block(self, index: int) -> Table | None:
        """The refcount block ``index``, None if there is none; its place is its own."""
        if index >= len(self.table.values):
            return None
        if not int(self.table.values[index]) & REFT_OFFSET_MASK:
            return None
        block = await self._load(index)
        if not block.checked and block.host_offset >= self._file.size():
            raise CorruptImage(
                f"{self._file.path}: refcount block {index} at {block.host_offset:#x} is past the"
                " end of the file"
            )
        self._places.check(block, self._file.path)
        return block

    async def _load(self, index: int) -> Table:
        host_offset = int(self.table.values[index]) & REFT_OFFSET_MASK
        if host_offset % self._cluster_size or host_offset > MAX_OFFSET - self._cluster_size:
            raise CorruptImage(
                f"{self._file.path}: refcount block {index} is at {host_offset:#x}, not at a"
                " cluster of the file"
            )
        return await self._blocks.load(host_offset)

    async def _add_block(self, index: int) -> None:
        """A new refcount block, the first of the clusters that it counts; perhaps with a new
        table for it.
        """
        self._places.check(self.table, self._file.path)
        if index < len(self.table.values):
            self._check_room(self._end, 1)
            self._check_place(self._end, 1)
            await self._have_space(self._end, 1)
            self._place_blocks([index], self._end)
            return
        # The new table comes behind the new blocks that count it and themselves.
        entries_in_cluster = self._cluster_size // 8
        roomy = min(len(self.table.values) * 3 // 2, MAX_REFCOUNT_TABLE_BYTES // 8)
        wanted = max(index + 1, roomy)
        clusters = -(-wanted // entries_in_cluster)
        while True:
            indexes = self._missing(clusters)
            last = (self._end + len(indexes) + clusters - 1) // self._in_block
            if last < clusters * entries_in_cluster:
                break
            clusters += 1
        length = clusters * self._cluster_size
        if length > MAX_REFCOUNT_TABLE_BYTES:
            problem = f"the refcount table would exceed {MAX_REFCOUNT_TABLE_BYTES} bytes"
            raise OSError(errno.ENOSPC, problem, self._file.path)
        self._check_room(self._end, len(indexes) + clusters)
        self._check_place(self._end, len(indexes) + clusters)
        await self._have_space(self._end, len(indexes) + clusters)
        # From here on nothing waits: a commit sees all of it or nothing.
        old, start = self.table, self._end + len(indexes)
        values = np.zeros(length // 8, np.uint64)
        values[: len(old.values)] = old.values
        self.table = Table(start << self._bits, values)
        self.table.checked = True
        self._commits.move_refcount_table(self.table)
        blocks = self._place_blocks(indexes, self._end)
        for number in range(start, start + clusters):
            blocks[number // self._in_block].values[number % self._in_block] = 1
        self._end = start + clusters
        self._places.remove(REFCOUNT_TABLE)
        self._places.add(self.table.host_offset, length, REFCOUNT_TABLE)
        self._commits.free([(old.host_offset, old.length)])

    def _missing(self, clusters: int) -> list[int]:
        """The blocks to be added, if so many clusters are to come behind them at the end: none of
        them is there, as the table ends before.
        """
        first, blocks = self._end // self._in_block, 1
        while True:
            last = (self._end + blocks + clusters - 1) // self._in_block
            if last - first + 1 <= blocks:
                return list(range(first, last + 1))
            blocks = last - first + 1

    def _check_place(self, first: int, count: int, state: str = "has no refcount") -> None:
        """Raise `CorruptImage` if there is metadata in clusters that are, or were, somebody's."""
        host_offset, length = first << self._bits, count << self._bits
        if self._places.hold(host_offset, length):
            there = " and ".join(self._places.names(host_offset, length))
            raise CorruptImage(
                f"{self._file.path}: the cluster at {host_offset:#x} {state}, but holds {there}"
            )

    def _place_blocks(self, indexes: Sequence[int], first: int) -> dict[int, Table]:
        """New blocks in clusters from ``first``, which are free, and all of which they count."""
        blocks: dict[int, Table] = {}
        for number, index in enumerate(indexes, first):
            values = np.zeros(self._in_block, f"u{max(self._width // 8, 1)}")
            block = blocks[index] = Table(number << self._bits, values, self._width)
            block.checked = True
            self.table.values[index] = block.host_offset
            self._blocks.add(block)
            self._places.mark(block.host_offset)
            self._commits.add_block(block, self.table, index)
        for number in range(first, first + len(indexes)):
            blocks[number // self._in_block].values[number % self._in_block] = 1
        self._end = first + len(indexes)
        return blocks


def _runs(flags: npt.NDArray[np.bool_], first: int) -> list[_Clusters]:
    """Where ``flags`` are set; the first of them is for cluster ``first``."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)) + first
    numbers: list[int] = edges.tolist()
    return [(start, end - start) for start, end in zip(numbers[::2], numbers[1::2], strict=True)]
