"""One client, from accept to close: negotiation against a deadline, then transmission."""

from __future__ import annotations

import asyncio
import logging
import socket

from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import Read, Session, Skip, negotiate
from pynbd.server.buffers import BufferPool
from pynbd.server.export import ExportTable
from pynbd.server.stream import PlainStream
from pynbd.server.transmission import Transmission

log = logging.getLogger("pynbd")

# Seconds for the whole negotiation, as qemu-nbd has it: who idles here holds a place that others
# want.
HANDSHAKE_LIMIT = 10.0


class Connection:
    """Serves one connected socket. ``negotiated`` tells whether it came as far as transmission."""

    def __init__(
        self,
        sock: socket.socket,
        exports: ExportTable,
        pool: BufferPool,
        *,
        handshake_limit: float = HANDSHAKE_LIMIT,
    ) -> None:
        self._stream = PlainStream(asyncio.get_running_loop(), sock)
        self._exports = exports
        self._pool = pool
        self._handshake_limit = handshake_limit
        self._transmission: Transmission | None = None
        self.negotiated = False

    async def run(self) -> None:
        """Serve until the client leaves, breaks a rule, or `stop` ends it. Always closes the
        socket.
        """
        deadline = asyncio.timeout(self._handshake_limit or None)
        try:
            async with deadline:
                session = await self._negotiate()
            if session is not None:
                self.negotiated = True
                export = self._exports[session.export.name]
                self._transmission = Transmission(self._stream, export, session, self._pool)
                if self._exports.stopping:
                    self._transmission.stop()
                await self._transmission.run()
        except ProtocolError as error:
            log.info("client disconnected: %s", error)
        except (EOFError, OSError) as error:
            if deadline.expired():
                log.info("client disconnected: no negotiation within %g s", self._handshake_limit)
            else:
                log.debug("the client has gone: %s", error)
        finally:
            self._stream.close()

    def stop(self) -> bool:
        """Begin to end: requests under way are answered. False if there is no transmission to
        end.
        """
        if self._transmission is None:
            return False
        self._transmission.stop()
        return True

    async def _negotiate(self) -> Session | None:
        negotiation = negotiate(self._exports)
        brought: bytes | None = None
        while True:
            try:
                step = negotiation.send(brought)
            except StopIteration as stop:
                session: Session | None = stop.value
                return session
            brought = None
            if isinstance(step, Read):
                brought = await self._stream.read_exactly(step.size)
            elif isinstance(step, Skip):
                await self._stream.skip(step.size)
            else:
                await self._stream.write(step.data)
                # Pipelined options never make the stream wait: others have their turn here.
                await asyncio.sleep(0)
