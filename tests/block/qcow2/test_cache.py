"""SharedReads and TableCache: bounded, shared, least recently used first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.cache import SharedReads, Table, TableCache, read_table, read_up_to


class Slow:
    """A read that waits until it is let go, and may fail."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.go = asyncio.Event()
        self.failures = 0

    async def __call__(self, key: int) -> str:
        self.reads.append(key)
        await self.go.wait()
        if self.failures:
            self.failures -= 1
            raise OSError(5, "broken")
        return f"result {key}"


async def test_concurrent_loads_share_one_read() -> None:
    slow = Slow()
    shared = SharedReads(slow, 4)
    tasks = [asyncio.create_task(shared.load(7)) for _ in range(5)]
    await asyncio.sleep(0)
    slow.go.set()
    assert await asyncio.gather(*tasks) == ["result 7"] * 5
    assert slow.reads == [7]
    assert (shared.lookups, shared.loads) == (5, 1)


async def test_a_failure_is_not_remembered() -> None:
    slow = Slow()
    slow.failures = 1
    shared = SharedReads(slow, 4)
    tasks = [asyncio.create_task(shared.load(7)) for _ in range(3)]
    await asyncio.sleep(0)
    slow.go.set()
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, OSError)
    assert others == ["result 7"] * 2
    assert slow.reads == [7, 7]


@pytest.mark.parametrize("cancelled", [0, 1])
async def test_who_is_cancelled_takes_nobody_along(cancelled: int) -> None:
    """Neither the one who reads nor one who waits for him."""
    slow = Slow()
    shared = SharedReads(slow, 4)
    tasks = [asyncio.create_task(shared.load(7)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks.pop(cancelled).cancel()
    slow.go.set()
    assert await asyncio.gather(*tasks) == ["result 7"] * 2


async def test_the_least_recently_used_goes_first() -> None:
    slow = Slow()
    slow.go.set()
    shared = SharedReads(slow, 3)
    for key in (1, 2, 3, 1, 4):
        await shared.load(key)
    assert len(shared) == 3
    await shared.load(1)
    assert slow.reads == [1, 2, 3, 4]
    await shared.load(2)
    assert slow.reads == [1, 2, 3, 4, 2]


async def test_what_weighs_more_takes_the_place_of_several() -> None:
    """The last one is kept, whatever it weighs."""
    slow = Slow()
    slow.go.set()
    weights = {f"result {key}": key for key in range(1, 100)}
    shared = SharedReads(slow, 10, weights.__getitem__)
    for key, kept in ((3, 1), (4, 2), (2, 3), (5, 2), (99, 1), (1, 1), (9, 2)):
        await shared.load(key)
        assert len(shared) == kept
    await shared.load(1)
    assert slow.reads == [3, 4, 2, 5, 99, 1, 9]


async def test_who_waits_needs_no_second_read() -> None:
    """However many things are wanted at a time, and however few are kept."""
    slow = Slow()
    shared = SharedReads(slow, 1)
    keys = [1, 2, 3] * 10
    tasks = [asyncio.create_task(shared.load(key)) for key in keys]
    await asyncio.sleep(0)
    slow.go.set()
    assert await asyncio.gather(*tasks) == [f"result {key}" for key in keys]
    assert slow.reads == [1, 2, 3]
    assert len(shared) == 1


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "tables"
    path.write_bytes(bytes(range(64)) * 16)
    engine = Engine(1)
    file = HostFile.open(engine, str(path), writable=False)
    yield file
    file.close()
    engine.close()


async def test_entries_are_big_endian_on_disk(file: HostFile) -> None:
    table = await read_table(file, 8, 2)
    assert table.tolist() == [0x08090A0B0C0D0E0F, 0x1011121314151617]
    assert table.dtype.isnative


async def test_past_the_end_of_the_file_are_zeroes(file: HostFile) -> None:
    tables = TableCache(file, 512, 1 << 20)
    table = await tables.load(1024 - 8)
    assert table.values.tolist() == [0x38393A3B3C3D3E3F] + [0] * 63
    assert not (await tables.load(1 << 40)).values.any()


async def test_a_scan_stays_within_the_bound(file: HostFile) -> None:
    tables = TableCache(file, 64, 256)
    for host_offset in range(0, 1024, 64):
        await tables.load(host_offset)
        assert len(tables) <= 4
    assert tables.loads == 16


# Tables that change -------------------------------------------------------------------------------


def test_changed_pages_are_taken_once_and_neighbours_together() -> None:
    table = Table(0x50000, np.arange(8192, dtype=np.uint64))
    table.changed(0, 1)
    table.changed(511, 513)  # 512 entries of 64 bits are a page
    table.changed(8191, 8192)
    pieces = table.take_pages()
    assert [(len(data), offset) for data, offset in pieces] == [
        (8192, 0x50000),
        (4096, 0x50000 + 15 * 4096),
    ]
    assert pieces[0][0][8:16] == (1).to_bytes(8, "big")
    assert table.take_pages() == []


def test_what_is_taken_is_the_table_as_it_was() -> None:
    table = Table(0, np.zeros(512, np.uint64))
    table.changed(3, 4)
    ((data, _),) = table.take_pages()
    table.values[3] = 7
    assert not any(data)


@pytest.mark.parametrize(
    "bits, last_of_page_0", [(1, 32767), (2, 16383), (4, 8191), (16, 2047), (64, 511)]
)
def test_pages_of_entries_of_every_width(bits: int, last_of_page_0: int) -> None:
    values = np.zeros(3 * (last_of_page_0 + 1), f"u{max(bits // 8, 1)}")
    table = Table(0, values, bits)
    assert table.length == 3 * 4096
    table.changed(last_of_page_0, last_of_page_0 + 1)
    assert table.pages == {0}
    table.changed(last_of_page_0 + 1, last_of_page_0 + 2)
    assert table.pages == {0, 1}
    table.changed_as_a_whole()
    assert [(len(data), offset) for data, offset in table.take_pages()] == [(3 * 4096, 0)]


def test_a_table_that_is_shorter_than_a_page() -> None:
    table = Table(0x200, np.full(64, 5, np.uint64))
    table.changed_as_a_whole()
    assert table.take_pages() == [((5).to_bytes(8, "big") * 64, 0x200)]


async def test_a_table_that_somebody_has_is_never_read_again(file: HostFile) -> None:
    """What one writer changed is there for the next, though the cache dropped it."""
    tables = TableCache(file, 512, 1024)
    mine = await tables.load(0)
    mine.values[0] = 99
    for number in range(1, 5):
        await tables.load(number * 512)
    assert await tables.load(0) is mine
    assert tables.at_hand(0) is mine


async def test_a_new_table_takes_the_place_of_one_that_is_gone(file: HostFile) -> None:
    tables = TableCache(file, 512, 1024)
    await tables.load(512)
    new = Table(512, np.full(64, 7, np.uint64))
    tables.add(new)
    assert await tables.load(512) is new
    await tables.load(0)
    assert len(tables) == 2  # it was counted once


@pytest.mark.parametrize("offset, there", [(0, 100), (60, 40), (100, 0), (1 << 40, 0)])
async def test_reading_up_to_the_end_of_the_file(tmp_path: Path, offset: int, there: int) -> None:
    """As often as one likes, though the pool is slow to let go of the memory it read into."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    engine = Engine(2)
    file = HostFile.open(engine, str(path), writable=False)
    for _ in range(50):
        data = await read_up_to(file, 4096, offset)
        assert data == bytes(range(100))[offset : offset + there]
    assert await read_up_to(file, 30, 20) == bytes(range(20, 50))
    file.close()
    engine.close()
