"""Whoever floods the server leaves the others their turns of the loop.

Turns are counted, not timed: between two of them no more work may lie than the bound allows.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import entries
from pynbd.block.qcow2.builder import Data, Image
from pynbd.block.qcow2.mapping import GRANULES_PER_STEP
from pynbd.server import transmission
from pynbd.server.buffers import BufferPool
from pynbd.server.commands import EXTENTS_AT_ONCE, Commands
from pynbd.server.connection import Connection
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.stream import COPY_COST, COPY_PIECE, SEND_TURN, Stream
from pynbd.server.transmission import TURN_REQUESTS
from tests.block.reading import eventually
from tests.server.counting import in_page_cache, tcp_pair
from tests.server.session import BLOCK_STATUS, READ, REQ_ONE, WRITE, Mode, talking

MIB = 1 << 20
SIZE = 1 << 20
UNKNOWN_COMMAND = 99
IHAVEOPT = 0x49484156454F5054


class Turns:
    """Counts calls (or what they do), and the most of them between two turns of the loop."""

    def __init__(self) -> None:
        self.calls = self.most = self.all = 0

    def count(self, amount: int = 1) -> None:
        self.calls += amount
        self.all += amount

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        watcher = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            watcher.cancel()

    async def _watch(self) -> None:
        while True:
            self.most, self.calls = max(self.most, self.calls), 0
            await asyncio.sleep(0)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[BlockNode]:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    path.read_bytes()  # into the page cache
    node = await open_image(path, format="raw")
    yield node
    await node.close()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Counts reads from the page cache and refused requests."""
    turns = Turns()
    preadv, refusal = os.preadv, Commands.refusal

    def counted_preadv(*args: Any) -> int:
        turns.count()
        return preadv(*args)

    def counted_refusal(*args: Any) -> bytes:
        turns.count()
        return refusal(*args)

    monkeypatch.setattr(os, "preadv", counted_preadv)
    monkeypatch.setattr(Commands, "refusal", counted_refusal)
    return turns


@pytest.mark.parametrize("command", [READ, UNKNOWN_COMMAND])
async def test_a_flood_of_requests(node: BlockNode, turns: Turns, command: int) -> None:
    async with talking(node, Mode.STRUCTURED) as talk:
        client = talk.client
        flood = [client.request(command, 0, 512) for _ in range(6000)]
        sending = asyncio.create_task(client.send(*flood))
        async with turns.counted():
            await client.all_replies()
        await sending
    assert turns.all == 6000
    assert turns.most <= TURN_REQUESTS


