"""The cache of decompressed clusters, and the hops that fill it: counted, never timed."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2 import compressed, compression
from pynbd.block.qcow2.builder import Compressed, Image
from pynbd.block.qcow2.compressed import CACHE_BYTES, HOP_BYTES, HOPS
from pynbd.block.qcow2.entries import compressed_range
from pynbd.block.qcow2.format import CompressionType
from pynbd.block.qcow2.image import Qcow2Node

K64 = 1 << 16
CLUSTERS = 48


def content(number: int) -> bytes:
    return random.Random(number).randbytes(64) * (K64 // 64)


class Hops:
    """What each hop decompresses, and how many are under way at the same time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.now = self.most = 0

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(kind: CompressionType, streams: Sequence[memoryview], size: int) -> Any:
            self.sizes.append(len(streams))
            return call(kind, streams, size)

        return counting


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> Hops:
    hops = Hops()
    start = Engine.start
    counting = hops.counted(compression.decompress_all)

    def counted_start(engine: Engine, call: Callable[..., Any], *args: Any) -> Any:
        future = start(engine, call, *args)
        if call is counting:
            hops.now += 1
            hops.most = max(hops.most, hops.now)
            future.add_done_callback(lambda _: setattr(hops, "now", hops.now - 1))
        return future

    monkeypatch.setattr(compressed, "decompress_all", counting)
    monkeypatch.setattr(Engine, "start", counted_start)
    return hops


@asynccontextmanager
async def opened(
    path: Path, kind: CompressionType = CompressionType.ZLIB, **damaged: bytes
) -> AsyncIterator[Qcow2Node]:
    clusters = {number * K64: Compressed(content(number)) for number in range(CLUSTERS)}
    for number, stream in damaged.items():
        clusters[int(number.strip("_")) * K64] = Compressed(stream=stream)
    Image(size=CLUSTERS * K64, clusters=clusters, compression_type=kind).write(path)
    async with await open_image(path, format="qcow2") as node:
        assert isinstance(node, Qcow2Node)
        await node.resolve(0, node.size)
        yield node


@pytest.mark.parametrize("kind", CompressionType)
async def test_a_long_read_takes_few_hops(
    tmp_path: Path, kind: CompressionType, hops: Hops
) -> None:
    async with opened(tmp_path / "x", kind) as node:
        extents = await node.resolve(0, 16 * K64)
        pieces = await node.decompressed(extents)
    assert b"".join(pieces) == b"".join(map(content, range(16)))
    assert sum(hops.sizes) == 16
    assert max(hops.sizes) <= HOP_BYTES // K64
    assert len(hops.sizes) <= 2 * HOPS


async def test_neighbours_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read_now = HostFile.read_now

    def counted(file: HostFile, view: Any, offset: int) -> int:
        reads.append(len(view))
        return read_now(file, view, offset)

    async with opened(tmp_path / "x") as node:
        extents = await node.resolve(0, 16 * K64)
        monkeypatch.setattr(HostFile, "read_now", counted)
        await node.decompressed(extents)
    assert len(reads) == 1


async def test_what_one_turn_asks_for_shares_hops(tmp_path: Path, hops: Hops) -> None:
    async with opened(tmp_path / "x") as node:
        places = random.Random(1).sample(range(CLUSTERS), 16)
        answers = await asyncio.gather(*(node.pread(at * K64 + 100, 4096) for at in places))
    assert [bytes(answer) for answer in answers] == [content(at)[100:4196] for at in places]
    assert len(hops.sizes) < 16 // 2
    assert sum(hops.sizes) == 16
    assert hops.most <= HOPS  # the rest of the pool is the disk's


async def test_the_cache_is_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CACHE_BYTES <= 24 << 20
    monkeypatch.setattr(compressed, "CACHE_BYTES", 4 * K64)
    async with opened(tmp_path / "x") as node:
        for at in (0, 1, 2, 3, 0, 4):
            await node.pread(at * K64, 1)
        assert node.clusters.loads == 5
        await node.pread(0, 1)  # was used after the cluster that went
        assert node.clusters.loads == 5
        await node.pread(K64, 1)
        assert node.clusters.loads == 6
        assert len(node.clusters) == 4


async def test_who_goes_takes_his_work_along_but_not_that_of_others(
    tmp_path: Path, hops: Hops
) -> None:
    async with opened(tmp_path / "x") as node:
        gone = [asyncio.create_task(node.pread(at * K64, 1)) for at in range(3)]
        stays = asyncio.create_task(node.pread(2 * K64, 4))
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        assert await stays == content(2)[:4]
        await asyncio.gather(*gone, return_exceptions=True)
        # It is asked for again: nothing was left behind.
        assert await node.pread(0, 4) == content(0)[:4]
    assert sum(hops.sizes) <= 4


@pytest.mark.parametrize("kind", CompressionType)
async def test_damage_fails_alone_among_those_of_its_hop(
    tmp_path: Path, kind: CompressionType
) -> None:
    async with opened(tmp_path / "x", kind, _2=b"\xff" * 512) as node:
        answers = await asyncio.gather(
            *(node.pread(at * K64, K64) for at in range(5)), return_exceptions=True
        )
        damaged = answers.pop(2)
        assert isinstance(damaged, OSError)
        assert damaged.errno == errno.EIO
        expected: list[object] = [content(at) for at in (0, 1, 3, 4)]
        assert list[object](answers) == expected
        with pytest.raises(OSError, match="0x20000"):
            await node.decompressed(await node.resolve(0, 5 * K64))


async def test_a_bad_sector_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read for many clusters fails: each of them is read again for itself."""
    async with opened(tmp_path / "x") as node:
        extents = await node.resolve(0, 4 * K64)
        bad = compressed_range(extents[1].host, 16)[0]
        read = HostFile.read

        async def failing(file: HostFile, view: memoryview, offset: int) -> int:
            if offset <= bad < offset + len(view):
                raise OSError(errno.EIO, "bad sector")
            return await read(file, view, offset)

        monkeypatch.setattr(HostFile, "read_now", lambda *_: 0)
        monkeypatch.setattr(HostFile, "read", failing)
        waiters = node.clusters.start([extent.host for extent in extents])
        outcomes = [await one if isinstance(one, asyncio.Future) else one for one in waiters]
        good = [bytes(one) for one in outcomes if isinstance(one, memoryview)]
    assert isinstance(outcomes[1], OSError)
    assert set(map(content, (2, 3))) <= set(good)


async def test_short_pieces_are_copied_long_ones_lent(tmp_path: Path) -> None:
    async with opened(tmp_path / "x") as node:
        (short,) = await node.decompressed(await node.resolve(0, 4096))
        (long,) = await node.decompressed(await node.resolve(0, K64))
    assert isinstance(short, bytes)
    assert isinstance(long, memoryview)
