"""The cache of decompressed clusters, and the hops that fill it: counted, never timed."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.limits import ImageLimits
from pynbd.block.qcow2 import compressed, compression, loop_share
from pynbd.block.qcow2.builder import Compressed, Image
from pynbd.block.qcow2.compressed import (
    HOP_BYTES,
    HOP_CLUSTERS,
    HOPS,
    TURN_BYTES,
    TURN_CLUSTERS,
)
from pynbd.block.qcow2.compression import compress, cost
from pynbd.block.qcow2.entries import compressed_entry, compressed_range
from pynbd.block.qcow2.format import CompressionType
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.block.qcow2.loop_share import LOOP_SHARE, MOST_COST, TURN_SECONDS
from pynbd.errors import CorruptImage

K64 = 1 << 16
CLUSTERS = 48


def content(number: int) -> bytes:
    return random.Random(number).randbytes(64) * (K64 // 64)


class Hops:
    """What each hop decompresses, and each turn of the loop, and how many are under way at the
    same time.
    """

    def __init__(self) -> None:
        self.in_pool: list[int] = []
        self.in_turns: list[int] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self._turn_began = False

    @property
    def sizes(self) -> list[int]:
        return self.in_pool + self.in_turns

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(kind: CompressionType, streams: Sequence[Any], *rest: Any) -> Any:
            with self.lock:
                if threading.current_thread() is threading.main_thread():
                    self._count_in_turn(len(streams))
                else:
                    self.in_pool.append(len(streams))
                self.now += 1
                self.most = max(self.most, self.now)
            outcomes = call(kind, streams, *rest)
            with self.lock:
                self.now -= 1
            return outcomes

        return counting

    def _count_in_turn(self, streams: int) -> None:
        if not self._turn_began:
            self._turn_began = True
            self.in_turns.append(0)
            asyncio.get_running_loop().call_soon(setattr, self, "_turn_began", False)
        self.in_turns[-1] += streams


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> Hops:
    hops = Hops()
    monkeypatch.setattr(compressed, "decompress_all", hops.counted(compression.decompress_all))
    return hops


@asynccontextmanager
async def opened(
    path: Path,
    kind: CompressionType = CompressionType.ZLIB,
    limits: ImageLimits | None = None,
    **damaged: bytes,
) -> AsyncIterator[Qcow2Node]:
    clusters = {number * K64: Compressed(content(number)) for number in range(CLUSTERS)}
    for number, stream in damaged.items():
        clusters[int(number.strip("_")) * K64] = Compressed(stream=stream)
    Image(size=CLUSTERS * K64, clusters=clusters, compression_type=kind).write(path)
    async with await open_image(path, format="qcow2", limits=limits) as node:
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
    assert len(hops.sizes) <= 16 // (TURN_BYTES // K64) + 1


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
    assert hops.most <= 1 + HOPS  # the rest of the pool is the disk's


async def test_one_short_read_needs_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "x") as node:
        monkeypatch.setattr(Engine, "start_in_lane", lambda *_: pytest.fail("a hop"))
        assert await node.pread(5 * K64 + 100, 4096) == content(5)[100:4196]


async def test_small_clusters_are_counted(tmp_path: Path, hops: Hops) -> None:
    """512 clusters of 512 bytes are as many bytes as four of the usual ones, and far more work."""
    data = [bytes([at % 251, at % 2]) * 256 for at in range(512)]
    clusters = {at * 512: Compressed(each) for at, each in enumerate(data)}
    Image(size=512 * 512, cluster_bits=9, clusters=clusters).write(tmp_path / "x")
    async with await open_image(tmp_path / "x", format="qcow2") as node:
        assert await asyncio.gather(*(node.pread(at * 512, 512) for at in range(512))) == data
    assert sum(hops.sizes) == 512
    assert max(hops.sizes) <= max(TURN_CLUSTERS, HOP_CLUSTERS)


async def test_large_clusters_are_not_decompressed_in_the_loop(tmp_path: Path) -> None:
    threads = set()

    def told(*args: Any) -> Any:
        threads.add(threading.current_thread())
        return compression.decompress_all(*args)

    bits = TURN_BYTES.bit_length()
    data = content(1) * (2 * TURN_BYTES // K64)
    Image(size=1 << bits, cluster_bits=bits, clusters={0: Compressed(data)}).write(tmp_path / "x")
    async with await open_image(tmp_path / "x", format="qcow2") as node:
        with patch.object(compressed, "decompress_all", told):
            assert await node.pread(0, 1 << bits) == data
    assert threads
    assert threading.main_thread() not in threads


async def test_what_waits_for_its_turn_is_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for a byte of each of many large clusters: not all of them are read at once."""
    bits, number = 20, 12
    random_bytes = random.Random(1).randbytes(3 << bits - 2)  # three quarters cannot be compressed
    clusters = {
        at << bits: Compressed(random_bytes[at:] + bytes((1 << bits - 2) + at))
        for at in range(number)
    }
    Image(size=number << bits, cluster_bits=bits, clusters=clusters).write(tmp_path / "x")
    reads: list[int] = []
    read, go_on = HostFile.read, threading.Event()

    async def counted(file: HostFile, view: memoryview, offset: int) -> int:
        reads.append(len(view))
        return await read(file, view, offset)

    def held(*args: Any) -> Any:
        assert go_on.wait(10)
        return compression.decompress_all(*args)

    monkeypatch.setattr(compressed, "decompress_all", held)
    async with await open_image(tmp_path / "x", format="qcow2") as node:
        await node.resolve(0, node.size)
        monkeypatch.setattr(HostFile, "read", counted)
        tasks = [asyncio.create_task(node.pread((at << bits) + 9, 1)) for at in range(number)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert sum(reads) <= ImageLimits().clusters + (1 << bits)
        tasks[-1].cancel()  # before it was read
        go_on.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        expected = [random_bytes[at + 9 : at + 10] for at in range(number - 1)]
        assert answers[:-1] == expected
        assert len(reads) == number - 1
        (last,) = await node.pread((number - 1 << bits) + 9, 1)
        assert last == random_bytes[number + 8]


async def test_the_cache_is_bounded_in_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path / "x", limits=ImageLimits(clusters=4 * K64)) as node:
        for at in (0, 1, 2, 3, 0, 4):
            await node.pread((at + 1) * K64 - 1, 1)
        assert node.clusters.loads == 5
        await node.pread(K64 - 1, 1)  # was used after the cluster that went
        assert node.clusters.loads == 5
        await node.pread(2 * K64 - 1, 1)
        assert node.clusters.loads == 6
        assert len(node.clusters) == 4


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 20])
async def test_all_layers_of_a_chain_have_one_bound(tmp_path: Path, limit: int) -> None:
    """Of what is kept and of what waits; whoever waits for room is not forgotten, and no layer has
    to keep anything.
    """
    below: dict[str, Any] = {}
    layers = 6
    for layer in range(layers):
        clusters = {
            number * K64: Compressed(content(number))
            for number in range(CLUSTERS)
            if number % layers == layer
        }
        Image(size=CLUSTERS * K64, clusters=clusters, **below).write(tmp_path / str(layer))
        below = {"backing_file": str(layer), "backing_format": "qcow2"}
    limits = ImageLimits(clusters=limit)
    async with await open_image(tmp_path / str(layers - 1), limits=limits) as node:
        order = random.Random(6).sample(range(CLUSTERS), CLUSTERS)
        reading = [asyncio.create_task(node.pread(at * K64 + K64 - 9, 9)) for at in order]
        async with asyncio.timeout(60):
            assert await asyncio.gather(*reading) == [content(at)[-9:] for at in order]
        chain = [each for each in node.chain() if isinstance(each, Qcow2Node)]
        assert sum(len(each.clusters) for each in chain) == max(limit // K64, 1)


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


async def test_a_place_inside_of_another_takes_nothing_from_it(tmp_path: Path) -> None:
    """A damaged entry that leads into the stream of another cluster."""
    text = random.Random(1).randbytes(K64 // 2) + bytes(K64 // 2)
    deflater = zlib.compressobj(wbits=-12)
    stream = deflater.compress(text) + deflater.flush()
    async with opened(tmp_path / "x", _0=stream) as node:
        host = (await node.resolve(0, K64))[0].host
        inside = compressed_entry(compressed_range(host, 16)[0] + 600, 100, 16)
        whole, damaged = node.clusters.start([(host, K64), (inside, K64)])
        assert isinstance(whole, asyncio.Future)
        assert isinstance(damaged, asyncio.Future)
        assert await whole == text
        assert isinstance(await damaged, CorruptImage)


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
        waiters = node.clusters.start([(extent.host, K64) for extent in extents])
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


async def test_the_first_gets_the_beginning_who_wants_more_gets_all(tmp_path: Path) -> None:
    text = bytes(random.Random(1).choices(b"abcdefgh", k=K64))
    deflater = zlib.compressobj(wbits=-12)
    stream = deflater.compress(text) + deflater.flush()
    async with opened(tmp_path / "x", _0=stream) as node:
        host = (await node.resolve(0, K64))[0].host
        assert await node.pread(100, 4096) == text[100:4196]
        (beginning,) = node.clusters.start([(host, 1)])
        assert isinstance(beginning, memoryview)
        assert 4196 <= len(beginning) < K64
        assert await node.pread(0, 4096) == text[:4096]
        assert node.clusters.loads == 1
        assert await node.pread(8192, 40960) == text[8192:49152]
        assert await node.pread(0, K64) == text
        assert node.clusters.loads == 2


async def test_who_wants_more_of_what_is_being_decompressed(tmp_path: Path) -> None:
    async with opened(tmp_path / "x") as node:
        lengths = [1, 4096, K64, 100]
        tasks = [asyncio.create_task(node.pread(0, length)) for length in lengths]
        assert await asyncio.gather(*tasks) == [content(0)[:length] for length in lengths]
        assert node.clusters.loads <= 2


async def test_short_reads_are_answered_at_once_a_few_in_each_turn(tmp_path: Path) -> None:
    view = memoryview(bytearray(100))
    async with opened(tmp_path / "x") as node:
        hosts = [extent.host for extent in await node.resolve(0, node.size)]
        for at in range(TURN_BYTES // K64):
            assert node.fetch_compressed_now(hosts[at], at * K64 + 1000, view)
            assert view == content(at)[1000:1100]
        assert not node.fetch_compressed_now(hosts[-1], node.size - K64, view)
        assert node.fetch_compressed_now(hosts[0], 0, view)  # it is kept
        assert node.clusters.loads == TURN_BYTES // K64
        await asyncio.sleep(0)
        assert node.fetch_compressed_now(hosts[-1], node.size - K64, view)
        assert view == content(CLUSTERS - 1)[:100]


async def test_what_has_to_wait_is_not_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged cluster, one that others wait for, two of them, one that is not cached."""
    view = memoryview(bytearray(100))
    async with opened(tmp_path / "x", _2=b"\xff" * 512) as node:
        hosts = [extent.host for extent in await node.resolve(0, 4 * K64)]
        assert not node.fetch_compressed_now(hosts[2], 2 * K64, view)
        waiting = asyncio.create_task(node.pread(K64, 4096))
        await asyncio.sleep(0)
        assert not node.fetch_compressed_now(hosts[1], K64, view)
        assert await waiting == content(1)[:4096]
        assert not node.fetch_compressed_now(hosts[1], 2 * K64 - 99, view)
        monkeypatch.setattr(HostFile, "read_now", lambda *_: 0)
        assert not node.fetch_compressed_now(hosts[3], 3 * K64, view)


@pytest.mark.parametrize(
    "defect, number", [(MemoryError(), errno.ENOMEM), (ValueError(), errno.EIO)]
)
async def test_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: Exception, number: int
) -> None:
    """Whatever goes wrong, in the loop or in the pool, is told; afterwards it may go well."""

    def failing(*_: Any) -> Any:
        raise defect

    async with opened(tmp_path / "x") as node:
        with monkeypatch.context() as broken:
            broken.setattr(compressed, "decompress_all", failing)
            assert not node.fetch_compressed_now(
                (await node.resolve(0, 1))[0].host, 0, memoryview(bytearray(10))
            )
            reads = [node.pread(at * K64, 4096) for at in range(CLUSTERS)]
            answers = await asyncio.gather(*reads, return_exceptions=True)
        assert {getattr(answer, "errno", 0) for answer in answers} == {number}
        assert await node.pread(0, 4096) == content(0)[:4096]


EMPTY_BLOCK = b"\0\0\0\xff\xff"  # of deflate, stored


def padded(number: int, length: int) -> bytes:
    """`content` of that number, behind so many bytes of blocks that make nothing."""
    stream = compress(CompressionType.ZLIB, content(number))
    assert stream is not None
    return EMPTY_BLOCK * (length // len(EMPTY_BLOCK)) + stream


# Seconds that a unit of `cost` takes at worst.
UNIT = 55e-9


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the loop's share takes for the time: it stands still, unless somebody moves it."""
    now = [0.0]
    monkeypatch.setattr(loop_share, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> list[float]:
    """What was spent in each turn of the loop in which anything was decompressed; all of it takes
    as long as it can.
    """
    spent: list[float] = []
    open_turn = [False]

    def counting(kind: CompressionType, streams: Sequence[Any], size: int, patience: float) -> Any:
        if threading.current_thread() is threading.main_thread():
            if not open_turn[0]:
                open_turn[0] = True
                spent.append(0)
                asyncio.get_running_loop().call_soon(open_turn.__setitem__, 0, False)
            most = sum(cost(kind, len(data), length, size) for data, length in streams)
            spent[-1] += most
            clock[0] += most * UNIT
        return compression.decompress_all(kind, streams, size, patience)

    monkeypatch.setattr(compressed, "decompress_all", counting)
    return spent


async def test_streams_that_make_little_hold_no_turn_for_long(
    tmp_path: Path, turns: list[float]
) -> None:
    """Each is short enough for the loop, all of them together are not; asked for in both ways."""
    streams = {f"_{number}": padded(number, 30_000) for number in range(CLUSTERS)}
    async with opened(tmp_path / "x", CompressionType.ZLIB, **streams) as node:
        reads = (node.pread(at * K64, K64) for at in range(CLUSTERS))
        assert await asyncio.gather(*reads) == [content(at) for at in range(CLUSTERS)]
    assert max(turns) <= TURN_SECONDS / UNIT + MOST_COST


@pytest.mark.parametrize("length", [4096, K64])
async def test_a_stream_that_is_longer_than_its_cluster_is_not_for_the_loop(
    tmp_path: Path, length: int, turns: list[float]
) -> None:
    async with opened(tmp_path / "x", _2=padded(2, 2 * K64 - 1000)) as node:
        where = 3 * K64 - length
        assert await node.pread(where, length) == content(2)[K64 - length :]
    assert max(turns, default=0) <= MOST_COST


async def test_all_images_together_have_one_share_of_a_turn(
    tmp_path: Path, turns: list[float]
) -> None:
    """The first takes all of it, so that the second goes to the pool."""
    view = memoryview(bytearray(100))
    async with opened(tmp_path / "x") as one, opened(tmp_path / "y") as other:
        hosts = [extent.host for extent in await one.resolve(0, one.size)]
        for at in range(TURN_BYTES // K64):
            assert one.fetch_compressed_now(hosts[at], at * K64, view)
        assert not other.fetch_compressed_now(hosts[0], 0, view)
        assert await other.pread(0, 100) == content(0)[:100]
    assert len(turns) <= 2


async def test_a_share_is_a_millisecond_too(tmp_path: Path, clock: list[float]) -> None:
    """Clusters that take longer than others make their turn no longer."""
    view = memoryview(bytearray(100))
    async with opened(tmp_path / "x") as node:
        hosts = [extent.host for extent in await node.resolve(0, node.size)]
        assert node.fetch_compressed_now(hosts[0], 0, view)
        clock[0] += TURN_SECONDS
        assert not node.fetch_compressed_now(hosts[1], K64, view)
        await asyncio.sleep(0)
        assert node.fetch_compressed_now(hosts[1], K64, view)


async def test_who_finds_the_share_taken_is_served_by_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that always takes all of it keeps no other waiting."""
    monkeypatch.setattr(LOOP_SHARE, "allows", lambda *_: False)
    async with opened(tmp_path / "x") as node:
        assert await asyncio.wait_for(node.pread(0, 100), 20) == content(0)[:100]


@pytest.mark.parametrize(
    "kind, stream",
    [
        (CompressionType.ZLIB, b"\xff" * 512),
        (CompressionType.ZLIB, EMPTY_BLOCK * 100 + b"\3\0"),  # and the last one
        (CompressionType.ZSTD, b"\xff" * 512),
        (CompressionType.ZSTD, (compress(CompressionType.ZSTD, bytes(64)) or b"") * 900),
    ],
)
async def test_what_needs_care_is_not_for_the_loop(
    tmp_path: Path, kind: CompressionType, stream: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def told(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return compression.decompress(*args)

    monkeypatch.setattr(compressed, "decompress", told)
    async with opened(tmp_path / "x", kind, _2=stream) as node:
        with pytest.raises(OSError, match="0x20000"):
            await node.pread(2 * K64, 4096)
        with pytest.raises(OSError, match="0x20000"):
            await node.pread(2 * K64, K64)
        assert await node.pread(3 * K64, 100) == content(3)[:100]
    assert len(threads) == 2
    assert threading.main_thread() not in threads
