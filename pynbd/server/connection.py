"""One client, from accept to close: negotiation against a deadline, then transmission."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from pynbd.errors import ProtocolError, TlsError
from pynbd.protocol.handshake import (
    ExportInfo,
    Read,
    Session,
    Skip,
    StartTls,
    TlsMode,
    negotiate,
)
from pynbd.protocol.wire import quote
from pynbd.server import tracing
from pynbd.server.access import Identity, address_of
from pynbd.server.buffers import BufferPool
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.stream import Stream
from pynbd.server.transmission import Transmission

if TYPE_CHECKING:  # they take libraries that are not wanted without TLS
    from pynbd.server.tls import Tls
    from pynbd.tls.names import CertificateNames

log = logging.getLogger("pynbd")
# Who comes and goes, apart from what goes wrong.
arrivals = logging.getLogger("pynbd.clients")


class Connection:
    """Serves one connected socket. ``negotiated`` tells whether it came as far as transmission,
    ``negotiates`` whether it is on its way there, ``since`` when it came.

    ``tls``: None is NOTLS. ``trace``: every message is told to the logger ``pynbd.trace``.
    ``structured``, ``extended``: whether structured replies and extended headers may be negotiated.
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: ExportTable,
        pool: BufferPool,
        limits: Limits,
        *,
        tls: Tls | None = None,
        trace: bool = False,
        structured: bool = True,
        extended: bool = True,
    ) -> None:
        stream = tracing.TracedStream if trace else Stream
        self._stream = stream(asyncio.get_running_loop(), sock)
        self._exports = exports
        self._peer = self._stream.peer()
        self._asked = _Asked(exports, self._stream)
        self._tls = tls
        self._pool = pool
        self._limits = limits
        self._dialects = {"structured": structured, "extended": extended}
        self._transmission: Transmission | None = None
        self._deadline = asyncio.timeout(limits.handshake_seconds or None)
        self._dropped = f"no negotiation within {limits.handshake_seconds:g} s"
        self.since = asyncio.get_running_loop().time()
        self.negotiates = True
        self.negotiated = False
        self._trusted = True  # by the client, as far as it has said

    async def run(self) -> None:
        """Serve until the client leaves, breaks a rule, or `stop` ends it. Always closes the
        socket.
        """
        try:
            async with self._deadline:
                session = await self._negotiate()
                self.negotiates = False
            if session is not None:
                self.negotiated = True
                export = self._asked.export(session.export)
                self._transmission = Transmission(
                    self._stream, export, session, self._pool, self._limits
                )
                if self._exports.stopping:
                    self._transmission.stop()
                arrivals.info(
                    "%s has come: export %s, %s%s",
                    self._peer,
                    quote(session.export.name),
                    _dialect(session),
                    self._asked.proof,
                )
                await self._transmission.run()
        except ProtocolError as error:
            self._tell(error)
        except TlsError as error:
            self._tell(f"TLS: {error}")
        except MemoryError:
            self._tell("there is no memory for it")
        except (EOFError, OSError) as error:
            if self._deadline.expired():
                self._tell(self._dropped)
            elif not self._trusted:  # GnuTLS sends no alert by itself
                self._tell("TLS: it has left; it may not trust this server")
            else:
                log.debug("the client has gone: %s", error)
        finally:
            self.negotiates = False
            self._stream.close()
            if self.negotiated:
                arrivals.info("%s has left", self._peer)

    def _tell(self, why: object) -> None:
        log.info("%s disconnected: %s", self._peer, why)

    def make_way(self) -> None:
        """End the negotiation: others wait for this place."""
        self.negotiates = False
        if not self._deadline.expired():
            self._dropped = "others wait, and it does not negotiate"
            self._deadline.reschedule(asyncio.get_running_loop().time())

    def stop(self) -> bool:
        """Begin to end: requests under way are answered. False if there is no transmission to
        end.
        """
        if self._transmission is None:
            return False
        self._transmission.stop()
        return True

    async def _negotiate(self) -> Session | None:
        negotiation = negotiate(
            self._asked,
            tls=self._tls.mode if self._tls else TlsMode.NOTLS,
            max_options=self._limits.options,
            max_option_bytes=self._limits.option_bytes,
            **self._dialects,
        )
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
                self._trusted = True
            elif isinstance(step, Skip):
                await self._stream.skip(step.size)
            elif isinstance(step, StartTls):
                assert self._tls is not None
                self._trusted = False
                self._asked.proved(*await self._tls.start(self._stream))
            else:
                await self._stream.write(step.data)
                # Pipelined options never make the stream wait: others have their turn here.
                await asyncio.sleep(0)


class _Asked:
    """The exports as one client may see them: what it does not find is told."""

    def __init__(self, exports: ExportTable, stream: Stream) -> None:
        self._exports = exports
        self._peer = stream.peer()
        address = stream.address()
        uid, gids = stream.owner()
        where = address_of(address) if address else None
        self._client = Identity(uid=uid, gids=gids, address=where)

    @property
    def stopping(self) -> bool:
        return self._exports.stopping

    def proved(self, certificate: CertificateNames | None, psk_user: str | None) -> None:
        """There is TLS now, and it has proved something of the client."""
        self._client = replace(self._client, tls=True, certificate=certificate, psk_user=psk_user)

    @property
    def proof(self) -> str:
        """What TLS has proved, for people."""
        client = self._client
        if client.certificate:
            return f", TLS with the certificate {quote(client.certificate.dn)}"
        if client.psk_user is not None:
            return f", TLS with the key of {quote(client.psk_user)}"
        return ", TLS" * client.tls

    def find(self, name: str) -> ExportInfo | None:
        export = self._exports.find(name, self._client)
        if export is None:
            why = "which no rule lets it have" if name in self._exports else "which is not there"
            arrivals.info("%s asked for export %s, %s", self._peer, quote(name), why)
        return export.info if export else None

    def listing(self) -> Iterable[ExportInfo] | None:
        exports = self._exports.listing(self._client)
        return None if exports is None else [export.info for export in exports]

    def export(self, found: ExportInfo) -> Export:
        """The export that was found just now."""
        export = self._exports.find(found.name, self._client)
        assert export is not None
        return export


def _dialect(session: Session) -> str:
    if session.extended:
        return "extended headers"
    return "structured replies" if session.structured else "simple replies"
