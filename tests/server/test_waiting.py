"""Who waits for a disk, for a decompression or for a slow reader waits alone.

What one client waits for is held; others are answered meanwhile. Order is all that is looked at.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from interop.samples import qemu_io
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.node import BlockNode
from pynbd.block.pool import Lane
from pynbd.server.buffers import BufferPool
from pynbd.server.patience import Patience
from tests.block.reading import eventually
from tests.server.counting import Costs, in_page_cache, tcp_pair
from tests.server.session import FLUSH, READ, WRITE, Client, Mode, Talk, talking

K, M = 1 << 10, 1 << 20
SIZE = 8 * M
BYTES = random.Random(51).randbytes(SIZE // 2).hex().encode()  # which can be compressed
COLD = 4 * M  # where a `cold` file begins to be cold
THREADS = 8  # of an engine, unless it is told otherwise


class GatedEngine(Engine):
    """An engine whose calls wait at a gate, in the pool, if ``holds`` says so."""

    def __init__(self) -> None:
        super().__init__(THREADS)
        self.holds: Callable[[Callable[..., Any]], bool] = lambda call: False
        self.held = threading.Semaphore(0)
        self._opened = threading.Event()

    def start(self, call: Callable[..., Any], *args: Any) -> Any:
        return super().start(self._pass, call, args)

    def start_in_lane(self, lane: Lane, call: Callable[..., Any], *args: Any) -> Any:
        return super().start_in_lane(lane, self._pass, call, args)

    def hold(self, name: str, file: HostFile | None) -> None:
        """Hold the calls of that name, of that file."""
        self.holds = lambda call: call.__name__ == name and getattr(call, "__self__", 0) is file

    def open_gate(self) -> None:
        self._opened.set()

    async def somebody_waits(self) -> None:
        await eventually(lambda: self.held.acquire(blocking=False))

    def _pass(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.holds(call):
            self.held.release()
            assert self._opened.wait(20)
        return call(*args)


@pytest.fixture
def engine() -> Iterator[GatedEngine]:
    engine = GatedEngine()
    yield engine
    engine.open_gate()
    engine.close()


class Stage:
    """Images in the page cache, and sessions on them that share their buffers."""

    def __init__(self, stack: AsyncExitStack, engine: Engine, folder: Path) -> None:
        self._stack = stack
        self._engine = engine
        self.folder = folder

    def raw(self, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(BYTES)
        return path

    async def open(self, path: Path, format: str = "raw") -> BlockNode:  # noqa: A002
        self._stack.enter_context(in_page_cache(path))
        node = await open_image(path, format=format, read_only=False, engine=self._engine)
        return await self._stack.enter_async_context(node)

    async def talk(self, node: BlockNode, mode: Mode = Mode.STRUCTURED, **rest: Any) -> Talk:
        return await self._stack.enter_async_context(talking(node, mode, **rest))


@asynccontextmanager
async def set_up(engine: GatedEngine, folder: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        try:
            yield Stage(stack, engine, folder)
        finally:
            engine.open_gate()


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files have nothing in the page cache from `COLD` on."""
    read_now, resident = HostFile.read_now, HostFile.resident

    def reads(file: HostFile, view: Any, offset: int) -> int:
        return 0 if offset >= COLD else read_now(file, view, offset)

    def is_resident(file: HostFile, offset: int, length: int) -> bool:
        return offset + length <= COLD and resident(file, offset, length)

    monkeypatch.setattr(HostFile, "read_now", reads)
    monkeypatch.setattr(HostFile, "resident", is_resident)


async def is_answered(client: Client, offset: int = 0, length: int = 4 * K) -> None:
    """A lone read and a batch of them."""
    reply = await client.ask(READ, offset, length)
    assert reply.data(offset, length) == BYTES[offset : offset + length]
    await client.send(*(client.request(READ, offset, 512) for _ in range(16)))
    await client.all_replies()


