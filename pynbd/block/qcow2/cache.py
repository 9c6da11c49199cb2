"""What was read from an image before and may be needed again: L2 tables, decompressed clusters,
bitmaps.

They are read whole, by many requests at once, and in any order. Rules: the memory is bounded, the
least recently used goes first; requests that want the same thing at the same time share one read; a
failed read is not remembered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.entries import UInt64s

T = TypeVar("T")

# Of L2 tables: the map of 128 GiB with clusters of 64 KiB.
TABLE_CACHE_BYTES = 16 << 20


class SharedReads(Generic[T]):
    """The last used results of ``read(key)``, each read once however many wait for it.

    ``limit`` of them are kept or, where ``weigh`` tells the weight of a result, so many that they
    weigh no more together; the last one is kept in any case. ``lookups`` and ``loads`` count what
    was asked for and what was read.
    """

    def __init__(
        self,
        read: Callable[[int], Awaitable[T]],
        limit: int,
        weigh: Callable[[T], int] = lambda _: 1,
    ) -> None:
        self._read = read
        self._limit = limit
        self._weigh = weigh
        self._weight = 0
        self._kept: OrderedDict[int, T] = OrderedDict()
        # Who waits for a read gets its result from there: it may be dropped before he has his turn.
        self._loading: dict[int, tuple[asyncio.Event, list[T]]] = {}
        self.lookups = 0
        self.loads = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def load(self, key: int) -> T:
        """The result for ``key``. Fails as its read fails."""
        self.lookups += 1
        while key not in self._kept:
            if key in self._loading:
                done, results = self._loading[key]
                await done.wait()
                if results:
                    return results[0]
                continue  # that read failed, or was cancelled: the next of those who wait tries
            done, results = self._loading[key] = asyncio.Event(), []
            try:
                self.loads += 1
                results.append(await self._read(key))
                self._keep(key, results[0])
                return results[0]
            finally:
                del self._loading[key]
                done.set()
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key: int, result: T) -> None:
        self._kept[key] = result
        self._weight += self._weigh(result)
        while self._weight > self._limit and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._weight -= self._weigh(dropped)


class TableCache(SharedReads[UInt64s]):
    """Tables of ``table_bytes`` by their host offset, as `read_table` reads them."""

    def __init__(
        self, file: HostFile, table_bytes: int, limit_bytes: int = TABLE_CACHE_BYTES
    ) -> None:
        super().__init__(
            lambda host_offset: read_table(file, host_offset, table_bytes // 8),
            limit_bytes // table_bytes,
        )


async def read_table(file: HostFile, host_offset: int, entries: int) -> UInt64s:
    """Read 64-bit entries, into native byte order. Past the end of the file they are zero."""
    data = bytearray(entries * 8)
    await file.read(memoryview(data), host_offset)
    return np.frombuffer(data, ">u8").astype(np.uint64)
