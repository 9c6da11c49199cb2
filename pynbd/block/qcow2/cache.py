"""What was read from an image before and may be needed again: tables, decompressed clusters,
bitmaps.

They are read whole, by many requests at once, and in any order. Rules: the memory is bounded, the
least recently used goes first; requests that want the same thing at the same time share one read; a
failed read is not remembered.

Tables are changed in memory, and written by `pynbd.block.qcow2.commit` alone. Of a table there is
one `Table` as long as anybody has it, in the cache or not: what one writer changes all others see.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.limits import Budget
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.format import MAX_OFFSET
from pynbd.block.qcow2.widths import Values, decode, encode

T = TypeVar("T")


class SharedReads(Generic[T]):
    """The last used results of ``read(key)``, each read once however many wait for it.

    ``limit`` of them are kept or, where ``weigh`` tells the weight of a result, so many that they
    weigh no more together, or with those of others in one `Budget`; the last one is kept in any
    case. ``lookups`` and ``loads`` count what was asked for and what was read.
    """

    def __init__(
        self,
        read: Callable[[int], Awaitable[T]],
        limit: int | Budget,
        weigh: Callable[[T], int] = lambda _: 1,
    ) -> None:
        self._read = read
        self._budget = limit if isinstance(limit, Budget) else Budget(limit)
        self._weigh = weigh
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
        weight = self._weigh(result)
        if key in self._kept:
            weight -= self._weigh(self._kept.pop(key))
        self._kept[key] = result
        self._budget.keep(self, weight)

    def drop_oldest(self) -> int:
        """As `Keeper` has it."""
        return self._weigh(self._kept.popitem(last=False)[1])


# What reading a short table counts as, where tables of all lengths are read while there are not too
# many bytes of them.
LEAST_READ = 4096
# What is written of a changed table: whole pages of it.
PAGE = 4096


class Table:
    """A table of the image in memory: ``values``, entries of ``bits`` bits in native byte order.

    ``pages``: the numbers of its pages that were changed and not written. ``checked``: its place
    was compared with that of all other metadata, and an L2 table names none beyond the end of the
    file. Tables are compared by identity.
    """

    __slots__ = ("__weakref__", "bits", "checked", "host_offset", "pages", "values")

    def __init__(self, host_offset: int, values: Values, bits: int = 64) -> None:
        self.host_offset = host_offset
        self.values = values
        self.bits = bits
        self.pages: set[int] = set()
        self.checked = False

    @property
    def length(self) -> int:
        """In bytes."""
        return len(self.values) * self.bits // 8

    def changed(self, first: int, last: int) -> None:
        """Entries [first, last) were changed; there is at least one."""
        in_page = PAGE * 8 // self.bits
        self.pages.update(range(first // in_page, (last - 1) // in_page + 1))

    def changed_as_a_whole(self) -> None:
        """None of it is on disk."""
        self.pages.update(range(-(-self.length // PAGE)))

    def take_pages(self) -> list[tuple[bytes, int]]:
        """(data, host offset) of the changed pages as they are now; neighbours go together."""
        pages, self.pages = sorted(self.pages), set()
        stretches: list[list[int]] = []
        for page in pages:
            if stretches and stretches[-1][1] == page:
                stretches[-1][1] += 1
            else:
                stretches.append([page, page + 1])
        return [self._encoded(first, last) for first, last in stretches]

    def _encoded(self, first: int, last: int) -> tuple[bytes, int]:
        """Pages [first, last)."""
        in_page = PAGE * 8 // self.bits
        data = encode(self.values[first * in_page : last * in_page], self.bits)
        return data, self.host_offset + first * PAGE


class TableCache(SharedReads[Table]):
    """Tables of ``table_bytes`` by their host offset, with entries of ``bits`` bits. The limit is
    in bytes.
    """

    def __init__(
        self,
        file: HostFile,
        table_bytes: int,
        limit: int | Budget,
        bits: int = 64,
    ) -> None:
        super().__init__(self._read_table, limit, lambda table: table.length)
        self._file = file
        self._table_bytes = table_bytes
        self._bits = bits
        self._alive: WeakValueDictionary[int, Table] = WeakValueDictionary()

    async def _read_table(self, host_offset: int) -> Table:
        table = self._alive.get(host_offset)
        if table is None:
            data = bytearray(self._table_bytes)
            await self._file.read(memoryview(data), host_offset)
            table = self._alive[host_offset] = Table(
                host_offset, decode(data, self._bits), self._bits
            )
        return table

    def at_hand(self, host_offset: int) -> Table | None:
        """The table at a place, if it is in memory."""
        return self._alive.get(host_offset)

    def add(self, table: Table) -> None:
        """A new table, which is not on disk yet; what was in its place is there no more."""
        self._alive[table.host_offset] = table
        self._keep(table.host_offset, table)


async def read_table(file: HostFile, host_offset: int, entries: int) -> UInt64s:
    """Read 64-bit entries, into native byte order. Past the end of the file they are zero."""
    values = np.zeros(entries, np.uint64)
    if host_offset <= MAX_OFFSET - values.nbytes:  # which the host could not even be asked for
        await file.read(values.view(np.uint8).data, host_offset)
    return values.byteswap(inplace=True) if sys.byteorder == "little" else values


async def read_up_to(file: HostFile, length: int, offset: int) -> bytearray:
    """Up to ``length`` bytes from ``offset``, fewer only at the end of the file: once in memory, as
    they may be many.
    """
    data = bytearray(length)
    count = await file.read(memoryview(data), offset)
    # Not made shorter in its place: a call in the pool may not have let go of it yet.
    return data if count == length else data[:count]
