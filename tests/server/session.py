"""A session in one process: a `Transmission` on one end of a socket pair, its client on the other.

The client takes replies apart by the specification ("Simple reply message", "Structured reply chunk
message", "Extended reply chunk message") with its own few structs, and fails on whatever a client
could not accept.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from pynbd.block.engine import Engine
from pynbd.block.node import BlockNode
from pynbd.block.pool import Lane
from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import Session
from pynbd.server.buffers import BufferPool
from pynbd.server.contexts import Context
from pynbd.server.export import Export
from pynbd.server.limits import Limits
from pynbd.server.stream import Stream
from pynbd.server.transmission import Transmission

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 95, 108


class Mode(Enum):
    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class WatchedEngine(Engine):
    """An engine that counts its hops, and holds the calls whose names are in ``held``."""

    def __init__(self, threads: int = 4) -> None:
        super().__init__(threads)
        self.quick_writes = None  # what is made in the loop cannot be held
        self.calls: list[str] = []
        self.held: set[str] = set()
        self._go_on = threading.Event()

    @property
    def hops(self) -> int:
        return len(self.calls)

    def start(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self.calls.append(call.__name__)
        return super().start(self._watched, call, *args)

    def start_in_lane(
        self, lane: Lane, call: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        return self.start(call, *args)

    def _watched(self, call: Callable[..., Any], *args: Any) -> Any:
        if call.__name__ in self.held:
            assert self._go_on.wait(20)
        return call(*args)

    def release(self) -> None:
        """Let go on what is held, and hold nothing more."""
        self.held.clear()
        self._go_on.set()


@dataclass
class Reply:
    """A whole reply. ``pieces``: (guest offset, length, data or None for a hole)."""

    error: int = 0
    message: str = ""
    pieces: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def data(self, offset: int, length: int) -> bytes:
        """What was read: the pieces cover the request exactly, without overlap."""
        at, parts = offset, []
        for start, size, data in sorted(self.pieces):
            assert start == at
            assert size > 0
            parts.append(bytes(size) if data is None else data)
            at += size
        assert at == offset + length
        return b"".join(parts)


class Client:
    """Sends requests and collects replies, in any order, by their cookies."""

    def __init__(self, sock: socket.socket, mode: Mode) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.mode = mode
        self.replies: dict[int, Reply] = {}
        self.order: list[int] = []
        """Cookies in the order in which their replies ended."""
        self._buffer = b""
        self._asked: dict[int, tuple[int, int, int]] = {}
        self._partial: dict[int, Reply] = {}
        self._cookie = 0

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> bytes:
        """The bytes of one request, whose reply is expected from now on."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        if payload:
            length = len(payload)
        if command != DISC:
            assert cookie not in self._asked
            self._asked[cookie] = (command, offset, length)
        if self.mode is Mode.EXTENDED:
            if payload:
                flags |= PAYLOAD_LEN
            head = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        else:
            head = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
        return head + payload

    async def send(self, *requests: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, b"".join(requests))

    async def ask(self, command: int, offset: int = 0, length: int = 0, **rest: Any) -> Reply:
        """One request and its reply."""
        request = self.request(command, offset, length, **rest)
        cookie = next(reversed(self._asked))
        await self.send(request)
        return await self.reply(cookie)

    async def reply(self, cookie: int) -> Reply:
        while cookie not in self.replies:
            await self._chunk()
        return self.replies[cookie]

    async def all_replies(self) -> None:
        """Until every request has its reply; nothing may follow."""
        while self._asked:
            await self._chunk()

    async def closed(self) -> None:
        """The server ends the connection, and says nothing more."""
        assert not self._buffer
        with suppress(ConnectionResetError):
            assert await asyncio.get_running_loop().sock_recv(self.sock, 1) == b""

    async def _bytes(self, count: int) -> bytes:
        loop = asyncio.get_running_loop()
        parts = [self._buffer]
        have = len(self._buffer)
        while have < count:
            part = await loop.sock_recv(self.sock, 1 << 18)
            if not part:
                raise EOFError
            parts.append(part)
            have += len(part)
        data = b"".join(parts)
        self._buffer = data[count:]
        return data[:count]

    async def _chunk(self) -> None:
        if self.mode is Mode.SIMPLE:
            await self._simple_reply()
            return
        if self.mode is Mode.EXTENDED:
            magic, flags, kind, cookie, offset, length = struct.unpack(
                ">IHHQQQ", await self._bytes(32)
            )
            assert magic == 0x6E8A278C
            assert offset == self._asked[cookie][1]
        else:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self._bytes(20))
            assert magic == 0x668E33EF
        command, offset, size = self._asked[cookie]
        reply = self._partial.setdefault(cookie, Reply())
        payload = await self._bytes(length)
        assert not reply.error
        if kind == 0:
            assert (flags, length) == (1, 0)
        elif kind == 1:
            assert command == READ
            (at,) = struct.unpack_from(">Q", payload)
            reply.pieces.append((at, length - 8, payload[8:]))
            assert offset <= at < at + length - 8 <= offset + size
        elif kind == 2:
            assert command == READ
            at, hole = struct.unpack(">QI", payload)
            reply.pieces.append((at, hole, None))
            assert offset <= at < at + hole <= offset + size
        elif kind in (5, 6):
            assert command == BLOCK_STATUS
            assert kind == (6 if self.mode is Mode.EXTENDED else 5)
            self._status(reply, payload)
        else:
            assert kind == 0x8001
            reply.error, text = struct.unpack_from(">IH", payload)
            reply.message = payload[6:].decode()
            assert len(payload) == 6 + text <= 1000
            assert flags == 1
            assert reply.error
        if flags:
            assert flags == 1
            self._end(cookie, self._partial.pop(cookie))

    def _status(self, reply: Reply, payload: bytes) -> None:
        if self.mode is Mode.EXTENDED:
            context, count = struct.unpack_from(">II", payload)
            extents = list(struct.iter_unpack(">QQ", payload[8:]))
            assert count == len(extents)
        else:
            (context,) = struct.unpack_from(">I", payload)
            extents = list(struct.iter_unpack(">II", payload[4:]))
        assert extents
        assert context not in reply.status
        reply.status[context] = [(length, state) for length, state in extents]

    async def _simple_reply(self) -> None:
        magic, error, cookie = struct.unpack(">IIQ", await self._bytes(16))
        assert magic == 0x67446698
        command, offset, length = self._asked[cookie]
        reply = Reply(error)
        if command == READ and not error and length:
            reply.pieces.append((offset, length, await self._bytes(length)))
        self._end(cookie, reply)

    def _end(self, cookie: int, reply: Reply) -> None:
        del self._asked[cookie]
        self.replies[cookie] = reply
        self.order.append(cookie)


