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
from collections.abc import Sequence
from functools import partial

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.compression import decompress
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
        self._read: deque[tuple[int, bytearray]] = deque()  # and not decompressed yet
        self._hops = 0
        self._hop_soon = False
        self.loads = 0

    def start(self, descriptor: int) -> memoryview | asyncio.Future[Outcome]:
        """The cluster, or a future of the caller's own, who cancels it if he does not wait."""
        cluster = self._kept.get(descriptor)
        if cluster is not None:
            self._kept.move_to_end(descriptor)
            return cluster
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Outcome] = loop.create_future()
        waiters = self._waiting.get(descriptor)
        if waiters is None:
            self._waiting[descriptor] = [waiter]
            self._start(loop, descriptor)
        else:
            waiters.append(waiter)
        return waiter

    def _start(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        host_offset, length = compressed_range(descriptor, self._bits)
        data = bytearray(length)
        done = self._file.read_now(data, host_offset)
        if done == length:
            self._was_read(descriptor, data)
        else:
            task = loop.create_task(self._read_rest(descriptor, data, host_offset, done))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    async def _read_rest(
        self, descriptor: int, data: bytearray, host_offset: int, done: int
    ) -> None:
        try:
            # The last sector may reach past the end of the file.
            await self._file.read(memoryview(data)[done:], host_offset + done)
        except OSError as error:
            self._finish(descriptor, error)
        else:
            self._was_read(descriptor, data)

    def _was_read(self, descriptor: int, data: bytearray) -> None:
        self._read.append((descriptor, data))
        if not self._hop_soon:
            self._hop_soon = True
            asyncio.get_running_loop().call_soon(self._hop)

    def _hop(self) -> None:
        """Start as many hops as there may be, and as there is work for."""
        self._hop_soon = False
        while self._read and self._hops < HOPS:
            share = -(-len(self._read) // (HOPS - self._hops))
            batch: list[tuple[int, bytearray]] = []
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
                    _decompress_all, self._type, [data for _, data in batch], 1 << self._bits
                )
                hop.add_done_callback(partial(self._landed, [place for place, _ in batch]))

    def _landed(
        self,
        descriptors: Sequence[int],
        hop: asyncio.Future[list[memoryview | CorruptImage]],
    ) -> None:
        self._hops -= 1
        if hop.cancelled():  # with the engine
            for descriptor in descriptors:
                for waiter in self._waiting.pop(descriptor):
                    waiter.cancel()
            return
        for descriptor, outcome in zip(descriptors, hop.result(), strict=True):
            if isinstance(outcome, memoryview):
                self._kept[descriptor] = outcome
                if len(self._kept) > self._most_kept:
                    self._kept.popitem(last=False)
            self._finish(descriptor, outcome)
        self._hop()

    def _finish(self, descriptor: int, outcome: Outcome) -> None:
        for waiter in self._waiting.pop(descriptor):
            if not waiter.done():
                waiter.set_result(outcome)


def _decompress_all(
    compression_type: CompressionType, streams: Sequence[bytearray], cluster_size: int
) -> list[memoryview | CorruptImage]:
    """What each stream holds, or what is wrong with it."""
    outcomes: list[memoryview | CorruptImage] = []
    for stream in streams:
        try:
            outcomes.append(memoryview(decompress(compression_type, stream, cluster_size)))
        except CorruptImage as error:
            outcomes.append(error)
    return outcomes