async def test_a_turn_that_is_over_is_followed_by_one(
    node: BlockNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receive takes all of a turn, and there is always more: the connection has asked to go on,
    and the loop sees that it is readable, which it never stops to look at. Both are one turn.
    """
    monkeypatch.setattr(transmission, "TURN_SECONDS", -1.0)
    monkeypatch.setattr(transmission, "RECEIVE_SIZE", 512)
    receives, pauses = Turns(), Turns()
    async with talking(node, Mode.SIMPLE) as talk:
        _count(monkeypatch, receives, Stream, "receive_into")
        _count(monkeypatch, pauses, Stream, "pause_reading")
        await talk.client.send(*(talk.client.request(READ, 0, 512) for _ in range(2000)))
        async with receives.counted():
            await talk.client.all_replies()
        assert pauses.all == 0
    assert receives.all > 100
    assert receives.most <= 2


async def test_one_long_read_over_a_flood(node: BlockNode, turns: Turns) -> None:
    """Whoever asks while the flood goes on is answered long before its end."""
    async with talking(node, Mode.SIMPLE) as flooding, talking(node, Mode.SIMPLE) as polite:
        flood = [flooding.client.request(UNKNOWN_COMMAND) for _ in range(6000)]
        sending = asyncio.create_task(flooding.client.send(*flood))
        await flooding.client.reply(1)
        asked_at = turns.all
        await polite.client.ask(READ, 0, 512)
        assert turns.all - asked_at <= 4 * TURN_REQUESTS
        await flooding.client.all_replies()
        await sending


@pytest.mark.parametrize("command", [READ, WRITE])
async def test_one_read_over_a_flood_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: int
) -> None:
    """4000 reads or writes of 4 KiB. Who asks meanwhile waits for a few turns of the flood, which
    has been answered in part by then.
    """
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    moves = Turns()
    for name in ("preadv", "pwrite", "pwritev"):
        _count(monkeypatch, moves, os, name)
    async with (
        await open_image(path, format="raw", read_only=False) as node,
        talking(node, Mode.SIMPLE) as flooding,
        talking(node, Mode.SIMPLE) as polite,
    ):
        client = flooding.client
        payload = bytes(4096) if command == WRITE else b""
        # Every other page: no two of them are one system call.
        flood = [
            client.request(command, at % 128 * 8192, 4096, payload=payload) for at in range(4000)
        ]
        sending = asyncio.create_task(client.send(*flood))
        await client.reply(1)
        for _ in range(5):
            asked_at = moves.all
            await polite.client.ask(READ, 0, 512)
            assert moves.all - asked_at <= 4 * TURN_REQUESTS
        assert len(client.order) < 4000
        await client.all_replies()
        await sending


async def test_one_cold_read_over_a_flood_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the pool is let go one by one: the lone one is made after those that were being
    made already, and one more of the flood.
    """
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    threads, made, go_on = 2, list[int](), threading.Semaphore(0)
    monkeypatch.setattr(HostFile, "read_now", lambda *_: 0)
    read_into = HostFile._read_into

    def slow_read(file: HostFile, view: memoryview, offset: int) -> int:
        made.append(offset)
        assert go_on.acquire(timeout=20)
        return read_into(file, view, offset)

    engine = Engine(threads)
    async with (
        await open_image(path, format="raw", engine=engine) as node,
        talking(node) as flooding,
        talking(node) as polite,
    ):
        monkeypatch.setattr(HostFile, "_read_into", slow_read)
        client = flooding.client
        await client.send(*(client.request(READ, at * 512, 512) for at in range(200)))
        await eventually(lambda: len(flooding.transmission._tasks) == 200)
        lone = polite.client.request(READ, SIZE - 512, 512)
        await polite.client.send(lone)
        await eventually(lambda: bool(polite.transmission._tasks))
        for _ in range(threads + 2):
            go_on.release()
        await polite.client.all_replies()
        assert made.index(SIZE - 512) <= threads + 1
        for _ in range(200):
            go_on.release()
        await client.all_replies()
    engine.close()


async def test_a_read_of_many_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MiB of which every other cluster of 4 KiB is data: 4096 reads of the page cache, as many
    of them in a turn as `EXTENTS_AT_ONCE` says, with those of who asks meanwhile.
    """
    data = os.urandom(4096)
    clusters = {at: Data(data) for at in range(0, 32 * MIB, 8192)}
    Image(size=32 * MIB, clusters=clusters, cluster_bits=12).write(tmp_path / "x.qcow2")
    turns = Turns()
    async with (
        await open_image(tmp_path / "x.qcow2", format="qcow2") as node,
        talking(node, Mode.STRUCTURED) as long,
        talking(node, Mode.STRUCTURED) as short,
    ):
        await short.client.ask(READ, 0, 4096)
        _count(monkeypatch, turns, os, "preadv")
        await long.client.send(long.client.request(READ, 0, 32 * MIB, cookie=1))
        async with turns.counted():
            while turns.all < 500:
                assert (await short.client.ask(READ, 0, 4096)).data(0, 4096) == data
            assert long.client.order == []
            reply = await long.client.reply(1)
    assert turns.all >= 4096
    assert turns.most <= EXTENTS_AT_ONCE + 2
    assert reply.data(0, 32 * MIB) == (data + bytes(4096)) * 4096


async def test_a_read_of_32_mib_over_tcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may not be lent is copied, a bounded part in a turn of the loop; who asks meanwhile is
    answered long before the end.
    """
    monkeypatch.setattr(socket, "socketpair", tcp_pair)
    content = os.urandom(32 * MIB)
    (tmp_path / "disk").write_bytes(content)
    path = tmp_path / "x.qcow2"
    peers.run("qemu-img", "convert", "-O", "qcow2", tmp_path / "disk", path)
    copied = Turns()
    with in_page_cache(path):
        async with (
            await open_image(path, read_only=False) as node,
            talking(node, Mode.STRUCTURED) as long,
            talking(node, Mode.STRUCTURED) as short,
        ):
            await short.client.ask(READ, 0, 4096)
            _count(monkeypatch, copied, os, "preadv", lambda count: count)
            await long.client.send(long.client.request(READ, 0, 32 * MIB, cookie=1))
            reading = asyncio.create_task(long.client.reply(1))
            async with copied.counted():
                await eventually(lambda: copied.all >= MIB)
                before = copied.all
                for _ in range(4):
                    await short.client.ask(READ, 0, 4096)
                assert copied.all - before <= 16 * MIB
                assert (await reading).data(0, 32 * MIB) == content
    assert copied.most <= SEND_TURN // COPY_COST + COPY_PIECE + 4096


def _many_extents(folder: Path) -> Path:
    """1 TiB in 64 L2 tables; every other one of its two million clusters reads as zeroes."""
    path = folder / "huge.qcow2"
    options = ["-o", "cluster_size=512k,preallocation=metadata"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1T")
    with path.open("r+b") as file:
        file.seek(36)
        length, offset = struct.unpack(">IQ", file.read(12))
        file.seek(offset)
        l1 = np.frombuffer(file.read(8 * length), ">u8")
        for entry in l1:
            table = int(entry) & 0x00FFFFFFFFFFFE00
            file.seek(table)
            words = np.frombuffer(file.read(512 << 10), ">u8").copy()
            words[::2] |= np.uint64(1)  # "All bytes of the cluster read as zeros"
            file.seek(table)
            file.write(words.tobytes())
    return path


async def test_a_huge_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for all of it, a batch of them, and one that has to be followed to its end: between
    two turns of the loop no more than two steps' worth of table entries are looked at. Who asks
    meanwhile waits for as much, on its way in and on its way out.
    """
    looked_at = Turns()
    decode = entries.decode

    def counted(tables: Any, first: int, count: int, *rest: Any) -> Any:
        looked_at.count(count)
        return decode(tables, first, count, *rest)

    path = _many_extents(tmp_path)
    contexts = standard_contexts(depth=True, bitmaps=[])
    async with (
        await open_image(path) as node,
        talking(node, Mode.EXTENDED, contexts=contexts) as mapping,
        talking(node, Mode.EXTENDED, contexts=contexts) as short,
    ):
        await short.client.ask(READ, 0, 4096)
        monkeypatch.setattr(entries, "decode", counted)
        client, size = mapping.client, 1 << 40
        depth = struct.pack(">QI", size, 1)
        batch = [client.request(BLOCK_STATUS, at << 35, size - (at << 35)) for at in range(8)]
        batch.append(client.request(BLOCK_STATUS, 0, payload=depth, flags=REQ_ONE))
        await client.send(*batch)
        reading = asyncio.create_task(client.all_replies())
        async with looked_at.counted():
            while not reading.done():
                before = looked_at.all
                assert not (await short.client.ask(READ, 0, 4096)).error
                assert looked_at.all - before <= 8 * GRANULES_PER_STEP
        await reading
    assert client.replies[9].status == {1: [(size, 1)]}
    assert looked_at.all >= size >> 19
    assert looked_at.most <= 2 * GRANULES_PER_STEP


@pytest.mark.parametrize("data", [b"", bytes(300_000)], ids=["options", "data"])
async def test_a_flood_of_options(
    node: BlockNode, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """Each option, and each piece of option data that is skipped, has a turn to itself."""
    turns = Turns()
    loop = asyncio.get_running_loop()
    exports = ExportTable([Export("", node, contexts={})])
    ours, theirs = socket.socketpair()
    with closing(theirs):
        theirs.setblocking(False)
        connection = Connection(ours, exports, BufferPool(), Limits())
        receive = connection._stream._recv

        async def counted(size: int) -> bytes:
            turns.count()
            return await receive(size)

        monkeypatch.setattr(connection._stream, "_recv", counted)
        running = loop.create_task(connection.run())
        option = struct.pack(">QII", IHAVEOPT, UNKNOWN_COMMAND, len(data)) + data
        count = 20 if data else 500
        abort = struct.pack(">QII", IHAVEOPT, 2, 0)
        talk = struct.pack(">I", 1) + option * count + abort
        sending = loop.create_task(loop.sock_sendall(theirs, talk))
        async with turns.counted():
            while await loop.sock_recv(theirs, 1 << 16):
                pass
        await sending
        await running
    assert turns.all >= count
    assert turns.most <= 8  # a header and its parts


def _count(
    patch: pytest.MonkeyPatch,
    turns: Turns,
    owner: Any,
    name: str,
    amount: Callable[[Any], int] = lambda _: 1,
) -> None:
    """Count the calls of ``name``, by what they give back."""
    call = getattr(owner, name)

    def counted(*args: Any) -> Any:
        value = call(*args)
        turns.count(amount(value))
        return value

    patch.setattr(owner, name, counted)