async def is_written(client: Client, offset: int, length: int = 4 * K) -> None:
    reply = await client.ask(WRITE, offset, payload=BYTES[offset : offset + length])
    assert not reply.error


# Disks


@pytest.mark.parametrize("length", [4 * K, M])
@pytest.mark.usefixtures("cold")
async def test_cold_reads(tmp_path: Path, engine: GatedEngine, length: int) -> None:
    """More than the pool has threads; what is in the page cache of the same file is read."""
    async with set_up(engine, tmp_path) as stage:
        node = await stage.open(stage.raw("disk"))
        slow, other = await stage.talk(node), await stage.talk(node)
        engine.holds = lambda call: "read" in call.__name__
        await slow.client.send(*(slow.client.request(READ, COLD, length) for _ in range(64)))
        await engine.somebody_waits()
        for at in range(5):
            await is_answered(other.client, at * 64 * K)
        await is_answered(other.client, M, M)
        await is_written(other.client, 2 * M)
        engine.open_gate()
        await slow.client.all_replies()


@pytest.mark.usefixtures("cold")
async def test_a_cold_read_beside_hits_of_the_same_client(
    tmp_path: Path, engine: GatedEngine
) -> None:
    """Replies leave when they are ready, in one batch, too."""
    async with set_up(engine, tmp_path) as stage:
        client = (await stage.talk(await stage.open(stage.raw("disk")))).client
        engine.holds = lambda call: "read" in call.__name__
        offsets = [0, COLD, 4 * K, COLD + 64 * K, 8 * K]
        await client.send(*(client.request(READ, at, 4 * K, cookie=at + 1) for at in offsets))
        for at in (0, 4 * K, 8 * K):
            assert (await client.reply(at + 1)).data(at, 4 * K) == BYTES[at : at + 4 * K]
        assert client.order == [1, 4 * K + 1, 8 * K + 1]
        engine.open_gate()
        await client.all_replies()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_a_flush(tmp_path: Path, engine: GatedEngine, format: str) -> None:  # noqa: A002
    """Meanwhile everybody reads, writes to that file go to the pool, to others they do not."""
    async with set_up(engine, tmp_path) as stage:
        path = stage.raw("disk")
        if format == "qcow2":
            path = tmp_path / "disk.qcow2"
            peers.run("qemu-img", "convert", "-O", "qcow2", tmp_path / "disk", path)
        node, another = await stage.open(path, format), await stage.open(stage.raw("another"))
        flushing, same = await stage.talk(node), await stage.talk(node)
        elsewhere = await stage.talk(another)
        await is_written(flushing.client, 0)
        engine.hold("_sync", node.file)
        await flushing.client.send(flushing.client.request(FLUSH))
        await engine.somebody_waits()
        await is_answered(same.client)
        await is_answered(same.client, M, M)
        await is_written(same.client, M)
        for length in (4 * K, M):
            await is_answered(elsewhere.client, M, length)
            await is_written(elsewhere.client, M, length)
        assert not (await elsewhere.client.ask(FLUSH)).error
        assert flushing.client.order == [1]
        engine.open_gate()
        await flushing.client.all_replies()


async def test_new_clusters_beside_a_flush(tmp_path: Path, engine: GatedEngine) -> None:
    """docs/design.md, "Locks": who changes the mapping does not wait for a commit."""
    async with set_up(engine, tmp_path) as stage:
        path = tmp_path / "empty.qcow2"
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
        node = await stage.open(path, "qcow2")
        flushing, other = await stage.talk(node), await stage.talk(node)
        await is_written(flushing.client, 0)
        engine.hold("_sync", node.file)
        await flushing.client.send(flushing.client.request(FLUSH))
        await engine.somebody_waits()
        await is_written(other.client, M)
        await is_written(other.client, 2 * M, M)
        await is_answered(other.client, M)
        engine.open_gate()
        await flushing.client.all_replies()


