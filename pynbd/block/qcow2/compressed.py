"""The compressed clusters of an image: those decompressed last, and the hops that decompress more.

docs/interop/qcow2.rst, "Compressed Clusters Descriptor". Rules:

1. What was decompressed is kept, bounded in bytes; the least recently used goes first. Requests
   that want the same cluster at the same time share one decompression; a failure is not remembered.
2. Compressed bytes that are in the page cache are read in the loop, as everywhere; nothing is
   decompressed there.
3. A hop into the pool costs as much as a cluster: what one turn of the loop asks for is shared out
   among the processors, many clusters a hop, and what comes while all are busy waits for the next
   hop. So the pool is never full of them, and a hop is short.
4. Nobody decompresses what nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from pynbd.block.engine import NOWAIT_MAX, Buffer, HostFile
from pynbd.block.qcow2.compression import decompress_all
from pynbd.block.qcow2.entries import compressed_range
from pynbd.block.qcow2.format import CompressionType
from pynbd.errors import CorruptImage

# Decompressed clusters that are kept for the next request.
CACHE_BYTES = 16 << 20
# What one hop decompresses, in bytes of clusters (at least one): about half a millisecond's work.
HOP_BYTES = 1 << 19
# Hops of one image at the same time. The pool has twice as many threads, for the disk.
HOPS = min(os.cpu_count() or 1, 4)


# A cluster, `CorruptImage` for a damaged stream, or what the disk said.
Outcome = memoryview | CorruptImage | OSError


class Place(NamedTuple):
    """Where the data of a cluster are: host bytes [start, end)."""

    descriptor: int
    start: int
    end: int


class CompressedClusters:
    """The decompressed clusters of an image, by their descriptor in the L2 entry.

    ``loads`` counts what was decompressed.
    """

    def __init__(
        self, file: HostFile, compression_type: CompressionType, cluster_bits: int
    ) -> None:
        self._file = file
        self._type = compression_type
        self._bits = cluster_bits
        self._most_kept = max(CACHE_BYTES >> cluster_bits, 1)
        self._in_hop = max(HOP_BYTES >> cluster_bits, 1)
        self._kept: OrderedDict[int, memoryview] = OrderedDict()
        # Who waits for each cluster that is being read or decompressed.
        self._waiting: dict[int, list[asyncio.Future[Outcome]]] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._read: deque[tuple[int, memoryview]] = deque()  # and not decompressed yet
        self._hops = 0
        self._hop_soon = False
        self.loads = 0

    def __len__(self) -> int:
        return len(self._kept)

    def start(self, descriptors: Iterable[int]) -> list[memoryview | asyncio.Future[Outcome]]:
        """Each cluster, or a future of the caller's own, who cancels it if he does not wait."""
        loop = asyncio.get_running_loop()
        started: list[memoryview | asyncio.Future[Outcome]] = []
        wanted: list[int] = []
        for descriptor in descriptors:
            cluster = self._kept.get(descriptor)
            if cluster is not None:
                self._kept.move_to_end(descriptor)
                started.append(cluster)
                continue
            waiter: asyncio.Future[Outcome] = loop.create_future()
            started.append(waiter)
            waiters = self._waiting.get(descriptor)
            if waiters is None:
                self._waiting[descriptor] = [waiter]
                wanted.append(descriptor)
            else:
                waiters.append(waiter)
        for group in self._neighbours(wanted):
            self._read_group(loop, group)
        return started

    def _neighbours(self, descriptors: Iterable[int]) -> Iterator[list[Place]]:
        """The places of compressed data, those together that one call reads."""
        group: list[Place] = []
        for descriptor in descriptors:
            start, length = compressed_range(descriptor, self._bits)
            end = start + length
            # Two neighbours may share a sector: one ends and the other begins in it.
            if group and not (
                group[-1].start < start <= group[-1].end and end - group[0].start <= NOWAIT_MAX
            ):
                yield group
                group = []
            group.append(Place(descriptor, start, end))
        if group:
            yield group

    def _read_group(self, loop: asyncio.AbstractEventLoop, group: list[Place]) -> None:
        data = memoryview(bytearray(group[-1].end - group[0].start))
        done = self._file.read_now(data, group[0].start)
        if done == len(data):
            self._was_read(group, data)
        else:
            task = loop.create_task(self._read_rest(group, data, done))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    async def _read_rest(self, group: list[Place], data: memoryview, done: int) -> None:
        try:
            # The last sector may reach past the end of the file.
            await self._file.read(data[done:], group[0].start + done)
        except OSError as error:
            if len(group) == 1:
                self._finish(group[0].descriptor, error)
            for place in group if len(group) > 1 else ():  # a bad sector fails alone
                await self._read_rest([place], memoryview(bytearray(place.end - place.start)), 0)
        else:
            self._was_read(group, data)

    def _was_read(self, group: list[Place], data: memoryview) -> None:
        base = group[0].start
        for place in group:
            self._read.append((place.descriptor, data[place.start - base : place.end - base]))
        if len(self._read) > self._in_hop // 2:  # the rest of this turn need not wait for them
            self._hop()
        elif not self._hop_soon:
            self._hop_soon = True
            asyncio.get_running_loop().call_soon(self._hop)

    def _hop(self) -> None:
        """Start as many hops as there may be, and as there is work for."""
        self._hop_soon = False
        while self._read and self._hops < HOPS:
            share = -(-len(self._read) // (HOPS - self._hops))
            batch: list[tuple[int, memoryview]] = []
            while self._read and len(batch) < min(share, self._in_hop):
                descriptor, data = self._read.popleft()
                if all(waiter.done() for waiter in self._waiting[descriptor]):
                    del self._waiting[descriptor]  # all of them were cancelled
                else:
                    batch.append((descriptor, data))
            if batch:
                self._hops += 1
                self.loads += len(batch)
                hop = self._file.engine.start(
                    decompress_all, self._type, [data for _, data in batch], 1 << self._bits
                )
                hop.add_done_callback(partial(self._landed, [place for place, _ in batch]))

    def _landed(
        self,
        descriptors: Sequence[int],
        hop: asyncio.Future[list[Buffer | CorruptImage]],
    ) -> None:
        self._hops -= 1
        try:
            outcomes = hop.result()
        except asyncio.CancelledError:  # the engine was closed
            for descriptor in descriptors:
                for waiter in self._waiting.pop(descriptor):
                    waiter.cancel()
            return
        for descriptor, outcome in zip(descriptors, outcomes, strict=True):
            if isinstance(outcome, CorruptImage):
                self._finish(descriptor, outcome)
                continue
            cluster = self._kept[descriptor] = memoryview(outcome)
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
            self._finish(descriptor, cluster)
        self._hop()

    def _finish(self, descriptor: int, outcome: Outcome) -> None:
        for waiter in self._waiting.pop(descriptor):
            if not waiter.done():
                waiter.set_result(outcome)
