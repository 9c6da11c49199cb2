"""TLS through a connected socket: plaintext in, plaintext out (RFC 8446, RFC 5246).

A `Tunnel` has the methods of a socket that a stream calls, and works on memory BIOs: what one
receive brought is decrypted record by record, and a whole batch is encrypted and leaves at once.

1. It begins with an empty buffer: nothing that was received before can come out of it.
2. Bytes count as sent when their records have left. Until then `Tunnel.send` and `Tunnel.sendmsg`
   raise `BlockingIOError`, as a socket does, and take the same bytes again: as SSL_write(3) does.
3. Trouble is an `OSError`, as that of a socket is, EPROTO if it is with TLS; for those that wait
   (the handshake, and what is negotiated after it) that is a `TlsError`.
4. Records that bring next to nothing are received bit by bit, and others have their turn between:
   a client that sends nothing else holds nobody up.
5. What TLS itself has to say to a record (a new key, a refusal) leaves when that was received, or
   with what is negotiated next. A peer that goes on asking for it and takes none is given up.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress

from pynbd.errors import TlsError

# Bytes that are encrypted at a time, in records of 16 KiB, and received at a time. OpenSSL keeps
# such buffers for as long as the connection lives, and most are idle most of the time.
CHUNK = 8 << 14
_RECEIVED = 4 << 14
# No more than this at first, and during the handshake; and as long as it brings little (rule 4): of
# the shortest records, each a new key, that is about a millisecond.
_FEW = 1 << 12
_FEWEST = 1 << 10
_LONGEST_RECORD = 5 + (1 << 14) + 2048  # RFC 5246, 6.2.3; in TLS 1.3 it is shorter
# Bytes of records that may wait for the socket: more than `Tunnel.sendmsg` ever leaves there.
_MOST_UNSENT = 4 * CHUNK
_UNANSWERED = "the peer asks for answers without end, and takes none"

Buffer = bytes | bytearray | memoryview


class _Scratch(threading.local):
    """What is received is there until OpenSSL has copied it; each thread has its own loop."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_RECEIVED))


_scratch = _Scratch()