@pytest.mark.usefixtures("cold")
async def test_long_writes(tmp_path: Path, engine: GatedEngine) -> None:
    """Of one file: they wait for each other, in one thread. Everybody reads that file, what is cold
    in it, too; another file is written, in the loop and in the pool.
    """
    async with set_up(engine, tmp_path) as stage:
        node, another = await stage.open(stage.raw("disk")), await stage.open(stage.raw("another"))
        writing, same = await stage.talk(node), await stage.talk(node)
        elsewhere = await stage.talk(another)
        engine.hold("_write_batch", node.file)
        first = writing.client
        await first.send(*(first.request(WRITE, payload=BYTES[:M]) for _ in range(4 * THREADS)))
        await engine.somebody_waits()
        await is_answered(same.client, M)
        await is_answered(same.client, COLD, M)
        for length in (4 * K, M):
            await is_answered(elsewhere.client, M, length)
            await is_written(elsewhere.client, M, length)
        assert first.order == []
        engine.open_gate()
        await first.all_replies()


# Decompression


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.usefixtures("cold")
async def test_compressed_clusters(tmp_path: Path, engine: GatedEngine, kind: str) -> None:
    """While clusters are being decompressed, in the loop and in the pool, all others of the image
    are read: plain ones, cold ones (decompression never has all threads), those that are not there,
    the decompressed. The loop takes a few in each of its turns, and so does whoever asks for short
    pieces.
    """
    async with set_up(engine, tmp_path) as stage:
        path = tmp_path / "disk.qcow2"
        create = ["create", "-q", "-f", "qcow2", "-o", f"compression_type={kind}"]
        peers.run("qemu-img", *create, path, "32M")
        qemu_io(path, *(f"write -q -c -P {at & 127} {at * 64}k 64k" for at in range(256)))
        qemu_io(path, "write -q -P 77 24M 6M")
        node = await stage.open(path, "qcow2")
        slow, other = await stage.talk(node), await stage.talk(node)
        await other.client.ask(READ, 0, 64 * K)  # which decompresses it
        engine.holds = lambda call: "decompress" in call.__name__
        offsets = [*range(M, 15 * M, M), *range(15 * M, 16 * M, 64 * K)]
        lengths = [M] * 14 + [4 * K] * 16
        requests = zip(offsets, lengths, strict=True)
        await slow.client.send(*(slow.client.request(READ, *request) for request in requests))
        for offset, byte in ((0, 0), (24 * M, 77), (24 * M + 5 * M, 77), (31 * M, 0)):
            reply = await other.client.ask(READ, offset, 4 * K)
            assert reply.data(offset, 4 * K) == bytes([byte]) * 4 * K
        assert len(slow.client.order) < len(offsets)
        await engine.somebody_waits()
        engine.open_gate()
        await slow.client.all_replies()
        for cookie, (at, length) in enumerate(zip(offsets, lengths, strict=True), 1):
            reply = slow.client.replies[cookie]
            expected = (bytes([at >> 16 & 127]) * 64 * K for at in range(at, at + length, 64 * K))
            assert reply.data(at, length) == b"".join(expected)[:length]


# Readers


