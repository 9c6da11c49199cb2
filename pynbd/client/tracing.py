"""A stream whose messages are told, one by one, to the logger ``pynbd.trace`` at level DEBUG, as
`pynbd.server.tracing` does at the other end.
"""

from __future__ import annotations

import logging
import socket
from itertools import count

from pynbd.client.stream import Stream
from pynbd.protocol.trace import Tracer
from pynbd.protocol.traced import Direction, Traced

log = logging.getLogger("pynbd.trace")

_numbers = count(1)


def is_wanted() -> bool:
    """Whether anybody listens."""
    return log.isEnabledFor(logging.DEBUG)


class TracedStream(Stream):
    """A `Stream` that behaves as one, and tells what passes."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._name = f"connection #{next(_numbers)}"
        self._tracer = Tracer(self._tell)

    def _tell(self, told: Traced) -> None:
        log.debug("%s %s", self._name, told, extra={"trace": told.record(self._name)})

    async def read_exactly(self, length: int) -> bytes:
        data = await super().read_exactly(length)
        self._tracer.passed(Direction.TO_CLIENT, data)
        return data

    async def write(self, data: bytes) -> None:
        await super().write(data)
        self._tracer.passed(Direction.TO_SERVER, data)

    def receive_into(self, view: memoryview) -> int | None:
        received = super().receive_into(view)
        if received:
            self._tracer.passed(Direction.TO_CLIENT, view[:received])
        return received

    def _send_some(self) -> None:
        waiting = list(self._queue)
        super()._send_some()
        sent = sum(map(len, waiting)) - sum(map(len, self._queue))
        for buffer in waiting:
            if not sent:
                break
            data = memoryview(buffer)[:sent]
            self._tracer.passed(Direction.TO_SERVER, data)
            sent -= len(data)
