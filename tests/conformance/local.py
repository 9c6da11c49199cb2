"""A server in a thread of the test, on a file that the test holds in its hands.

Some rows of the protocol are about moments: a disk that has not answered yet, a file that becomes
shorter between two system calls, a file system that cannot do something. `HeldFile` is a real file
with these moments under control; everything above it is the server as it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from socket import socket
from typing import Any, NamedTuple

import pytest
import uvloop

from pynbd.block.chain import open_image
from pynbd.block.engine import Buffer, Engine, HostFile
from pynbd.block.node import BlockNode
from pynbd.block.raw import RawNode
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.listening import listen_unix
from pynbd.server.server import Server
from tests.conformance.client import Mode, Peer
from tests.conformance.server import pattern

DEADLINE = 5.0
MakeNode = Callable[[Engine], Awaitable[BlockNode]]
_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class HeldFile(HostFile):
    """A file whose disk can be held, fail, be short of abilities, or be counted.

    ``events`` has "write" and "sync" in the order in which they were done.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.released = threading.Event()
        self.released.set()
        self.entered = threading.Semaphore(0)
        self.written = threading.Semaphore(0)
        self.events: list[str] = []
        self.failure: OSError | None = None
        self.claims_resident = False
        self.can_allocate = True

    def resident(self, offset: int, length: int) -> bool:
        return self.claims_resident or super().resident(offset, length)

    async def fallocate(self, mode: int, offset: int, length: int) -> bool:
        if self.failure:
            raise self.failure
        return self.can_allocate and await super().fallocate(mode, offset, length)

    def _sync(self) -> None:
        self._wait()
        super()._sync()
        self.events.append("sync")

    def _quick(self) -> None:
        """What is made in the loop cannot be held."""

    def _write_batch(self, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        self._wait()
        if self.failure:
            return [self.failure for _ in pieces]
        self.events.append("write")
        failures = super()._write_batch(pieces)
        self.written.release()
        return failures

    def _wait(self) -> None:
        self.entered.release()
        assert self.released.wait(DEADLINE), "nobody released the disk"


class LocalServer:
    """A running server: ``socket`` is where it listens, ``server`` the object inside."""

    def __init__(self, loop: asyncio.AbstractEventLoop, where: Any) -> None:
        self.loop = loop
        self.socket = where
        self.server: Server

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call ``function`` in the server's thread, and wait until it has returned."""

        async def call() -> None:
            function(*arguments)

        asyncio.run_coroutine_threadsafe(call(), self.loop).result(DEADLINE)


@contextmanager
def serving(
    loop_name: str, where: str | socket, nodes: Mapping[str, MakeNode]
) -> Iterator[LocalServer]:
    """Serve nodes by the names of their exports, in a thread, until the end of the block.

    ``where``: the path of a unix socket, or a socket that listens already.
    """
    loop = _LOOPS[loop_name]()
    listener = listen_unix(where) if isinstance(where, str) else where
    local = LocalServer(loop, listener.getsockname())
    ready = threading.Event()
    ended: list[BaseException] = []

    async def serve() -> None:
        engine = Engine()
        opened = {name: await make(engine) for name, make in nodes.items()}
        table = ExportTable(
            Export(name, node, contexts=standard_contexts(depth=True, bitmaps=node.bitmaps()))
            for name, node in opened.items()
        )
        local.server = Server(table, [listener])
        loop.call_soon(ready.set)
        await local.server.run()
        for node in opened.values():
            await node.close()
        engine.close()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as error:  # it is raised again in the thread of the test
            ended.append(error)
        finally:
            loop.close()
            ready.set()

    thread = threading.Thread(target=run, name="pynbd-server")
    thread.start()
    assert ready.wait(DEADLINE)
    try:
        yield local
    finally:
        with suppress(RuntimeError):  # it has ended already
            loop.call_soon_threadsafe(local.server.stop)
        thread.join(2 * DEADLINE)
    assert not thread.is_alive()
    if ended:
        raise ended[0]


def held_node(path: Path, held: list[HeldFile]) -> MakeNode:
    """A writable raw node on ``path``; its file is appended to ``held``."""

    async def make(engine: Engine) -> BlockNode:
        file = HeldFile.open(engine, os.fspath(path), writable=True)
        assert isinstance(file, HeldFile)
        held.append(file)
        return RawNode(file, read_only=False)

    return make


def held_image(path: Path, held: list[HeldFile]) -> MakeNode:
    """A writable qcow2 image; its file is appended to ``held``."""

    async def make(engine: Engine) -> BlockNode:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pynbd.block.file.HostFile", HeldFile)
            node = await open_image(path, format="qcow2", read_only=False, engine=engine)
        assert isinstance(node.file, HeldFile)
        held.append(node.file)
        return node

    return make


@cache
def content(size: int) -> bytes:
    """`pattern` from the start, kept."""
    return pattern(0, size)


class Held(NamedTuple):
    """A server whose default export is one held file, ``path``, with `content`."""

    local: LocalServer
    path: Path
    file: HeldFile

    def enter(self, mode: Mode, contexts: Sequence[str] = ()) -> Peer:
        """A connection in transmission."""
        peer = Peer(self.local.socket)
        peer.negotiate(mode, contexts=contexts)
        return peer


@contextmanager
def holding(loop_name: str, folder: Path, size: int) -> Iterator[Held]:
    """A server on a held file of ``size`` bytes, until the end of the block."""
    path = folder / "disk.img"
    path.write_bytes(content(size))
    with holding_open(loop_name, path, held_node) as held:
        yield held


@contextmanager
def holding_open(
    loop_name: str, path: Path, node: Callable[[Path, list[HeldFile]], MakeNode]
) -> Iterator[Held]:
    """A server on a held file, opened as ``node``."""
    files: list[HeldFile] = []
    with serving(loop_name, str(path.with_suffix(".sock")), {"": node(path, files)}) as local:
        yield Held(local, path, files[0])
