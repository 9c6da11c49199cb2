"""Every limit of a server is reached, by clients on real sockets."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.limits import ImageLimits
from pynbd.errors import UsageError
from pynbd.server import server as servers
from pynbd.server import shares, stalls
from pynbd.server.export import ExportTable
from pynbd.server.limits import Limits
from pynbd.server.server import Server
from pynbd.server.serving import serve
from tests.block.reading import eventually
from tests.server.session import READ, WRITE, Client, WatchedEngine
from tests.server.test_server import BYTES, SIZE, Scene, path, serving

__all__ = ["path"]  # a fixture
M = 1 << 20


async def connect_from(scene: Scene, source: str) -> socket.socket:
    sock = socket.socket()
    scene.sockets.append(sock)
    sock.setblocking(False)
    sock.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(sock, scene.addresses[0])
    return sock


async def test_connections_from_one_address(path: Path, engine: WatchedEngine) -> None:
    """More than so many are closed before a word; other addresses do not notice, and who leaves
    makes room.
    """
    async with serving(path, engine, limits=Limits(per_address=3)) as scene:
        first = [await connect_from(scene, "127.0.0.1") for _ in range(3)]
        for sock in first:
            assert await scene.greeted(sock)
        assert await scene.ended(await connect_from(scene, "127.0.0.1"))
        assert await scene.greeted(await connect_from(scene, "127.0.0.2"))
        first[0].close()
        await eventually(lambda: len(scene.server._connections) == 3)
        assert await scene.greeted(await connect_from(scene, "127.0.0.1"))


async def test_who_negotiates_makes_way_for_others(
    path: Path,
    engine: WatchedEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two places and three who say nothing: who comes after them is served long before their time
    is over. Who has come as far as transmission keeps its place, however silent.
    """
    caplog.set_level(logging.INFO, "pynbd")
    monkeypatch.setattr(servers, "TURN", 0.1)
    limits = Limits(handshake_seconds=3600)
    async with serving(path, engine, max_clients=2, listeners=2, limits=limits) as scene:
        stays = await scene.client()
        silent = [await scene.connect(number % 2) for number in range(3)]
        polite = await asyncio.wait_for(scene.client(), 20)
        for sock in silent:
            assert await scene.greeted(sock)
            assert await scene.ended(sock)
        for client in (polite, stays):
            assert (await client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
    said = [record.getMessage() for record in caplog.records if record.name == "pynbd"]
    why = " disconnected: others wait, and it does not negotiate"
    assert [line.endswith(why) for line in said] == [True] * 3


@pytest.mark.parametrize("seconds", [0.1, 0.0999, 0.1001])
async def test_both_times_of_a_negotiation_end_at_once(
    path: Path, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Who has to make way has just been dropped: its place is free, and the server goes on."""
    monkeypatch.setattr(servers, "TURN", 0.1)
    limits = Limits(handshake_seconds=seconds)
    async with serving(path, engine, max_clients=1, limits=limits) as scene:
        silent = [await scene.connect() for _ in range(5)]
        polite = await asyncio.wait_for(scene.client(), 20)
        for sock in silent:
            assert await scene.greeted(sock)
            assert await scene.ended(sock)
        assert (await polite.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]


@contextmanager
def few_descriptors(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_reserve_of_descriptors(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Who comes when only the reserve is left waits in the backlog, and is served once another one
    has left; meanwhile files can be opened. It is told once.
    """
    async with serving(path, engine, limits=Limits(handshake_seconds=0)) as scene:
        waiting = [await scene.connect() for _ in range(40)]
        await eventually(lambda: len(scene.server._connections) == 40)
        assert await scene.greeted(waiting[0])
        first = await scene.export_name(waiting[0])
        # So many numbers are taken now that the next connection is in the reserve.
        gc.collect()  # what others have left gives its numbers back now, not in between
        free = os.dup(0)
        os.close(free)
        with few_descriptors(free * 4 // 3 + 1):
            late = [await scene.connect() for _ in range(3)]
            await eventually(lambda: scene.server._places.full)
            greeted = [await scene.greeted(sock, 0.05) for sock in late]
            assert not all(greeted)
            with path.open("rb"):
                pass
            assert (await first.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
            for sock in waiting[1:]:
                sock.close()
            assert all(
                [had or await scene.greeted(sock) for had, sock in zip(greeted, late, strict=True)]
            )
    said = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert said == ["connections wait until one ends: hardly any descriptors are left"]


async def test_options_of_one_negotiation(path: Path, engine: WatchedEngine) -> None:
    for limits in (Limits(options=10), Limits(option_bytes=10 * (16 + 50))):
        async with serving(path, engine, limits=limits) as scene:
            sock = await scene.connect()
            assert await scene.greeted(sock)
            loop = asyncio.get_running_loop()
            unknown = struct.pack(">8sII", b"IHAVEOPT", 99, 50) + bytes(50)
            await loop.sock_sendall(sock, struct.pack(">I", 3) + unknown * 10)
            heard = b""
            while heard.count(struct.pack(">Q", 0x3E889045565A9)) < 10:
                heard += await asyncio.wait_for(loop.sock_recv(sock, 1 << 16), 10)
            await loop.sock_sendall(sock, unknown)
            assert await scene.ended(sock)


@pytest.mark.parametrize("what", ["replies", "payloads"])
async def test_memory_of_all_connections(
    path: Path, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A crowd wants far more than there is, and holds what it gets: replies that it does not take,
    or payloads of which the last byte does not come. The limit holds; a polite client is served,
    short requests at once, and long ones when it has proved itself.
    """
    short = SIZE // 4
    monkeypatch.setattr(shares, "SHORT", short)
    limits = Limits(all_bytes=8 * M, handshake_seconds=0)
    async with serving(path, engine, limits=limits) as scene:
        memory = scene.server._pool.memory
        assert memory.used == 0
        node = scene.node
        assert node.file is not None
        node.file._cachestat = False  # nothing is lent
        crowd = [await scene.client() for _ in range(20)]
        for client in crowd:
            # So that less of it is in the sockets than is asked for.
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sending = []
        for client in crowd:
            if what == "replies":
                talk = b"".join(client.request(READ, 0, M) for _ in range(16))
            else:
                talk = client.request(WRITE, 0, payload=BYTES)[:-1]
            sending.append(asyncio.create_task(client.send(talk)))
        await eventually(lambda: memory.used >= 4 * M)
        polite = await scene.client()
        for _ in range(SIZE // short + 4):
            reply = await asyncio.wait_for(polite.ask(READ, 0, short), 20)
            assert reply.data(0, short) == BYTES[:short]
        for _ in range(3):
            reply = await asyncio.wait_for(polite.ask(READ, 0, SIZE), 20)
            assert reply.data(0, SIZE) == BYTES
            assert not (await asyncio.wait_for(polite.ask(WRITE, 0, payload=BYTES), 20)).error
        assert memory.short
        assert memory.used <= 8 * M + SIZE + 21 * short
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        for client in crowd:
            client.sock.close()
        polite.sock.close()
        await eventually(lambda: not memory.used and not memory.short)
        assert memory._counted == memory._unproved == 0


@pytest.mark.parametrize("what", ["replies", "payloads"])
async def test_a_first_request_that_is_long(
    path: Path, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It comes when others hold all that there is for strangers, and more of them wait: they have
    to go one after the other, and it is served.
    """
    monkeypatch.setattr(shares, "SHORT", SIZE // 16)
    monkeypatch.setattr(stalls, "LIMIT_WHEN_SHORT", 0.2)
    async with serving(path, engine, limits=Limits(all_bytes=M)) as scene:
        assert scene.node.file is not None
        scene.node.file._cachestat = False  # nothing is lent
        crowd = [await scene.client() for _ in range(8)]
        for client in crowd:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            if what == "replies":
                await client.send(*(client.request(READ, 0, M) for _ in range(16)))
            else:
                await client.send(client.request(WRITE, 0, payload=BYTES)[:1000])
        await eventually(lambda: scene.server._pool.memory.awaited)
        polite = await scene.client()
        assert (await asyncio.wait_for(polite.ask(READ, 0, SIZE), 20)).data(0, SIZE) == BYTES
        assert not (await asyncio.wait_for(polite.ask(WRITE, 0, payload=BYTES), 20)).error


async def test_who_is_slow_and_in_the_way(
    path: Path, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload that comes at more than the least rate may take its time, until others wait for the
    memory that it holds.
    """
    monkeypatch.setattr(shares, "SHORT", SIZE // 16)
    monkeypatch.setattr(stalls, "LIMIT_WHEN_SHORT", 0.3)
    monkeypatch.setattr(stalls, "LONGEST_WHEN_SHORT", 1.0)
    async with serving(path, engine, limits=Limits(all_bytes=M)) as scene:
        slow, polite = await scene.client(), await scene.client()
        await slow.send(slow.request(WRITE, 0, payload=BYTES)[:1000])

        async def comes_slowly() -> None:
            while True:
                await slow.send(bytes(500))
                await asyncio.sleep(0.02)

        coming = asyncio.create_task(comes_slowly())
        done, _ = await asyncio.wait([coming], timeout=1)
        assert not done
        reply = await asyncio.wait_for(polite.ask(READ, 0, SIZE), 20)
        assert reply.data(0, SIZE) == BYTES
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(coming, 20)


async def test_a_machine_that_went_down(path: Path, engine: WatchedEngine) -> None:
    """TCP asks a silent peer whether it is there."""
    async with serving(path, engine) as scene:
        client = await scene.client()
        assert isinstance(client, Client)
        (connection,) = scene.server._connections.values()
        sock = connection._stream._sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 300


@pytest.mark.parametrize("field", ["requests", "received_bytes", "queued_bytes"])
def test_a_connection_always_has_something(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field}: 1 or more is expected, not 0"):
        Limits(**{field: 0})


def test_no_limit_is_negative() -> None:
    with pytest.raises(UsageError, match="stall_seconds: 0 or more is expected, not -1"):
        Limits(stall_seconds=-1)
    assert Limits(stall_seconds=0, all_bytes=0).all_bytes == 0


@pytest.mark.parametrize(
    "field, given, what",
    [
        ("per_address", 1.5, "a whole number"),
        ("per_address", "x", "a whole number"),
        ("all_bytes", None, "a whole number"),
        ("stall_seconds", "x", "a number"),
        ("stall_seconds", math.nan, "a number"),
        ("handshake_seconds", math.inf, "a number"),
    ],
)
def test_what_is_no_limit(field: str, given: Any, what: str) -> None:
    with pytest.raises(UsageError) as error:
        Limits(**{field: given})
    wanted = f"0 or more is expected, not {given!r} ({what})"
    assert str(error.value) == f"Limits.{field}: {wanted}"


@pytest.mark.parametrize("name", ["limits", "image_limits"])
async def test_limits_of_the_other_kind(path: Path, name: str) -> None:
    kinds = {"limits": "Limits", "image_limits": "ImageLimits"}
    other: Any = ImageLimits() if name == "limits" else Limits()
    said = f"^{name}: pynbd.{kinds[name]} is expected, not {type(other).__name__}$"
    with pytest.raises(UsageError, match=said):
        async with serve(path, **{name: other}):
            pass
    with pytest.raises(UsageError, match=r"^limits: pynbd\.Limits is expected, not ImageLimits$"):
        Server(ExportTable([]), [], limits=ImageLimits())  # type: ignore[arg-type]
