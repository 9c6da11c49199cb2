"""The socket of one connection to a server.

1. During the handshake never a byte is read that was not asked for, so that nothing which arrived
   in clear can be taken for something that came through TLS. `Stream.start_tls` puts a `Tunnel` in
   the place of the socket.
2. Buffers that are handed to `Stream.send` belong to the stream until they are sent. Those of
   one turn of the loop leave together.
3. Trouble with the peer is told once, to ``on_lost``, and then nothing more is sent.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from pynbd.protocol.uri import NbdUri, Transport
from pynbd.tls.tunnel import Tunnel

# sendmsg takes no more pieces than this in one call (IOV_MAX).
_IOV_MAX = 1024
# Bytes of socket buffer that are asked for; the kernel may give less.
_SOCKET_BUFFER = 1 << 22
# A unix socket whose queue is full says so at once; seconds before the next attempt.
_CONNECT_PAUSE = 0.01

Buffer = bytes | bytearray | memoryview


async def open_socket(uri: NbdUri) -> socket.socket:
    """A socket that is connected to the server of ``uri``. Raises `OSError`."""
    failure = OSError("there is no address")
    for family, address in await _addresses(uri):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await _connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


async def _addresses(uri: NbdUri) -> list[tuple[int, Any]]:
    if uri.transport is Transport.UNIX:
        return [(socket.AF_UNIX, uri.socket)]
    if uri.transport is Transport.VSOCK:
        return [(socket.AF_VSOCK, (int(uri.host), uri.port))]
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a part that is empty or too long, before anybody is asked
        raise OSError(errno.EINVAL, "no host can have this name") from None
    return [(family, address) for family, _, _, _, address in found]


async def _connect(sock: socket.socket, address: Any) -> None:
    """The same for all families; uvloop's own way knows no vsock, and asyncio's takes a unix socket
    whose queue is full for one that will be connected.
    """
    error = sock.connect_ex(address)
    while error == errno.EAGAIN:
        await asyncio.sleep(_CONNECT_PAUSE)
        error = sock.connect_ex(address)
    if error == errno.EINPROGRESS:
        loop = asyncio.get_running_loop()
        decided = asyncio.Event()
        loop.add_writer(sock.fileno(), decided.set)
        try:
            await decided.wait()
        finally:
            loop.remove_writer(sock.fileno())
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))


class Stream:
    """A connected stream socket, in clear or, after `start_tls`, through TLS."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._tunnel: Tunnel | None = None
        self._channel: socket.socket | Tunnel = sock
        self._recv: Callable[[int], Awaitable[bytes]] = partial(self._loop.sock_recv, sock)
        self._sendall: Callable[[Buffer], Awaitable[None]] = partial(self._loop.sock_sendall, sock)
        self._fd = sock.fileno()
        self._queue: deque[Buffer] = deque()
        self._scheduled = False  # that the queue is sent, in the next turn or when there is room
        self._writing = False
        self._on_readable: Callable[[], None] = lambda: None
        self._on_lost: Callable[[OSError], None] = lambda _: None
        self._drained: asyncio.Future[None] | None = None

    async def start_tls(self, context: ssl.SSLContext, hostname: str | None) -> None:
        """Shake hands with a server that is, if ``context`` looks at that, ``hostname``; from now
        on everything passes through TLS.

        Raises `TlsError`, `EOFError` if the server closes before, `OSError`.
        """
        tunnel = Tunnel(self._sock, context, server_side=False, server_hostname=hostname)
        await tunnel.handshake()
        self._tunnel = self._channel = tunnel
        self._recv, self._sendall = tunnel.recv, tunnel.sendall

    # The handshake: exactly what is asked for

    async def read_exactly(self, length: int) -> bytes:
        """The next ``length`` bytes. Raises `EOFError` if the peer closes before."""
        parts: list[bytes] = []
        while length:
            part = await self._recv(length)
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Send all of ``data``."""
        await self._sendall(data)

    # Transmission: whatever is there, in batches

    def start(self, on_readable: Callable[[], None], on_lost: Callable[[OSError], None]) -> None:
        """From now on call ``on_readable`` whenever there is something to receive, and ``on_lost``
        when nothing can be sent any more.
        """
        self._on_lost = on_lost
        self._on_readable = on_readable
        self._loop.add_reader(self._fd, self._read)
        self._read_on()

    def _read(self) -> None:
        if self._fd >= 0:
            self._on_readable()
        self._read_on()

    def _read_on(self) -> None:
        """Of what the tunnel has already the socket tells nothing."""
        if self._tunnel and self._fd >= 0 and self._tunnel.pending:
            self._loop.call_soon(self._read)

    def receive_into(self, view: memoryview) -> int | None:
        """Receive what is there; how many bytes, 0 at the end of the stream, None if there is
        nothing now. Raises `OSError`.
        """
        try:
            return self._channel.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None

    def send(self, *buffers: Buffer) -> None:
        """Send ``buffers`` in order, after those that still wait."""
        self._queue.extend(buffers)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send_queue)

    async def drain(self) -> None:
        """Until everything was sent, or the peer is lost."""
        if self._queue:
            self._drained = self._loop.create_future()
            await self._drained

    def close(self) -> None:
        """Close the socket at once; what waits is lost."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._queue.clear()
            self._end_writing()
            self._fd = -1
            if self._tunnel:
                self._tunnel.close_notify()
            self._sock.close()

    def _send_queue(self) -> None:
        if self._fd < 0:
            return
        try:
            while self._queue:
                self._send_some()
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._send_queue)
        except OSError as error:
            self._queue.clear()
            self._end_writing()
            self._on_lost(error)
        else:
            self._end_writing()

    def _send_some(self) -> None:
        queue = self._queue
        buffers = [buffer for buffer, _ in zip(queue, range(_IOV_MAX), strict=False)]
        channel = self._channel
        sent = channel.send(buffers[0]) if len(buffers) == 1 else channel.sendmsg(buffers)
        for buffer in buffers:
            if sent < len(buffer):
                queue[0] = memoryview(buffer)[sent:]
                return
            sent -= len(buffer)
            queue.popleft()

    def _end_writing(self) -> None:
        self._scheduled = False
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        if self._drained is not None:
            with suppress(asyncio.InvalidStateError):  # nobody waits any more
                self._drained.set_result(None)