@pytest.fixture(params=["unix", "tcp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tcp":
        monkeypatch.setattr(socket, "socketpair", tcp_pair)


@pytest.mark.parametrize("image", ["raw", "qcow2", "compressed"])
@pytest.mark.usefixtures("transport")
async def test_a_client_that_takes_no_replies(
    tmp_path: Path, engine: GatedEngine, costs: Costs, image: str
) -> None:
    """It has asked for 128 MiB. Others are answered; and once its socket is full nobody tries to
    send to it, or reads for it, until it takes something. Then it gets all.
    """
    async with set_up(engine, tmp_path) as stage:
        path = stage.raw("disk")
        if image != "raw":
            path, options = tmp_path / "disk.qcow2", ["-c"] if image == "compressed" else []
            peers.run("qemu-img", "convert", *options, "-O", "qcow2", tmp_path / "disk", path)
        node = await stage.open(path, "raw" if image == "raw" else "qcow2")
        stalled = await stage.talk(node, wrap=costs.wrap)
        other = await stage.talk(node)
        client = stalled.client
        count = 128
        for at in range(count):
            await client.send(client.request(READ, at % 8 * M, M))
        await eventually(lambda: stalled.stream.queued > 0)
        await is_answered(other.client)
        await eventually(lambda: not stalled.transmission._tasks)
        for _ in range(20):
            await is_answered(other.client)
        costs.start()
        for at in range(10):
            await is_answered(other.client, at * 64 * K)
        costs.stop()
        assert costs.socket == {}
        assert costs.sent() == []
        assert len(costs.reads()) <= 10 * 17
        await client.all_replies()
        for cookie in (1, count):
            at = (cookie - 1) % 8 * M
            assert client.replies[cookie].data(at, M) == BYTES[at : at + M]


# Patience


async def lone_reads(talk: Talk, count: int) -> None:
    for _ in range(count):
        await is_alone(talk)


async def is_alone(talk: Talk) -> None:
    assert not (await talk.client.ask(READ, 0, 512)).error


async def test_nobody_is_looked_out_for_beside_another_connection(
    tmp_path: Path, engine: GatedEngine, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second connection open, idle as it may be, a request is one receive and one look for
    more. When that one has gone, a client that asks one thing at a time is looked out for.
    """
    pool = BufferPool()
    monkeypatch.setattr("tests.server.session.BufferPool", lambda: pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    async with set_up(engine, tmp_path) as stage:
        node = await stage.open(stage.raw("disk"))
        talk = await stage.talk(node, wrap=costs.wrap)
        async with talking(node, Mode.STRUCTURED) as idle:
            costs.start()
            await lone_reads(talk, 50)
            costs.stop()
            assert costs.socket == {"recv": 100, "send": 50}
        assert idle.running.done()
        costs.start()
        await lone_reads(talk, 50)
        costs.stop()
        assert costs.socket["recv"] > 100


@pytest.mark.parametrize("image", ["raw", "compressed"])
async def test_one_request_is_one(
    tmp_path: Path, engine: GatedEngine, costs: Costs, image: str
) -> None:
    """However long a write, and whatever a read has to decompress."""
    async with set_up(engine, tmp_path) as stage:
        path = stage.raw("disk")
        if image == "compressed":
            path = tmp_path / "disk.qcow2"
            peers.run("qemu-img", "convert", "-c", "-O", "qcow2", tmp_path / "disk", path)
        talk = await stage.talk(await stage.open(path, "raw" if image == "raw" else "qcow2"))
        counted = costs.times(Patience, "received")
        await talk.client.ask(READ, 0, 512)
        costs.start()
        for at in range(1, 9):
            if image == "raw":
                await is_written(talk.client, 0, at * 7 * K)
            else:
                await talk.client.ask(READ, at * 64 * K, 4 * K)
        costs.stop()
        assert counted == [(1,)] * 8


@pytest.mark.usefixtures("cold")
async def test_nobody_is_looked_out_for_while_something_waits(
    tmp_path: Path, engine: GatedEngine, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has something else to do soon: what the disk brings."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    async with set_up(engine, tmp_path) as stage:
        talk = await stage.talk(await stage.open(stage.raw("disk")), wrap=costs.wrap)
        await lone_reads(talk, 20)
        engine.holds = lambda call: "read" in call.__name__
        await talk.client.send(talk.client.request(READ, COLD, 4 * K))
        await engine.somebody_waits()
        costs.start()
        await lone_reads(talk, 20)
        costs.stop()
        assert costs.socket == {"recv": 40, "send": 20}
        engine.open_gate()
        await talk.client.all_replies()
