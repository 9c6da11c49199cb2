"""From a URI to the transmission phase: connects, and takes the steps of a negotiation.

An error names the URI.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Generator
from contextlib import suppress
from typing import TypeVar

from pynbd.client.stream import Stream, open_socket
from pynbd.client.tracing import TracedStream, is_wanted
from pynbd.errors import OptionError, ProtocolError, TlsError, UsageError
from pynbd.protocol.handshake import Read, StartTls, Step, Write
from pynbd.protocol.handshake_client import ABORT
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.protocol.values import OptionReply
from pynbd.tls import credentials

T = TypeVar("T")

# Seconds in which a server is to answer everything before transmission. One that serves a single
# client at a time lets the next one wait so long.
HANDSHAKE_LIMIT = 30.0


def parsed(uri: str | NbdUri) -> NbdUri:
    """The parts of a URI; `UsageError`."""
    return uri if isinstance(uri, NbdUri) else NbdUri.parse(uri)


async def negotiate(uri: NbdUri, steps: Generator[Step, bytes | None, T]) -> tuple[Stream, T]:
    """Connect and do what ``steps`` say; the open stream, and what was negotiated."""
    stream: Stream | None = None
    try:
        context = _tls_context(uri) if uri.tls else None
        async with asyncio.timeout(HANDSHAKE_LIMIT):
            kind = TracedStream if is_wanted() else Stream
            stream = kind(await open_socket(uri))
            return stream, await _drive(stream, steps, uri, context)
    except BaseException as error:
        if stream is not None:
            stream.close()
        if isinstance(error, TimeoutError) and error.errno is None:
            text = f"the server has not negotiated within {HANDSHAKE_LIMIT:g} s"
            raise TimeoutError(errno.ETIMEDOUT, text, str(uri)) from None
        if isinstance(error, EOFError):
            text = "the server closed the connection during negotiation"
            raise ConnectionResetError(errno.ECONNRESET, text, str(uri)) from None
        if isinstance(error, OptionError):
            clear = error.reply == OptionReply.ERR_TLS_REQD and not uri.tls
            hint = f" (nbds{uri.transport}://... begins a URI with TLS)" * clear
            raise OptionError(error.reply, f"{uri}: {error}{hint}") from None
        if isinstance(error, TlsError):
            hint = _hint(uri) if stream is not None else ""
            raise TlsError(f"{uri}: TLS: {error}{hint}") from None
        if isinstance(error, UsageError):
            raise UsageError(f"{uri}: {error}") from None
        if isinstance(error, ProtocolError):
            raise ProtocolError(f"{uri}: {error}") from None
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(uri)) from None
        raise


def server_name(uri: NbdUri) -> str | None:
    """Whom the certificate of the server has to be for: a name, or an address without its zone.

    None: a server on a unix socket or a vsock has no name, unless the URI says one.
    """
    host = uri.host.partition("%")[0] if uri.transport is Transport.TCP else ""
    return uri.tls_hostname or host or None


def _tls_context(uri: NbdUri) -> ssl.SSLContext:
    name = server_name(uri)
    try:
        (name or "").encode("idna")  # as the standard library does it when it shakes hands
    except UnicodeError:
        raise UsageError(f"tls-hostname: {name!r}: no host can have this name") from None
    context = credentials.client_context(
        certificates=uri.tls_certificates,
        psk_file=uri.tls_psk_file,
        psk_user=uri.user,
        tls_type=uri.tls_type,
        verify_peer=uri.tls_verify_peer,
    )
    context.check_hostname = context.verify_mode != ssl.CERT_NONE and name is not None
    return context


def _by_key(uri: NbdUri) -> bool:
    return bool(uri.tls_psk_file) and uri.tls_type != "x509"


def _hint(uri: NbdUri) -> str:
    """Where to look when the peers do not agree."""
    if _by_key(uri):
        return " (it may have no such key for this user, or use certificates)"
    if not uri.tls_certificates:
        return " (tls-certificates=DIR in the URI says whom to trust, and what to show)"
    return ""


async def _drive(
    stream: Stream,
    steps: Generator[Step, bytes | None, T],
    uri: NbdUri,
    context: ssl.SSLContext | None,
) -> T:
    answer: bytes | None = None
    accepted = True  # as far as the server has said
    try:
        while True:
            step = steps.send(answer)
            answer = None
            if isinstance(step, Read):
                answer = await stream.read_exactly(step.size)
                accepted = True
            elif isinstance(step, StartTls):
                assert context is not None
                accepted = False
                await stream.start_tls(context, server_name(uri))
            else:
                assert isinstance(step, Write)
                await stream.write(step.data)
    except StopIteration as end:
        result: T = end.value
        return result
    except OptionError:
        with suppress(OSError):
            await stream.write(ABORT)
        raise
    except (EOFError, ConnectionError):
        if accepted:
            raise
        certificate = "; it may want another certificate" * (not _by_key(uri))
        raise TlsError(f"the server did not go on{certificate}") from None
