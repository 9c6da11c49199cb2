"""A stream whose messages are told, one by one, to the logger ``pynbd.trace`` at level DEBUG.

What is told has passed: what was received, and what the socket has taken, to the byte. A record
carries as its attribute ``trace`` what a program wants to know of it: ``connection``,
``direction`` and ``nbd``, the message and its fields.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from itertools import count, islice

from pynbd.protocol.trace import Tracer
from pynbd.protocol.traced import Direction, Traced
from pynbd.server.stream import (
    IOV_MAX,
    SKIP_PIECE,
    Buffer,
    FilePiece,
    ReplyEnd,
    Stream,
)

log = logging.getLogger("pynbd.trace")

_numbers = count(1)


class TracedStream(Stream):
    """A `Stream` that behaves as one, and tells what passes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        super().__init__(loop, sock)
        # Local clients have no address to be told from one another by.
        self._name = f"{self.peer()} #{next(_numbers)}"
        self._tracer = Tracer(self._tell)

    def _tell(self, told: Traced) -> None:
        log.debug("%s %s", self._name, told, extra={"trace": told.record(self._name)})

    # The handshake

    async def read_exactly(self, length: int) -> bytes:
        data = await super().read_exactly(length)
        self._tracer.passed(Direction.TO_SERVER, data)
        return data

    async def skip(self, length: int) -> None:
        while length:
            length -= len(await self.read_exactly(min(length, SKIP_PIECE)))
            await asyncio.sleep(0)

    async def write(self, data: Buffer) -> None:
        await super().write(data)
        self._tracer.passed(Direction.TO_CLIENT, data)

    # Transmission

    def receive_into(self, view: memoryview) -> int | None:
        received = super().receive_into(view)
        if received:
            self._tracer.passed(Direction.TO_SERVER, view[:received])
        return received

    def send_view(self, view: memoryview) -> None:
        self._send_copy(view)

    def _send_buffers(self) -> None:
        pieces = list(islice(self._queue, IOV_MAX))
        before = self.queued
        super()._send_buffers()
        sent = before - self.queued
        for piece in pieces:
            if not sent or isinstance(piece, FilePiece):
                break
            data = memoryview(piece.done if isinstance(piece, ReplyEnd) else piece)[:sent]
            self._tracer.passed(Direction.TO_CLIENT, data)
            sent -= len(data)

    def _send_file(self, piece: FilePiece) -> None:
        before = self.queued
        super()._send_file(piece)
        self._tracer.skipped(Direction.TO_CLIENT, before - self.queued)
