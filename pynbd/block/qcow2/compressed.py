"""The compressed clusters of an image: those decompressed last, and the hops that decompress more.

docs/interop/qcow2.rst, "Compressed Clusters Descriptor". Rules:

1. What was decompressed is kept, bounded in bytes; the least recently used goes first. Requests
   that want the same cluster at the same time share one decompression; a failure is not remembered.
2. Who is the first to want a cluster gets its beginning, as far as he needs it, where that is less
   work (deflate); who wants more of it later gets all of it. So nothing is decompressed more than
   twice.
3. Compressed bytes that are in the page cache are read in the loop, as everywhere, and in each of
   its turns a few clusters are decompressed there, as a hop into the pool takes longer than a
   cluster: within the share that all images have together, and never what needs care. Short reads
   come first, which then need not wait at all (`read_now`).
4. The rest goes to the pool, where threads that decompress fight each other and the loop for the
   interpreter. So there are no more lanes than other processors; a call that begins takes all that
   was read by then, up to about half a millisecond's work, and the next call of its lane follows
   without a hop; a further lane begins only for what those to come will leave. An image
   never fills the pool with them.
5. What is read ahead of its turn is bounded as what is kept, for all layers of a chain together: a
   request for four bytes may need a cluster of two megabytes (`Backlog`).
6. Nobody reads or decompresses what nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from math import inf
from typing import NamedTuple

from pynbd.block.engine import NOWAIT_MAX, Buffer, HostFile
from pynbd.block.limits import Backlog, Budget
from pynbd.block.pool import Lane
from pynbd.block.qcow2.compression import cost, decompress, decompress_all
from pynbd.block.qcow2.entries import compressed_range
from pynbd.block.qcow2.format import SECTOR, CompressionType
from pynbd.block.qcow2.loop_share import (
    LOOP_SHARE,
    MOST_COST,
    TURN_BYTES,
    TURN_CLUSTERS,
    TURN_SECONDS,
)
from pynbd.errors import CorruptImage

log = logging.getLogger("pynbd")

# What one hop decompresses, in bytes of clusters (at least one): about half a millisecond's work.
HOP_BYTES = 1 << 19
# Nor more clusters than these, as small ones cost more than their bytes.
HOP_CLUSTERS = 64
# Lanes of one image. The pool has at least twice as many threads, for the disk.
HOPS = max(min((os.cpu_count() or 1) - 1, 4), 1)

# A cluster, or as much of it as is needed; `CorruptImage` for a damaged stream; or what the disk
# said.
Outcome = memoryview | CorruptImage | OSError
Waiter = asyncio.Future[Outcome]


class Wanted:
    """A cluster that is being read or decompressed, and who waits for how many bytes of it."""

    __slots__ = ("care", "data", "descriptor", "held", "length", "waiters")

    def __init__(self, descriptor: int, length: int) -> None:
        self.descriptor = descriptor
        self.length = length  # the most that a waiter needs
        self.data = memoryview(b"")  # compressed
        self.held = 0  # bytes of it in memory, or soon
        self.care = False  # the loop has tried it
        self.waiters: list[tuple[Waiter, int]] = []

    def is_wanted(self) -> bool:
        return not all(waiter.done() for waiter, _ in self.waiters)


class Place(NamedTuple):
    """Where the data of a cluster are: host bytes [start, end)."""

    wanted: Wanted
    start: int
    end: int


# What a hop brings; None: nobody waited for it any more.
Hop = list[tuple[Wanted, Buffer | CorruptImage | OSError | None]]


class CompressedClusters:
    """The decompressed clusters of an image, by their descriptor in the L2 entry.

    ``loads`` counts what was decompressed.
    """

    def __init__(
        self,
        file: HostFile,
        compression_type: CompressionType,
        cluster_bits: int,
        kept: Budget,
        backlog: Backlog,
    ) -> None:
        self._file = file
        self._type = compression_type
        self._bits = cluster_bits
        self._size = 1 << cluster_bits
        self._in_hop = min(max(HOP_BYTES >> cluster_bits, 1), HOP_CLUSTERS)
        self._in_turn = min(TURN_BYTES >> cluster_bits, TURN_CLUSTERS)
        self._kept: OrderedDict[int, memoryview] = OrderedDict()
        self._budget = kept
        self._backlog = backlog
        self._waiting: dict[int, Wanted] = {}
        self._unread: deque[list[Place]] = deque()
        self._reading: set[asyncio.Task[None]] = set()
        # What was read and not decompressed yet: what the loop may do, and what it may not.
        self._read: deque[Wanted] = deque()
        self._long: deque[Wanted] = deque()
        self._lanes = [Lane() for _ in range(HOPS)]
        self._to_come = [False] * HOPS  # whether a lane has a call that did not begin
        self._turn_soon = False
        self._stored = memoryview(bytearray(self._size + SECTOR if self._in_turn else 0))
        self.loads = 0

    def __len__(self) -> int:
        return len(self._kept)

    def read_now(self, descriptor: int, first: int, view: memoryview) -> bool:
        """Fill ``view`` with bytes from ``first`` on of a cluster, which has as many. False if it
        is not kept, and cannot be had in this turn of the loop; or if it is damaged, which `start`
        tells.
        """
        end = first + len(view)
        cluster = self._kept.get(descriptor)
        if cluster is not None and len(cluster) >= end:
            self._kept.move_to_end(descriptor)
        else:
            cluster = self._decompress_now(descriptor, self._size if cluster else end)
            if cluster is None:
                return False
        view[:] = cluster[first:end]
        return True

    def _decompress_now(self, descriptor: int, length: int) -> memoryview | None:
        start, stored = compressed_range(descriptor, self._bits)
        if (
            descriptor in self._waiting
            or cost(self._type, stored, length, self._size) > MOST_COST
            or not LOOP_SHARE.allows(self._size)
        ):
            return None
        data = self._stored[:stored]
        if self._file.read_now(data, start) < stored:
            return None
        LOOP_SHARE.take(self._size)
        (outcome,) = self._decompressed([(data, length)])
        if outcome is None or isinstance(outcome, Exception):
            return None
        self.loads += 1
        return self._keep(descriptor, memoryview(outcome))

    def start(self, pieces: Iterable[tuple[int, int]]) -> list[memoryview | Waiter]:
        """For each (descriptor, length): the first ``length`` bytes of that cluster at least, or a
        future of the caller's own, who cancels it if he does not wait.
        """
        loop = asyncio.get_running_loop()
        started: list[memoryview | Waiter] = []
        new: list[Wanted] = []
        for descriptor, length in pieces:
            cluster = self._kept.get(descriptor)
            if cluster is not None:
                if length <= len(cluster):
                    self._kept.move_to_end(descriptor)
                    started.append(cluster)
                    continue
                length = self._size  # rule 2
            waiter: Waiter = loop.create_future()
            started.append(waiter)
            wanted = self._waiting.get(descriptor)
            if wanted is None:
                wanted = self._waiting[descriptor] = Wanted(descriptor, length)
                new.append(wanted)
            elif wanted.length < length:
                wanted.length = length
            wanted.waiters.append((waiter, length))
        self._unread += self._neighbours(new)
        self.read_more()
        return started

    def _neighbours(self, new: Iterable[Wanted]) -> Iterator[list[Place]]:
        """The places of compressed data, those together that one call reads."""
        group: list[Place] = []
        for wanted in new:
            start, length = compressed_range(wanted.descriptor, self._bits)
            end = start + length
            # Two neighbours may share a sector: one ends and the other begins in it.
            if group and not (
                group[-1].start < start <= group[-1].end <= end
                and end - group[0].start <= NOWAIT_MAX
            ):
                yield group
                group = []
            group.append(Place(wanted, start, end))
        if group:
            yield group

    def read_more(self) -> None:
        """Read what is wanted, as much of it as may wait for its turn."""
        backlog = self._backlog
        while self._unread and backlog.held < backlog.limit:
            group = self._unread.popleft()
            if any(place.wanted.is_wanted() for place in group):
                self._read_group(group)
            else:
                for place in group:
                    self._finish(place.wanted, None)
        if self._unread:
            backlog.waiting[self] = None

    def _read_group(self, group: list[Place]) -> None:
        for wanted, start, end in group:
            wanted.held = end - start
            self._backlog.held += wanted.held
        data = memoryview(bytearray(group[-1].end - group[0].start))
        done = self._file.read_now(data, group[0].start)
        if done == len(data):
            self._was_read(group, data)
        else:
            reading = self._read_rest(group, data, done)
            task = asyncio.get_running_loop().create_task(reading)
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    async def _read_rest(self, group: list[Place], data: memoryview, done: int) -> None:
        try:
            # The last sector may reach past the end of the file.
            await self._file.read(data[done:], group[0].start + done)
        except OSError as error:
            if len(group) == 1:
                self._finish(group[0].wanted, error)
                self._backlog.go_on()
            for place in group if len(group) > 1 else ():  # a bad sector fails alone
                await self._read_rest([place], memoryview(bytearray(place.end - place.start)), 0)
        else:
            self._was_read(group, data)

    def _was_read(self, group: list[Place], data: memoryview) -> None:
        base = group[0].start
        for wanted, start, end in group:
            wanted.data = data[start - base : end - base]
            self._queue(wanted)
        self._send()
        self._have_turn()

    def _queue(self, wanted: Wanted) -> None:
        """It was read, and is to be decompressed."""
        most = cost(self._type, len(wanted.data), wanted.length, self._size)
        long = wanted.care or not self._in_turn or most > MOST_COST
        (self._long if long else self._read).append(wanted)

    def _have_turn(self) -> None:
        if self._read and not self._turn_soon:
            self._turn_soon = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Decompress as much as the loop may, and see to the rest."""
        self._turn_soon = False
        hop: Hop = []
        left = self._in_turn
        while left and self._read and LOOP_SHARE.allows(self._size):
            with suppress(IndexError):  # the lanes take, too
                left -= 1
                hop += self._decompress_in_turn(self._read.popleft())
        self._land(hop, in_turn=self._in_turn if hop else 0)
        self._have_turn()

    def _decompress_in_turn(self, wanted: Wanted) -> Hop:
        """One of this turn's share; nothing if it turns out to take too long."""
        LOOP_SHARE.take(self._size)
        hop = self._decompress([wanted])
        if hop[0][1] is None and wanted.is_wanted():
            wanted.care = True
            self._queue(wanted)
            return []
        return hop

    def _send(self, in_turn: int | None = None) -> None:
        """See that there are calls to come for what the loop will not do in its turn."""
        most = self._in_turn if in_turn is None else in_turn
        left = len(self._long) + max(len(self._read) - most, 0)
        calls = -(-left // self._in_hop) - sum(self._to_come)
        for lane in range(HOPS):
            if calls > 0 and not self._to_come[lane]:
                calls -= 1
                self._to_come[lane] = True
                hop = self._file.engine.start_in_lane(
                    self._lanes[lane], self._decompress_in_lane, lane
                )
                hop.add_done_callback(self._landed)

    def _decompress_in_lane(self, lane: int) -> Hop:
        """In the pool."""
        self._to_come[lane] = False
        taken: list[Wanted] = []
        for queue in (self._long, self._read):
            with suppress(IndexError):  # the others take, too
                while len(taken) < self._in_hop:
                    taken.append(queue.popleft())
        return self._decompress(taken, with_care=True)

    def _decompress(self, taken: Sequence[Wanted], *, with_care: bool = False) -> Hop:
        """What becomes of those that are still wanted."""
        batch = [wanted for wanted in taken if wanted.is_wanted()]
        streams = [(wanted.data, wanted.length) for wanted in batch]
        outcomes = self._decompressed(streams, with_care=with_care)
        hop: Hop = [*zip(batch, outcomes, strict=True)]
        return hop + [(wanted, None) for wanted in taken if wanted not in batch]

    def _decompressed(
        self, streams: Sequence[tuple[memoryview, int]], *, with_care: bool = False
    ) -> Sequence[Buffer | CorruptImage | OSError | None]:
        """`decompress_all`, and the rest ``with_care``, which may take long; who waits is told of a
        failure that nobody thought of, too.
        """
        try:
            patience = inf if with_care else TURN_SECONDS
            clusters = decompress_all(self._type, streams, self._size, patience) if streams else []
            if not with_care:
                return clusters
            return [
                self._decompressed_with_care(stream) if cluster is None else cluster
                for cluster, (stream, _) in zip(clusters, streams, strict=True)
            ]
        except MemoryError:
            return [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))] * len(streams)
        except Exception as defect:
            log.exception("%s: a compressed cluster", self._file.path)
            return [OSError(errno.EIO, f"internal error: {defect!r}")] * len(streams)

    def _decompressed_with_care(self, stream: memoryview) -> Buffer | CorruptImage:
        try:
            return decompress(self._type, stream, self._size)
        except CorruptImage as error:
            return error

    def _landed(self, hop: asyncio.Future[Hop]) -> None:
        try:
            landed = hop.result()
        except asyncio.CancelledError:  # the engine was closed
            self._read.clear()
            self._long.clear()
            self._unread.clear()
            while self._waiting:
                for waiter, _ in self._waiting.popitem()[1].waiters:
                    waiter.cancel()
        else:
            self._land(landed)
            self._have_turn()

    def _land(self, landed: Hop, in_turn: int | None = None) -> None:
        for wanted, outcome in landed:
            self.loads += outcome is not None
            if outcome is None or isinstance(outcome, Exception):
                self._finish(wanted, outcome)
            else:
                self._finish(wanted, self._keep(wanted.descriptor, memoryview(outcome)))
        self._backlog.go_on()
        self._send(in_turn)

    def _keep(self, descriptor: int, cluster: memoryview) -> memoryview:
        before = self._kept.pop(descriptor, b"")
        self._kept[descriptor] = cluster
        self._budget.keep(self, len(cluster) - len(before))
        return cluster

    def drop_oldest(self) -> int:
        """As `Keeper` has it."""
        return len(self._kept.popitem(last=False)[1])

    def _finish(self, wanted: Wanted, outcome: Outcome | None) -> None:
        del self._waiting[wanted.descriptor]
        late: list[tuple[Waiter, int]] = []
        for waiter, length in wanted.waiters:
            if waiter.done():
                continue
            if outcome is None or (isinstance(outcome, memoryview) and len(outcome) < length):
                late.append((waiter, length))  # he came when it was being decompressed already
            else:
                waiter.set_result(outcome)
        if late:
            wanted.waiters, wanted.length = late, self._size
            self._waiting[wanted.descriptor] = wanted
            self._queue(wanted)
        else:
            self._backlog.held -= wanted.held
