"""Server and Connection: limits, deadlines and every way to end, with real sockets."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import random
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.server import connection
from pynbd.server import server as servers
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.server import GRACE, Server
from tests.server.session import (
    ESHUTDOWN,
    FLUSH,
    READ,
    WRITE,
    Client,
    Mode,
    WatchedEngine,
    content,
    open_files,
)

SIZE = 1 << 20
BYTES = random.Random(10).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(BYTES)
    return path


class Scene:
    """A server on one or two loopback ports, and those who connect to it."""

    def __init__(self, server: Server, listeners: list[socket.socket], node: BlockNode) -> None:
        self.server = server
        self.node = node
        self.addresses = [listener.getsockname() for listener in listeners]
        self.running = asyncio.get_running_loop().create_task(server.run())
        self.sockets: list[socket.socket] = []

    async def connect(self, listener: int = 0) -> socket.socket:
        """A connection that has said nothing yet."""
        sock = socket.socket()
        self.sockets.append(sock)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.addresses[listener])
        return sock

    async def greeted(self, sock: socket.socket, timeout: float = 5) -> bool:
        """Whether the server has greeted; it does as soon as there is a place."""
        loop = asyncio.get_running_loop()
        try:
            greeting = await asyncio.wait_for(loop.sock_recv(sock, 18), timeout)
        except TimeoutError:
            return False
        assert greeting == b"NBDMAGICIHAVEOPT\0\3"
        return True

    async def client(self, listener: int = 0) -> Client:
        """A connection in transmission."""
        sock = await self.connect(listener)
        assert await self.greeted(sock)
        return await self.export_name(sock)

    async def export_name(self, sock: socket.socket) -> Client:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        size, _ = struct.unpack(">QH", await loop.sock_recv(sock, 10))
        assert size == SIZE
        return Client(sock, Mode.SIMPLE)

    async def ended(self, sock: socket.socket) -> bool:
        """Whether the server closed the connection and said nothing more."""
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.sock_recv(sock, 1), 5) == b""
        except ConnectionResetError:
            return True


@asynccontextmanager
async def serving(
    path: Path,
    engine: WatchedEngine,
    *,
    listeners: int = 1,
    sockets: list[socket.socket] | None = None,
    **options: Any,
) -> AsyncIterator[Scene]:
    node = await open_image(path, format="raw", read_only=False, engine=engine)
    node.own_engine = engine
    engine.calls.clear()
    contexts = standard_contexts(depth=True, bitmaps=())
    if sockets is None:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(listeners)]
    exports = ExportTable([Export("", node, contexts=contexts)])
    scene = Scene(Server(exports, sockets, **options), sockets, node)
    try:
        yield scene
    finally:
        engine.release()
        scene.server.stop()
        await asyncio.wait_for(scene.running, 10)
        for sock in scene.sockets:
            sock.close()
        await node.close()


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listeners", [1, 2])
async def test_more_clients_than_places_wait(
    path: Path, engine: WatchedEngine, listeners: int
) -> None:
    """Row L4; however many addresses are listened on."""
    async with serving(path, engine, listeners=listeners, max_clients=2) as scene:
        first, second = await scene.client(), await scene.client(listeners - 1)
        waiting = [await scene.connect(n % listeners) for n in range(3)]
        for sock in waiting:
            assert not await scene.greeted(sock, 0.05)
        first.sock.close()
        assert (await second.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
        loop = asyncio.get_running_loop()
        greetings = [asyncio.ensure_future(loop.sock_recv(sock, 18)) for sock in waiting]
        done, still = await asyncio.wait(greetings, timeout=5, return_when="FIRST_COMPLETED")
        await asyncio.sleep(0.05)
        assert sum(greeting.done() for greeting in greetings) == 1
        for greeting in still:
            greeting.cancel()
        await asyncio.wait(greetings)
        assert [await greeting for greeting in done] == [b"NBDMAGICIHAVEOPT\0\3"]


async def test_who_does_not_negotiate_is_dropped(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Row H9: after the time for the whole negotiation, however often it says something."""
    async with serving(path, engine, max_clients=1, limits=Limits(handshake_seconds=0.3)) as scene:
        loop = asyncio.get_running_loop()
        silent = await scene.connect()
        start = time.monotonic()
        assert await scene.greeted(silent)
        assert await scene.ended(silent)
        assert 0.25 < time.monotonic() - start < 2
        chatty = await scene.connect()
        assert await scene.greeted(chatty)
        await loop.sock_sendall(chatty, struct.pack(">I", 3))
        unknown = struct.pack(">8sII", b"IHAVEOPT", 99, 0)
        start = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                await loop.sock_sendall(chatty, unknown)
                if not await loop.sock_recv(chatty, 1 << 16):
                    break
                await asyncio.sleep(0.02)
        assert time.monotonic() - start < 2
        # Who came as far as transmission may stay as long as it likes.
        client = await scene.client()
        await asyncio.sleep(0.4)
        assert (await client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_no_memory_for_a_connection(
    path: Path,
    engine: WatchedEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """When it comes, or while it negotiates: it has to go, and nobody else."""

    def no_memory(*_: object, **__: object) -> Any:
        raise MemoryError

    async with serving(path, engine) as scene:
        client = await scene.client()
        for module, name in ((servers, "Connection"), (connection, "negotiate")):
            with monkeypatch.context() as without:
                without.setattr(module, name, no_memory)
                assert await scene.ended(await scene.connect())
            assert (await client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
        assert (await (await scene.client()).ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
    said = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert said == ["a connection could not be served: there is no memory for it"]


async def test_no_deadline(path: Path, engine: WatchedEngine) -> None:
    async with serving(path, engine, limits=Limits(handshake_seconds=0)) as scene:
        sock = await scene.connect()
        assert await scene.greeted(sock)
        await asyncio.sleep(0.1)
        client = await scene.export_name(sock)
        assert not (await client.ask(FLUSH)).error


async def test_strangers_leave_no_trace(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows H8 and L3: port scans, nonsense, and clients that vanish anywhere."""
    async with serving(path, engine) as scene:
        await scene.client()
        loop = asyncio.get_running_loop()
        before = open_files()
        hello = struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0)
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0", hello[:4], hello[:13], hello[:-1]):
            sock = await scene.connect()
            await loop.sock_sendall(sock, said)
            sock.close()
        for length in (1, 30, 1000):
            client = await scene.client()
            request = client.request(WRITE, 0, payload=bytes(2000))
            await client.send(request[:length])
            client.sock.close()
        for _ in range(100):
            await asyncio.sleep(0.005)
            if open_files() == before:
                break
        assert open_files() == before
        assert (await (await scene.client()).ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
    assert content(path) == BYTES
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    filling = []
    with suppress(OSError):
        while True:
            filling.append(os.dup(0))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filling:
            os.close(fd)


async def test_no_descriptor_left(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """The server waits, serves those it has, and goes on when there is one."""
    async with serving(path, engine, listeners=2) as scene:
        client = await scene.client()
        for listener in (0, 1, 0):
            waiting = socket.socket()
            scene.sockets.append(waiting)
            waiting.setblocking(False)
            with no_more_descriptors():
                await asyncio.get_running_loop().sock_connect(waiting, scene.addresses[listener])
                assert not await scene.greeted(waiting, 0.25)
                assert (await client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
            assert await scene.greeted(waiting)
    # Once, however often it is tried again, and however often a client makes room for a moment.
    said = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert said == ["a connection could not be accepted: Too many open files"]


async def test_a_client_that_left_the_backlog(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """ECONNABORTED is no trouble: there is nobody to be told, and the next one waits."""
    left = [ConnectionAbortedError(errno.ECONNABORTED, "Software caused connection abort")] * 3

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            if left:
                raise left.pop()
            return super().accept()

    with Listener() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with serving(path, engine, sockets=[listener]) as scene:
            assert await scene.greeted(await scene.connect())
            assert not left
    assert not caplog.records


async def test_a_listener_that_fails_is_seen(path: Path, engine: WatchedEngine) -> None:
    """It ends the server, which would go on without a door."""
    async with serving(path, engine) as scene:

        async def defect() -> None:
            raise ValueError

        scene.server._place = defect  # type: ignore[method-assign]
        await scene.connect()
        await asyncio.wait([scene.running], timeout=5)
        assert isinstance(scene.running.exception(), ValueError)
        scene.running = asyncio.get_running_loop().create_task(asyncio.sleep(0))


async def test_others_have_their_turn_while_many_connect(path: Path, engine: WatchedEngine) -> None:
    async with serving(path, engine) as scene:
        clients = [socket.create_connection(scene.addresses[0]) for _ in range(50)]
        scene.sockets += clients
        clients[-1].setblocking(False)
        turns = 0
        while True:
            with suppress(BlockingIOError):
                assert clients[-1].recv(18) == b"NBDMAGICIHAVEOPT\0\3"
                break
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 50


# Until idle --------------------------------------------------------------------------------------


async def test_until_idle(path: Path, engine: WatchedEngine) -> None:
    """Row L5: probes of the port do not count, the last of several clients does."""
    async with serving(path, engine, until_idle=True) as scene:
        (await scene.connect()).close()
        await asyncio.sleep(0.05)
        assert not scene.running.done()
        first, second = await scene.client(), await scene.client()
        first.sock.close()
        await asyncio.sleep(0.05)
        assert not scene.running.done()
        second.sock.close()
        await asyncio.wait_for(asyncio.shield(scene.running), 3)


async def test_until_idle_with_a_probe_that_stays_longer(path: Path, engine: WatchedEngine) -> None:
    """Whoever leaves last: a client was there, and nobody is."""
    async with serving(path, engine, until_idle=True) as scene:
        probe = await scene.connect()
        assert await scene.greeted(probe)
        client = await scene.client()
        client.sock.close()
        await asyncio.sleep(0.05)
        assert not scene.running.done()  # it may yet negotiate
        probe.close()
        await asyncio.wait_for(asyncio.shield(scene.running), 3)


# Ending ------------------------------------------------------------------------------------------


async def test_stop_is_prompt(path: Path, engine: WatchedEngine) -> None:
    """Row L3: neither who negotiates, nor who is idle, nor who waits in the backlog delays it."""
    async with serving(path, engine, max_clients=3) as scene:
        idle = await scene.client()
        silent, halfway = await scene.connect(), await scene.connect()
        assert await scene.greeted(silent)
        assert await scene.greeted(halfway)
        await asyncio.get_running_loop().sock_sendall(halfway, struct.pack(">I8s", 3, b"IHAVEOPT"))
        waiting = await scene.connect()
        await asyncio.sleep(0.02)
        start = time.monotonic()
        scene.server.stop()
        await asyncio.wait_for(scene.running, 5)
        assert time.monotonic() - start < 0.5
        for sock in (idle.sock, silent, halfway, waiting):
            assert await scene.ended(sock)
        with pytest.raises(ConnectionRefusedError):
            await scene.connect()


async def test_stop_lets_requests_end(path: Path, engine: WatchedEngine) -> None:
    """Rows L1 and L2."""
    async with serving(path, engine) as scene:
        client = await scene.client()
        engine.held = {"_write_batch"}
        await client.send(client.request(WRITE, 0, payload=b"under way", cookie=1))
        await asyncio.sleep(0.02)
        scene.server.stop()
        await asyncio.sleep(0.02)
        assert (await client.ask(READ, 0, 512, cookie=2)).error == ESHUTDOWN
        assert not scene.running.done()
        engine.release()
        assert not (await client.reply(1)).error
        await client.closed()
        await asyncio.wait_for(scene.running, 5)
    assert content(path)[:9] == b"under way"


async def test_stop_has_a_limit(path: Path, engine: WatchedEngine) -> None:
    """A request that outlasts the grace is dropped, but its system call is waited for."""
    async with serving(path, engine) as scene:
        client = await scene.client()
        engine.held = {"_write_batch"}
        await client.send(client.request(WRITE, 0, payload=b"late"))
        await asyncio.sleep(0.02)
        start = time.monotonic()
        scene.server.stop()
        asyncio.get_running_loop().call_later(GRACE + 0.3, engine.release)
        await asyncio.wait_for(scene.running, 10)
        assert GRACE - 0.1 < time.monotonic() - start < GRACE + 2
        await client.closed()
    assert content(path)[:4] == b"late"


async def test_stop_with_a_peer_that_takes_nothing(path: Path, engine: WatchedEngine) -> None:
    async with serving(path, engine) as scene:
        client = await scene.client()
        await client.send(*(client.request(READ, 0, SIZE) for _ in range(64)))
        await asyncio.sleep(0.05)
        scene.server.stop()
        start = time.monotonic()
        await asyncio.wait_for(scene.running, 10)
        assert time.monotonic() - start < GRACE + 1


async def test_nothing_stays_open(path: Path, engine: WatchedEngine) -> None:
    await asyncio.get_running_loop().run_in_executor(None, int)  # what the loop keeps
    before = open_files()
    async with serving(path, engine) as scene:
        for _ in range(20):
            client = await scene.client()
            await client.ask(READ, 0, 512)
        for _ in range(20):
            await scene.connect()
    assert open_files() == before


async def test_who_comes_while_it_ends(path: Path, engine: WatchedEngine) -> None:
    """Is accepted or not, and leaves nothing behind either way."""
    await asyncio.get_running_loop().run_in_executor(None, int)
    before = open_files()
    for turns in range(10):
        async with serving(path, engine) as scene:
            with socket.create_connection(scene.addresses[0], 10):
                for _ in range(turns):
                    await asyncio.sleep(0)
                scene.server.stop()
                await asyncio.wait_for(scene.running, 10)
    gc.collect()
    assert open_files() == before
