"""The server: connections on its listening sockets, and an end in good order.

Who negotiates has a place already. While others wait for one, that is for `TURN` seconds only: who
comes as far as transmission may stay, and who does not can keep nobody out for long.

Ending (`Server.stop`): requests under way have `GRACE` seconds, new ones get NBD_ESHUTDOWN, clients
that still negotiate are dropped; then the rest is dropped unacknowledged. The images are closed by
their owner, after the system calls under way have returned.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pynbd.block.limits import limits_or_usual
from pynbd.server.buffers import BufferPool
from pynbd.server.connection import Connection
from pynbd.server.export import ExportTable
from pynbd.server.limits import Limits
from pynbd.server.places import Places, origin
from pynbd.server.shares import SharedMemory

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls

log = logging.getLogger("pynbd")

# Seconds that requests under way have when the server ends.
GRACE = 2.0
# Seconds for a negotiation while others wait for a place.
TURN = 1.0
# Seconds to wait before accepting again when there are no descriptors left.
_ACCEPT_PAUSE = 0.1
# Seconds without such a failure after which the next one is news.
_RECOVERED = 60.0


class Server:
    """Serves exports on listening sockets.

    ``max_clients``: more than these wait in the backlog; 0 is no limit. ``limits``: all others.
    ``tls``: without it everything is in clear.
    ``until_idle``: end when all have left and one of them had negotiated (a probe of the port does
    not count). ``trace``: every message is told to the logger ``pynbd.trace``, at level DEBUG.
    ``structured``, ``extended``: whether structured replies and extended headers may be negotiated.
    """

    def __init__(
        self,
        exports: ExportTable,
        sockets: Sequence[socket.socket],
        *,
        max_clients: int = 0,
        until_idle: bool = False,
        limits: Limits | None = None,
        tls: Tls | None = None,
        trace: bool = False,
        structured: bool = True,
        extended: bool = True,
    ) -> None:
        self._exports = exports
        self._limits = limits_or_usual(Limits, limits, "limits")
        self._pool = BufferPool(SharedMemory(self._limits.all_bytes))
        self._sockets = sockets
        self._tls = tls
        self._places = Places(max_clients, self._limits.per_address)
        self._until_idle = until_idle
        self._trace = trace
        self._structured = structured
        self._extended = extended
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
        listener.setblocking(False)
        while True:
            await _readable(listener)
            await self._place()
            try:
                # Without a turn of the loop between this and `_begin`: nobody else takes the last
                # place, and nothing is lost if this is cancelled.
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue  # its client has left the backlog
            except OSError as error:
                self._tell(f"a connection could not be accepted: {error.strerror}")
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            try:
                self._begin(sock, origin(sock, address))
            except MemoryError:
                sock.close()
                self._tell("a connection could not be served: there is no memory for it")
            except BaseException:
                sock.close()
                raise
            await asyncio.sleep(0)  # others in the backlog come after those that are here

    def _tell(self, failure: str) -> None:
        now = time.monotonic()
        if now - self._last_failure > _RECOVERED:
            log.warning("%s", failure)
        self._last_failure = now

    def _begin(self, sock: socket.socket, where: str | None) -> None:
        if not self._places.allows(where):
            sock.close()
            log.info("%s refused: it has %d connections", where, self._limits.per_address)
            return
        connection = Connection(
            sock,
            self._exports,
            self._pool,
            self._limits,
            tls=self._tls,
            trace=self._trace,
            structured=self._structured,
            extended=self._extended,
        )
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        if not self._places.take(sock, where):
            self._tell("connections wait until one ends: hardly any descriptors are left")
        task.add_done_callback(lambda task: self._ended(task, where))

    async def _place(self) -> None:
        """Wait until the one who waits may be served."""
        while self._places.full:
            self._place_free.clear()
            negotiating = (one for one in self._connections.values() if one.negotiates)
            first = next(negotiating, None)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(first.since + TURN if first else None):
                    await self._place_free.wait()
                continue
            assert first is not None
            if first.negotiates:  # it may have come to an end just now
                first.make_way()
                await self._place_free.wait()

    def _ended(self, task: asyncio.Task[None], where: str | None) -> None:
        connection = self._connections.pop(task)
        self._places.leave(where)
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
        try:
            await asyncio.gather(*self._listeners, return_exceptions=True)
            for sock in self._sockets:
                sock.close()
            for task, connection in self._connections.items():
                if not connection.stop():
                    task.cancel()
            if self._connections:
                await asyncio.wait(self._connections, timeout=GRACE)
        finally:  # who cancels this has no time left; the images are closed after it all the same
            late = [task for task in self._connections if not task.done()]
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


async def _readable(sock: socket.socket) -> None:
    """Until there is something to accept, or to fail."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
