"""From a URI to the transmission phase: connects, and takes the steps of a negotiation.

An error names the URI. TLS will be one more kind of step, which replaces the stream.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Generator
from contextlib import suppress
from typing import TypeVar

from pynbd.client.stream import PlainStream, open_socket
from pynbd.client.tracing import TracedStream, is_wanted
from pynbd.errors import OptionError, ProtocolError, UnsupportedFeature
from pynbd.protocol.handshake import Read, Step, Write
from pynbd.protocol.handshake_client import ABORT
from pynbd.protocol.uri import NbdUri
from pynbd.protocol.values import OptionReply

T = TypeVar("T")

# Seconds in which a server is to answer everything before transmission. One that serves a single
# client at a time lets the next one wait so long.
HANDSHAKE_LIMIT = 30.0


def parsed(uri: str | NbdUri) -> NbdUri:
    """The parts of a URI that can be connected to; `UsageError`, `UnsupportedFeature`."""
    where = uri if isinstance(uri, NbdUri) else NbdUri.parse(uri)
    if where.tls:
        raise UnsupportedFeature(f"{where}: TLS is not supported yet")
    return where


async def negotiate(uri: NbdUri, steps: Generator[Step, bytes | None, T]) -> tuple[PlainStream, T]:
    """Connect and do what ``steps`` say; the open stream, and what was negotiated."""
    stream: PlainStream | None = None
    try:
        async with asyncio.timeout(HANDSHAKE_LIMIT):
            kind = TracedStream if is_wanted() else PlainStream
            stream = kind(await open_socket(uri))
            return stream, await _drive(stream, steps)
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
            hint = "; TLS is not supported yet" * (error.reply == OptionReply.ERR_TLS_REQD)
            raise OptionError(error.reply, f"{uri}: {error}{hint}") from None
        if isinstance(error, ProtocolError):
            raise ProtocolError(f"{uri}: {error}") from None
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(uri)) from None
        raise


async def _drive(stream: PlainStream, steps: Generator[Step, bytes | None, T]) -> T:
    answer: bytes | None = None
    try:
        while True:
            step = steps.send(answer)
            answer = None
            if isinstance(step, Read):
                answer = await stream.read_exactly(step.size)
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
