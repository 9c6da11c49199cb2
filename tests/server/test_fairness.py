"""Whoever floods the server leaves the others their turns of the loop.

Turns are counted, not timed: between two of them no more work may lie than the bound allows.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.server.buffers import BufferPool
from pynbd.server.commands import Commands
from pynbd.server.connection import Connection
from pynbd.server.export import Export, ExportTable
from pynbd.server.transmission import TURN_REQUESTS
from tests.server.session import READ, Mode, talking

SIZE = 1 << 20
UNKNOWN_COMMAND = 99
IHAVEOPT = 0x49484156454F5054


class Turns:
    """Counts calls, and the most of them between two turns of the loop."""

    def __init__(self) -> None:
        self.calls = self.most = self.all = 0

    def count(self) -> None:
        self.calls += 1
        self.all += 1

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
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Turns]:
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


@pytest.mark.parametrize("data", [b"", bytes(300_000)], ids=["options", "data"])
async def test_a_flood_of_options(
    node: BlockNode, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """Each option, and each piece of option data that is skipped, has a turn to itself."""
    turns = Turns()
    loop = asyncio.get_running_loop()
    receive = loop.sock_recv

    async def counted(sock: socket.socket, size: int) -> bytes:
        turns.count()
        return await receive(sock, size)

    exports = ExportTable([Export("", node, contexts={})])
    ours, theirs = socket.socketpair()
    with closing(theirs):
        theirs.setblocking(False)
        connection = Connection(ours, exports, BufferPool())
        monkeypatch.setattr(connection._stream, "_loop", _Counting(loop, counted))
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


class _Counting:
    """A loop whose `sock_recv` is counted."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Any) -> None:
        self._loop = loop
        self.sock_recv = receive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)
