"""SharedReads and TableCache: bounded, shared, least recently used first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.cache import SharedReads, TableCache, read_table


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
    tables = TableCache(file, 512)
    table = await tables.load(1024 - 8)
    assert table.values.tolist() == [0x38393A3B3C3D3E3F] + [0] * 63
    assert not (await tables.load(1 << 40)).values.any()


async def test_a_scan_stays_within_the_bound(file: HostFile) -> None:
    tables = TableCache(file, 64, 256)
    for host_offset in range(0, 1024, 64):
        await tables.load(host_offset)
        assert len(tables) <= 4
    assert tables.loads == 16
