"""System calls, hops and memory of one host file: what each way through the engine takes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.engine import NOWAIT_MAX, WRITE_NOW_MAX, Engine, HostFile
from tests.server.counting import Costs, in_page_cache, peak_memory

K, M = 1 << 10, 1 << 20
SIZE = 8 * M
BYTES = random.Random(52).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "disk"
    path.write_bytes(BYTES)
    engine = Engine()
    with in_page_cache(path):
        file = HostFile.open(engine, str(path), writable=True)
        yield file
        file.close()
        engine.close()


@pytest.mark.parametrize("length", [1, 4 * K, NOWAIT_MAX])
async def test_a_hit(file: HostFile, costs: Costs, length: int) -> None:
    """One system call, and the caller's memory."""
    into, peaks = memoryview(bytearray(length)), list[int]()
    await file.read(into, 0)

    async def read() -> None:
        with peak_memory(peaks):
            assert await file.read(into, 100) == length

    await costs.at_best(read)
    assert costs.calls("preadv", "pread") == [length]
    assert (costs.tasks, costs.hops) == (0, 0)
    assert min(peaks) < 4 * K
    assert into == BYTES[100 : 100 + length]


async def test_a_longer_read(file: HostFile, costs: Costs) -> None:
    """Copying it would hold the loop: one hop, in which it is one system call."""
    into = memoryview(bytearray(M))
    costs.start()
    assert await file.read(into, 100) == M
    costs.stop()
    assert costs.reads(in_loop=False) == [M]
    assert costs.reads(in_loop=True) == []
    assert costs.hops == 1


async def test_part_of_a_read_is_cached(
    file: HostFile, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page cache has is not read again in the pool."""
    into = memoryview(bytearray(64 * K))
    read_now = file.read_now
    monkeypatch.setattr(file, "read_now", lambda view, offset: read_now(view[: 16 * K], offset))
    costs.start()
    assert await file.read(into, 0) == 64 * K
    costs.stop()
    assert costs.reads(in_loop=True) == [16 * K]
    assert costs.reads(in_loop=False) == [48 * K]
    assert into == BYTES[: 64 * K]


@pytest.mark.parametrize("length", [64 * K, M, 8 * M])
async def test_residence_is_asked_for_with_few_probes(
    file: HostFile, costs: Costs, length: int
) -> None:
    """One byte in every 256 KiB and the last one, besides cachestat(2): docs/design.md."""
    if not file.resident(0, 4 * K):
        pytest.skip("cachestat needs Linux 6.5")
    costs.start()
    file.resident(0, length)
    costs.stop()
    assert costs.reads() == []
    assert len(costs.calls("preadv", "pread")) <= -(-length // (256 * K)) + 1


async def test_writes_in_the_loop(file: HostFile, costs: Costs) -> None:
    """Neighbours are one call each group; whole pages need no look at what is there."""
    groups = [[0, 1, 2], [8], [16, 17]]
    pieces = [(os.urandom(4 * K), page * 4 * K) for group in groups for page in group]
    costs.start()
    assert not any(await file.write_batch(pieces))
    costs.stop()
    assert costs.writes() == [len(group) * 4 * K for group in groups]
    assert costs.calls("preadv", "pread") == []
    assert costs.hops == 0


async def test_parts_of_pages_cost_a_probe_for_each_edge(file: HostFile, costs: Costs) -> None:
    """Whether the page is there, where a write begins or ends inside one."""
    costs.start()
    assert not any(await file.write_batch([(b"x" * 512, 512), (b"x" * 5000, 40000)]))
    costs.stop()
    if not costs.hops:  # else a page was on the move
        assert costs.calls("preadv", "pread") == [1] * 4
    assert len(costs.writes()) == 2


async def test_a_longer_write_is_one_hop(file: HostFile, costs: Costs) -> None:
    length = WRITE_NOW_MAX + 512
    costs.start()
    assert not any(await file.write_batch([(bytes(length), 0)]))
    costs.stop()
    assert costs.hops == 1
    assert costs.writes() == [length]
    assert costs.syncs() == 0


@pytest.mark.parametrize("pieces", [16, 2000])
@pytest.mark.parametrize("quick", [True, False])
async def test_batches(file: HostFile, costs: Costs, pieces: int, quick: bool) -> None:
    """A call for each turn of the loop, or in one hop, however many pieces: neighbours share one,
    up to 1024 of them (IOV_MAX).
    """
    if not quick:
        file.engine.quick_writes = None
    length = 2 * WRITE_NOW_MAX // pieces // 512 * 512
    batch = [(bytes(length), at * length) for at in range(pieces)]
    costs.start()
    assert not any(await file.write_batch(batch))
    costs.stop()
    assert costs.hops == (not quick)
    assert len(costs.writes()) == (2 if quick else -(-pieces // 1024))
    assert sum(costs.writes()) == pieces * length
    assert costs.syncs() == 0


@pytest.mark.parametrize("pieces", [1, 16])
async def test_fua_is_one_hop_and_one_sync(file: HostFile, costs: Costs, pieces: int) -> None:
    """For all pieces of the batch together."""
    batch = [(bytes(4 * K), at * 8 * K) for at in range(pieces)]
    costs.start()
    assert not any(await file.write_batch(batch, fua=True))
    costs.stop()
    assert (costs.hops, costs.syncs()) == (1, 1)
    assert len(costs.writes()) == pieces
