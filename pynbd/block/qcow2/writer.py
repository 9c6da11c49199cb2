"""Writer: what a qcow2 image that is open for writing has besides what is read.

It owns the parts that change the image, and says who does what: a write whose clusters are all
there goes straight to the file, pinned; any other changes the mapping (`cow`, `zeroing`) in a task
of its own, which ends even if the request is cancelled. The locks, each taken before the next:

1. the range of guest clusters (`InFlight`), by whoever changes their mapping
2. one L2 table at a time is made or copied (`Links`)
3. one commit at a time (`Commits`); whoever is in 1 or 2 never waits for one
4. the refcounts (`Refcounts`), for as long as it takes to find clusters or give them back

An image whose metadata turns out to contradict itself is not written any more: its corrupt bit is
set, and requests fail.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from pynbd.block.engine import Buffer, HostFile
from pynbd.block.limits import ChainMemory
from pynbd.block.node import BlockNode
from pynbd.block.pins import Pins
from pynbd.block.qcow2.bitmaps import PersistentBitmaps
from pynbd.block.qcow2.cache import LEAST_READ, Table, read_table
from pynbd.block.qcow2.commit import Commits, HostRange, Rule
from pynbd.block.qcow2.cow import CopyOnWrite, Piece
from pynbd.block.qcow2.format import (
    L1E_OFFSET_MASK,
    L1E_SIZE,
    MAX_L1_BYTES,
    Autoclear,
    Compatible,
    Incompatible,
)
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.header_fields import HeaderFields
from pynbd.block.qcow2.in_flight import InFlight
from pynbd.block.qcow2.links import Links
from pynbd.block.qcow2.mapping import Mapping
from pynbd.block.qcow2.places import Places
from pynbd.block.qcow2.refcounts import Refcounts
from pynbd.block.qcow2.snapshots import Snapshot, table_length
from pynbd.block.qcow2.tracking import Tracking
from pynbd.block.qcow2.zeroing import Space, Zeroing
from pynbd.block.steps import Finished, awaited, first_step
from pynbd.errors import CorruptImage

log = logging.getLogger("pynbd")
T = TypeVar("T")

# Clusters of a write in place, which cost a few microseconds each.
_CLUSTERS_IN_PLACE = 1 << 10
# Clusters that one step of a long write, or of many, looks up and links, about two milliseconds'
# worth, and their bytes, which may all have to be copied.
CLUSTERS_PER_STEP = 1 << 6
_BYTES_PER_STEP = 64 << 20
# Batches on their way to the file: one that is written, and the next, so that nobody waits for the
# loop in between.
_BATCHES = 2
# L1 tables of snapshots whose L2 tables have their places known.
_SNAPSHOT_L1_BYTES = MAX_L1_BYTES
_KNOWN_AUTOCLEAR = Autoclear.BITMAPS | Autoclear.RAW_EXTERNAL_DATA


class Writer:
    """The changing side of one image. ``node`` is whose it is, ``pins`` those of its requests."""

    def __init__(
        self,
        node: BlockNode,
        file: HostFile,
        header: Header,
        fields: HeaderFields,
        commits: Commits,
        refcounts: Refcounts,
        places: Places,
        links: Links,
        tracking: Tracking,
        pins: Pins,
    ) -> None:
        assert node.file is not None
        self._node = node
        self._file = file
        self._header = header
        self._fields = fields
        self._commits = commits
        self._refcounts = refcounts
        self._tracking = tracking
        self._pins = pins
        in_flight = InFlight()
        self._cow = CopyOnWrite(
            node,
            node.file,
            links,
            refcounts,
            commits,
            places,
            in_flight,
            raw=header.raw_data_file,
        )
        self._zeroing = Zeroing(
            node, node.file, header, links, refcounts, commits, in_flight, self._cow, pins
        )
        self._bits = header.cluster_bits
        self._per_step = min(CLUSTERS_PER_STEP, _BYTES_PER_STEP >> self._bits)
        self._tasks: set[asyncio.Task[Any]] = set()
        # Writes that wait for the next batch, and where their outcome goes.
        self._gathered: list[tuple[Sequence[Piece], asyncio.Future[list[OSError | None]]]] = []
        self._begun = self._finished = self._stored = False
        self._beginning = asyncio.Lock()
        self._marking: asyncio.Task[None] | None = None  # once damage was found
        commits.release = self._release

    @classmethod
    async def open(
        cls,
        node: BlockNode,
        file: HostFile,
        data_file: HostFile | None,
        header: Header,
        mapping: Mapping,
        bitmaps: PersistentBitmaps,
        snapshots: Sequence[Snapshot],
        pins: Pins,
        memory: ChainMemory,
    ) -> Writer:
        """Find out where all metadata is. Nothing is written before the first change. Raises
        `CorruptImage` if some of it is in the place of other, or where nothing is.
        """
        fields = HeaderFields(file, header)
        places = Places(header.cluster_bits)
        lazy = Compatible.LAZY_REFCOUNTS in header.compatible
        most = memory.limits.changed_tables
        commits = Commits(file, data_file, fields, pins, lazy_refcounts=lazy, most_tables=most)
        memory.take(
            header.refcount_table_clusters << header.cluster_bits, "refcount table", file.path
        )
        refcounts = await Refcounts.open(file, header, commits, places)
        if refcounts.end - file.size() >= header.cluster_size:
            log.warning(
                "%s: the file was cut short: what was in clusters past its end reads as zeroes"
                " (pynbd check tells more)",
                file.path,
            )
        links = Links(
            file, Table(header.l1_table_offset, mapping.l1), mapping, refcounts, commits, places
        )
        tracking = await Tracking.open(
            file, header, bitmaps.stored, refcounts, commits, places, memory
        )
        places.add(0, header.cluster_size, "header")
        if header.bitmaps and bitmaps.stored:
            extension = header.bitmaps
            places.add(extension.directory_offset, extension.directory_size, "bitmap directory")
        await _add_snapshots(places, file, header, snapshots)
        places.seal()
        for problem in places.overlaps():
            raise CorruptImage(f"{file.path}: {problem} (pynbd check tells more; -r reads it)")
        for what, offset, entries in (
            ("L1 table", header.l1_table_offset, header.l1_size),
            ("refcount table", header.refcount_table_offset, header.refcount_table_clusters),
        ):
            if entries and offset >= file.size():  # writing it would make the file as long
                raise CorruptImage(
                    f"{file.path}: the {what} at {offset:#x} is past the end of the file"
                    " (pynbd check tells more; -r reads it)"
                )
        return cls(node, file, header, fields, commits, refcounts, places, links, tracking, pins)

    # Changes

    async def pwrite_batch(self, pieces: Sequence[Piece], *, fua: bool) -> list[OSError | None]:
        """Write each piece; what went wrong with each."""
        try:
            await self._begin()
        except OSError as refusal:
            return [refusal for _ in pieces]
        results: list[OSError | None] = [None] * len(pieces)
        direct: list[tuple[Buffer, int]] = []
        owners: list[int] = []
        others: list[int] = []
        for index, (offset, data) in enumerate(pieces):
            self._tracking.record(offset, len(data))
            places = None
            if len(data) >> self._bits < _CLUSTERS_IN_PLACE:
                places = self._cow.in_place(offset, data)
            if places is None:
                others.append(index)
            else:
                direct += places
                owners += [index] * len(places)
        allocated = None
        if others:
            allocated = self._allocate([pieces[index] for index in others])
        if direct:
            errors = await self._in_place(direct)
            for index, error in zip(owners, errors, strict=True):
                results[index] = results[index] or error
        if allocated:
            errors = await _outcome(allocated)
            for index, error in zip(others, errors, strict=True):
                results[index] = error
        if fua and not all(results):
            only_data = not others and not self._commits.pending
            assert self._node.file is not None
            try:
                await (self._node.file.flush() if only_data else self.flush())
            except OSError as failure:
                return [earlier or failure for earlier in results]
        return results

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Write to clusters that are all there, if nobody has to be waited for."""
        if not self._begun or self._finished or self._marking is not None:
            return False
        if self._file.sync_failed:
            return False  # which the file of the data does not know
        places = self._cow.in_place(offset, data)
        if places is None:
            return False
        self._tracking.record(offset, len(data))
        assert self._node.file is not None
        return all(self._node.file.put_now(part, at) for part, at in places)

    async def write_zeroes(self, offset: int, length: int, space: Space, *, fast: bool) -> None:
        """`Zeroing.zero`."""
        await self._begin()
        if fast and not await self._zeroing.is_fast(offset, length, space):
            raise OSError(errno.EOPNOTSUPP, "zeroes would have to be written", self._node.name)
        self._tracking.record(offset, length)
        await self._apart(self._zeroing.zero(offset, length, space, fast=fast))

    async def discard(self, offset: int, length: int) -> None:
        """`Zeroing.discard`."""
        await self._begin()
        self._tracking.record(offset, length)
        await self._apart(self._zeroing.discard(offset, length))

    async def flush(self) -> None:
        """Every completed change onto stable storage."""
        await self._apart(self._commits.commit())

    @property
    def unfinished(self) -> bool:
        """Whether there is something to `finish`, and that has not succeeded."""
        return (self._begun or self._tracking.in_use) and not self._stored

    async def finish(self) -> None:
        """Store the bitmaps, write all metadata, give back what is not needed. ``OSError`` if that
        fails.
        """
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._finished or not self.unfinished:
            return
        self._finished = True
        try:
            if self._marking is None:
                await self._tracking.store()
        except CorruptImage as error:
            raise await self._damaged(error) from error
        finally:
            await self._commits.finish()
            await self._refcounts.finish()
        self._stored = True

    async def _begin(self) -> None:
        """Before any change: whether there may be one, and what the first one needs."""
        if self._marking is not None:
            await asyncio.shield(self._marking)
            problem = "the image turned read-only when damage was found in it"
            raise OSError(errno.EROFS, problem, self._file.path)
        if self._finished:
            raise OSError(errno.EBADF, "the image was closed", self._file.path)
        for file in self._node.files():
            if file.sync_failed:
                problem = "an earlier flush failed; data may be lost"
                raise OSError(errno.EIO, problem, file.path)
        if self._begun:
            return
        async with self._beginning:
            if not self._begun:
                known = self._fields.autoclear & _KNOWN_AUTOCLEAR
                if known != self._fields.autoclear:
                    await self._fields.set_autoclear(known)
                    await self._commits.barrier(Rule.AUTOCLEAR)
                await self._tracking.begin()
                self._begun = True

    async def _in_place(self, writes: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        """Write to host clusters that were looked up in this step of the loop."""
        assert self._node.file is not None
        errors = self._node.file.write_now(writes)
        if errors is not None:
            return errors
        pinned = self._pins.hold()
        pinned.begin()
        writing = self._node.file.start_write_batch(writes)
        # The call outlives a request that is cancelled, and where it writes stays pinned so long.
        writing.add_done_callback(lambda _: pinned.end())
        return await asyncio.shield(writing)

    def _allocate(
        self, pieces: Sequence[Piece]
    ) -> Finished[list[OSError | None]] | asyncio.Future[list[OSError | None]]:
        """`_allocating`, at once, or together with all others that come while batches are on their
        way to the file: this takes one write at a time, and many cost little more than one.
        """
        assert self._node.file is not None
        if self._cow.writing < _BATCHES or not self._node.file.writes_in_turn:
            return self._start(self._allocating(pieces))
        results: asyncio.Future[list[OSError | None]] = asyncio.get_running_loop().create_future()
        self._gathered.append((pieces, results))
        return results

    async def _allocate_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        try:
            pieces = [piece for batch, _ in gathered for piece in batch]
            errors = iter(await self._allocating(pieces))
            for batch, results in gathered:
                results.set_result([next(errors) for _ in batch])
        except Exception as defect:
            for _, results in gathered:
                if not results.done():
                    results.set_exception(defect)
            raise

    async def _allocating(self, pieces: Sequence[Piece]) -> list[OSError | None]:
        """Write pieces that may need new clusters, so many clusters at a time."""
        results: list[OSError | None] = [None] * len(pieces)
        for number, (indexes, step) in enumerate(self._steps(pieces)):
            if number:
                await asyncio.sleep(0)  # small clusters go to the file without a wait
            try:
                await self._begin()  # again: damage may have been found since
                errors = await self._cow.write(step)
                if self._commits.much:
                    await self._commits.commit()
            except CorruptImage as damage:
                errors = [await self._damaged(damage)] * len(step)
            except OSError as error:
                if len(step) == 1:
                    errors = [error]
                else:  # nothing was linked; which of them it was is found out one by one
                    errors = [each for one in step for each in await self._allocating([one])]
            for index, failed in zip(indexes, errors, strict=True):
                results[index] = results[index] or failed
        return results

    def _steps(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[int], list[Piece]]]:
        """(numbers of the pieces, pieces or parts of them) for each step."""
        if sum((len(data) >> self._bits) + 2 for _, data in pieces) <= self._per_step:
            yield list(range(len(pieces))), list(pieces)
            return
        indexes: list[int] = []
        step: list[Piece] = []
        room = self._per_step
        for index, (offset, data) in enumerate(pieces):
            view = memoryview(data)
            while len(view):
                count = min(len(view), (room << self._bits) - (offset & (1 << self._bits) - 1))
                indexes.append(index)
                step.append((offset, view[:count]))
                room -= (offset + count - 1 >> self._bits) - (offset >> self._bits) + 1
                offset, view = offset + count, view[count:]
                if room <= 0:
                    yield indexes, step
                    indexes, step, room = [], [], self._per_step
        if step:
            yield indexes, step

    # Tasks that end

    def _start(self, work: Coroutine[Any, Any, T]) -> Finished[T] | asyncio.Task[T]:
        """Take the first step of ``work``; if that is not all, a task does the rest."""
        step = first_step(work)
        if isinstance(step, Finished):
            return step
        task = asyncio.get_running_loop().create_task(awaited(step))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it was seen, even if nobody waits for it any more
        if self._gathered and self._cow.writing < _BATCHES:
            self._start(self._allocate_gathered())

    async def _apart(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` to its end, even if nobody waits for it any more."""
        try:
            await _outcome(self._start(work))
        except CorruptImage as error:
            raise await self._damaged(error) from error

    # Damage

    async def _release(self, ranges: Sequence[HostRange]) -> None:
        try:
            await self._refcounts.release(ranges)
        except CorruptImage as error:
            await self._damaged(error)
        except OSError as error:
            log.warning("%s: freed clusters stay allocated: %s", self._file.path, error)

    async def _damaged(self, damage: CorruptImage) -> OSError:
        """The image contradicts itself: it is not written any more, and says so."""
        if self._marking is None:
            log.error("%s; the image is only read from now on (pynbd check tells more)", damage)
            self._marking = asyncio.get_running_loop().create_task(self._mark_corrupt())
        await asyncio.shield(self._marking)
        return OSError(errno.EIO, str(damage), self._file.path)

    async def _mark_corrupt(self) -> None:
        try:
            if self._fields.version >= 3:
                await self._fields.set_incompatible(Incompatible.CORRUPT, on=True)
                await self._commits.barrier(Rule.CORRUPT)
        except OSError as error:
            log.error("%s: it could not be marked corrupt: %s", self._file.path, error)


async def _outcome(step: Finished[T] | asyncio.Future[T]) -> T:
    return step.value if isinstance(step, Finished) else await asyncio.shield(step)


async def _add_snapshots(
    places: Places, file: HostFile, header: Header, snapshots: Sequence[Snapshot]
) -> None:
    """The places of the snapshot table, and of the snapshots' L1 and L2 tables."""
    if not snapshots:
        return
    places.add(header.snapshots_offset, table_length(snapshots), "snapshot table")
    left = _SNAPSHOT_L1_BYTES
    for snapshot in snapshots:
        what = f"L1 table of {snapshot}"
        length = snapshot.l1_size * L1E_SIZE
        places.add(snapshot.l1_table_offset, length, what)
        if length <= left:
            left -= max(length, LEAST_READ)
            l1 = await read_table(file, snapshot.l1_table_offset, snapshot.l1_size)
            named = l1 & np.uint64(L1E_OFFSET_MASK)
            places.add_unchanging(f"L2 table of {snapshot}", named)
        await asyncio.sleep(0)
