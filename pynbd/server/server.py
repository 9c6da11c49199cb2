"""The server: listeners, connections, and an end in good order.

Ending (`Server.stop`): requests under way have `GRACE` seconds, new ones get NBD_ESHUTDOWN, clients
that still negotiate are dropped; then the rest is dropped unacknowledged. The images are closed by
their owner, after the system calls under way have returned.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pynbd.server.buffers import BufferPool
from pynbd.server.connection import HANDSHAKE_LIMIT, Connection
from pynbd.server.export import ExportTable

log = logging.getLogger("pynbd")

# Seconds that requests under way have when the server ends.
GRACE = 2.0
# Seconds to wait before accepting again when there are no descriptors left.
_ACCEPT_PAUSE = 0.1
# Seconds without such a failure after which the next one is news.
_RECOVERED = 60.0
BACKLOG = 128
_NO_SUCH_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
# How often a free port is looked for that is free at every address.
_PORT_TRIES = 16

_Address = tuple[int, tuple[Any, ...]]


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of ``host``, all on one port; port 0 takes a free one.

    An address that this machine does not have (IPv6 switched off, say) is left out, if another is
    left. Raises `OSError`.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # An address may be there twice, by two lines of /etc/hosts.
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(0 if port else _PORT_TRIES - 1):
        try:
            return _listen_everywhere(addresses, 0)
        except OSError as error:
            # What is free at the first address may be taken at another.
            if error.errno != errno.EADDRINUSE:
                raise
    return _listen_everywhere(addresses, port)


def _listen_everywhere(addresses: Sequence[_Address], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, address in addresses:
            try:
                sock = _listen_at(family, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise
                absent = error
            else:
                sockets.append(sock)
                port = sock.getsockname()[1]
        if absent and not sockets:
            raise absent
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen_at(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(path: str) -> socket.socket:
    """A listening unix socket. A socket that nobody listens on any more is replaced; whatever else
    is there stays. Raises `OSError`.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "it exists and is not a socket") from None
            if not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # one whose backlog is full lives: EAGAIN
        return probe.connect_ex(path) == errno.ECONNREFUSED


class SocketFile:
    """The file of a unix socket that was bound just now, for who has to remove it in the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = self._found()

    def remove(self) -> None:
        """Remove it, unless it has gone, or another server has put its own in its place."""
        with suppress(FileNotFoundError):
            if self._found() == self._identity:
                os.unlink(self._path)
        self._identity = None  # the next file may well get the number of this one

    def _found(self) -> tuple[int, int]:
        status = os.lstat(self._path)
        return status.st_dev, status.st_ino


class Server:
    """Serves exports on listening sockets.

    ``max_clients``: more than these wait in the backlog; 0 is no limit. ``until_idle``: end when
    all have left and one of them had negotiated (a probe of the port does not count).
    """

    def __init__(
        self,
        exports: ExportTable,
        sockets: Sequence[socket.socket],
        *,
        max_clients: int = 0,
        until_idle: bool = False,
        handshake_limit: float = HANDSHAKE_LIMIT,
    ) -> None:
        self._exports = exports
        self._pool = BufferPool()
        self._sockets = sockets
        self._max_clients = max_clients
        self._until_idle = until_idle
        self._handshake_limit = handshake_limit
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._place_free = asyncio.Event()
        self._served = False  # somebody came as far as transmission, and has left
        self._listeners: list[asyncio.Task[None]] = []
        self._last_failure = -math.inf  # when a connection could not be accepted
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Accept and serve until `stop` is called, or the last client has left with
        ``until_idle``.
        """
        self._listeners = [asyncio.create_task(self._accept(sock)) for sock in self._sockets]
        for listener in self._listeners:
            listener.add_done_callback(lambda _: self.stop())  # it fails: that must be seen
        try:
            await self._stop.wait()
        finally:
            await self._end()
        for listener in self._listeners:
            if not listener.cancelled():
                listener.result()

    def stop(self) -> None:
        """End in good order; `run` returns when it is done."""
        self._stop.set()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            await self._place()
            try:
                sock, _ = await loop.sock_accept(listener)
            except ConnectionAbortedError:
                continue  # its client has left the backlog
            except OSError as error:
                self._tell(error)
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            try:
                await self._place()  # another listener may have given the last one away
                self._begin(sock)
            except BaseException:
                sock.close()
                raise
            await asyncio.sleep(0)  # with others in the backlog, asyncio accepts without a turn

    def _tell(self, failure: OSError) -> None:
        now = time.monotonic()
        if now - self._last_failure > _RECOVERED:
            log.warning("a connection could not be accepted: %s", failure.strerror)
        self._last_failure = now

    def _begin(self, sock: socket.socket) -> None:
        connection = Connection(
            sock, self._exports, self._pool, handshake_limit=self._handshake_limit
        )
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        task.add_done_callback(self._ended)

    async def _place(self) -> None:
        """Wait until one more client may be served."""
        while self._max_clients and len(self._connections) >= self._max_clients:
            self._place_free.clear()
            await self._place_free.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._connections.pop(task)
        self._place_free.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("a defect in pynbd ended a connection", exc_info=error)
        self._served |= connection.negotiated
        if self._until_idle and self._served and not self._connections:
            self._stop.set()

    async def _end(self) -> None:
        self._exports.stopping = True
        for listener in self._listeners:
            listener.cancel()
        await asyncio.gather(*self._listeners, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
        for task, connection in self._connections.items():
            if not connection.stop():
                task.cancel()
        if self._connections:
            _, late = await asyncio.wait(self._connections, timeout=GRACE)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