class Tunnel:
    """TLS on ``sock``, which is non-blocking and stays the caller's.

    ``server_hostname``: the name that the certificate of the server has to have, if ``context``
    looks at that.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        self._unsent = memoryview(b"")  # records
        self._owed = 0  # bytes of plaintext, whose records have not all left
        self._most = _FEW  # that are received at a time (rule 4)
        self._in_vain = 0  # bytes of records, beyond twice what they brought

    async def handshake(self) -> None:
        """Shake hands. Raises `TlsError`, after the peer was told why; `EOFError` if it has gone,
        `OSError`.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._say()
                if not await self._hear():
                    raise EOFError from None
            except ssl.SSLError as error:
                with suppress(OSError):
                    await self._say()
                raise TlsError(reason(error)) from None
            else:
                await self._say()
                return

    @property
    def certificate(self) -> bytes | None:
        """The peer's certificate (DER), which was verified; None: it has sent none, or the context
        does not verify any.
        """
        verifies = self._tls.context.verify_mode != ssl.CERT_NONE
        return self._tls.getpeercert(binary_form=True) if verifies else None

    @property
    def used_psk(self) -> bool:
        """Whether a pre-shared key has proved who the peers are, and not a certificate.

        In TLS 1.3 OpenSSL takes such a session for a resumed one; others are never resumed here.
        """
        cipher = self._tls.cipher()
        name = cipher[0] if cipher else ""
        resumed = self._tls.version() == "TLSv1.3" and bool(self._tls.session_reused)
        return resumed or "PSK" in name

    # One after the other, as an event loop does with a socket

    async def recv(self, length: int) -> bytes:
        """Up to ``length`` bytes, b"" at the end. Raises `TlsError`, `OSError`."""
        while True:
            try:
                return self._tls.read(length)
            except ssl.SSLWantReadError:
                if self._outgoing.pending > _MOST_UNSENT:
                    raise TlsError(_UNANSWERED) from None
                if not await self._hear():
                    return b""
            except ssl.SSLError as error:
                raise TlsError(reason(error)) from None

    async def sendall(self, data: Buffer) -> None:
        """Send all of ``data``. Raises `TlsError`, `OSError`."""
        self._tls.write(data)
        await self._say()

    async def _hear(self) -> bool:
        """Receive records; False at the end of the stream."""
        records = await self._loop.sock_recv(self._sock, _FEW)
        self._incoming.write(records)
        await asyncio.sleep(0)  # with data at hand, asyncio receives without a turn of the loop
        return bool(records)

    async def _say(self) -> None:
        if self._outgoing.pending:
            try:
                await self._loop.sock_sendall(self._sock, self._outgoing.read())
            except ConnectionError:
                await self._hear_why()
                raise

    async def _hear_why(self) -> None:
        """The peer has gone: raise the alert that was its last word, if there is one."""
        with suppress(ConnectionError):
            await self.recv(1)

    # At once, or not at all

    @property
    def pending(self) -> bool:
        """Whether there may be plaintext that needs nothing from the socket."""
        return bool(self._tls.pending() or self._incoming.pending)

    def recv_into(self, view: memoryview) -> int:
        """Receive what is there; how many bytes, 0 at the end of the stream. Raises
        `BlockingIOError` if there is nothing now, or there was but it brought nothing; `OSError`.
        """
        done, length, heard = 0, len(view), 0
        while done < length:
            try:
                # Never more than the rest of one record; nothing after close_notify.
                count: int = self._tls.read(length - done, view[done:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if heard:
                    self._weigh(heard, done)
                    self._answer()
                if done:
                    break
                if heard:
                    raise BlockingIOError from None
                count = heard = self._sock.recv_into(_scratch.view[: self._most])
                self._incoming.write(_scratch.view[:count])
            except ssl.SSLError as error:
                raise OSError(errno.EPROTO, f"TLS: {_words(error)}") from None
            else:
                done += count
            if not count:
                break
        return done

    def _weigh(self, heard: int, brought: int) -> None:
        """How much is worth receiving, after ``heard`` bytes of records. Those of one that is not
        all here have brought nothing.
        """
        self._in_vain = max(0, self._in_vain + heard - 2 * brought)
        if self._in_vain > _LONGEST_RECORD:
            self._most = _FEWEST
        elif brought:
            self._most = min(2 * self._most, _RECEIVED)

    def _answer(self) -> None:
        """Send what TLS itself has to say (rule 5)."""
        with suppress(OSError):  # the one that sends meets it again
            self._flush()
        if self._outgoing.pending > _MOST_UNSENT:
            raise OSError(errno.EPROTO, f"TLS: {_UNANSWERED}")

    def send(self, data: Buffer) -> int:
        """Send some of ``data``; how many bytes. Raises `BlockingIOError` (rule 2), `OSError`."""
        return self.sendmsg((data,))

    def sendmsg(self, buffers: Sequence[Buffer], *, more: bool = False) -> int:
        """Send some of what is in ``buffers``, as `send` does. ``more``: it may leave together with
        what is sent next, which is certain to come.
        """
        if not self._owed:
            self._owed = self._tls.write(_first_chunk(buffers))
        if not more:
            self._flush()
        sent, self._owed = self._owed, 0
        return sent

    @property
    def owed(self) -> int:
        """How many bytes have to be sent again before any others (rule 2)."""
        return self._owed

    def close_notify(self) -> None:
        """Tell the peer that nothing follows, if the socket takes it."""
        if self._owed:
            return  # after half a record it would be garbage
        with suppress(OSError):
            self._tls.unwrap()  # the peer's own may come later, or never
        with suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return
                self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._sock.send(self._unsent) :]


def _first_chunk(buffers: Sequence[Buffer]) -> Buffer:
    """What is encrypted at a time: small buffers together, as each makes a record."""
    first = buffers[0]
    if len(first) >= CHUNK or len(buffers) == 1:
        return memoryview(first)[:CHUNK]
    parts, room = [], CHUNK
    for buffer in buffers:
        parts.append(memoryview(buffer)[:room])
        room -= len(parts[-1])
        if not room:
            break
    return b"".join(parts)


def reason(error: ssl.SSLError) -> str:
    """Why a handshake failed, in OpenSSL's words, without its numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate was not accepted: {error.verify_message}"
    return f"the handshake failed: {_words(error)}"


def _words(error: ssl.SSLError) -> str:
    _, alert, said = (error.reason or "").partition("_ALERT_")  # RFC 8446, 6, of the peer
    words = (said or error.reason or "").replace("_", " ").lower()
    return f"the peer says {words!r}" if alert else words or str(error)