def negotiated(export: Export, mode: Mode, contexts: Mapping[int, str]) -> Session:
    return Session(
        export=export.info,
        flags=export.info.flags,
        structured=mode is Mode.STRUCTURED,
        extended=mode is Mode.EXTENDED,
        contexts=contexts,
    )


@dataclass
class Talk:
    """Both ends of a session, and what runs the server's."""

    client: Client
    transmission: Transmission
    stream: Stream
    running: asyncio.Task[None]

    async def ends(self) -> None:
        """The server's end is over."""
        await asyncio.wait_for(asyncio.shield(self.running), 10)


@asynccontextmanager
async def talking(
    node: BlockNode,
    mode: Mode = Mode.SIMPLE,
    *,
    contexts: Mapping[str, Context] | None = None,
    export: Export | None = None,
    limits: Limits | None = None,
    wrap: Callable[[socket.socket], socket.socket] = lambda sock: sock,
) -> AsyncIterator[Talk]:
    """A session on ``node`` with all ``contexts`` selected; it ends when the client leaves.

    ``export``: one that other sessions are on as well, in place of ``node`` and ``contexts``.
    """
    export = export or Export("", node, contexts=contexts or {})
    ours, theirs = socket.socketpair()
    stream = Stream(asyncio.get_running_loop(), wrap(ours))
    session = negotiated(export, mode, dict(enumerate(export.contexts)))
    transmission = Transmission(stream, export, session, BufferPool(), limits or Limits())
    running = asyncio.get_running_loop().create_task(transmission.run())
    running.add_done_callback(lambda _: stream.close())  # as its connection does
    client = Client(theirs, mode)
    try:
        await asyncio.sleep(0)
        yield Talk(client, transmission, stream, running)
    finally:
        theirs.close()
        _, late = await asyncio.wait([running], timeout=20)
        assert not late
        if not running.cancelled():
            with suppress(ProtocolError):  # the test asked for it, and has seen it
                running.result()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def content(path: Path) -> bytes:
    return path.read_bytes()
