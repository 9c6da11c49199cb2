"""The socket of one connection.

The connection owns its non-blocking socket instead of a transport: it receives into its own buffer,
sends gathered buffers, and brings long runs of file bytes from the page cache to the socket when
there is room for them. Its rules:

1. During the handshake never a byte is read that was not asked for, so that nothing which arrived
   in clear can be taken for something that came through TLS. `Stream.start_tls` puts a `Tunnel` in
   the place of the socket; all else stays as it is, but the bytes of files are copied.
2. Buffers that are handed to `Stream.send` belong to the stream until they are sent.
3. What cannot be sent at once waits in a queue, in order. `on_blocked` tells that something waits
   there, and each time that some of it has left; `on_drained` that it is empty again, and that
   nothing is lent any more (rule 5).
4. Once the peer is lost nothing more is sent: after a reply that was cut short, the next one would
   be taken for its data.
5. Send-file lends pages: who overwrites them before the peer has taken them changes what it gets.
   Bytes whose place may become somebody else's are lent only where the socket tells what was taken,
   and kept from others until then. Elsewhere they are copied, so many in each turn of the loop.
6. A file that cannot be sent to its end is not the peer's fault: zeroes take the place of the rest,
   and the reply ends with an error where its dialect can say so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
import sys
import termios
import threading
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from fcntl import ioctl
from functools import partial
from typing import Any, NamedTuple

from pynbd.tls.tunnel import CHUNK, Tunnel

log = logging.getLogger("pynbd")

# sendmsg takes no more pieces than this in one call (IOV_MAX).
IOV_MAX = 1024
# What is skipped during the handshake goes through a buffer of this size.
SKIP_PIECE = 1 << 16
# Bytes after which the loop has its turn, however fast the peer takes them; those of a file that
# are copied count as so many times more, and so do all that are encrypted.
SEND_TURN = 1 << 22
COPY_COST = 4
# File bytes that are copied at a time.
COPY_PIECE = 1 << 18
# Seconds between two looks at what the peer has taken: twice as many after each that was in vain.
TAKEN_EVERY = 0.01
TAKEN_SELDOM = 1.28
# Seconds of silence after which TCP asks a peer whether it is there, seconds between two such
# questions, and how many are left unanswered: a machine that went down is gone in ten minutes.
KEEPALIVE = (300, 60, 5)
# Bytes of socket buffer that are asked for, so that a batch of replies leaves in one call; the
# kernel may give less.
_SOCKET_BUFFER = 1 << 22

# The groups of a unix peer (socket(7)). The standard library asks for 1024 bytes at most, which are
# 256 groups; of who is in more, only the primary one is known.
_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024

Buffer = bytes | bytearray | memoryview


class _Copied(threading.local):
    """Where file bytes are on their way to a socket; each thread has its own loop."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(COPY_PIECE))


_copied = _Copied()


class ReplyEnd:
    """The end of a reply that has file pieces: ``done``, or ``failed`` once a file could not be
    read to the end of its piece.

    ``failed`` is None in a dialect that cannot say so any more: then the connection has to go.
    ``release`` is called once nobody needs what is in the places of the file pieces, sent or not.
    """

    __slots__ = ("broken", "done", "failed", "release")

    def __init__(self, done: bytes, failed: bytes | None) -> None:
        self.done = done
        self.failed = failed
        self.broken = False
        self.release: Callable[[], None] | None = None

    def over(self) -> None:
        """Nobody needs what is in the places of the file pieces."""
        if self.release:
            release, self.release = self.release, None
            release()


class FilePiece(NamedTuple):
    """``length`` bytes at ``offset`` of an open file, in the middle of the reply that ends with
    ``reply``.

    ``read(view, offset)``, which tells how many there were, if the place of these bytes may become
    somebody else's once the reply is released (rule 5).
    """

    fd: int
    offset: int
    length: int
    reply: ReplyEnd
    read: Callable[[memoryview, int], int] | None = None


Piece = Buffer | FilePiece | ReplyEnd


class Stream:
    """A connected stream socket, in clear or, after `start_tls`, through TLS."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._loop = loop
        self._sock = sock
        self._tunnel: Tunnel | None = None
        self._channel: socket.socket | Tunnel = sock
        self._recv: Callable[[int], Awaitable[bytes]] = partial(loop.sock_recv, sock)
        self._sendall: Callable[[Buffer], Awaitable[None]] = partial(loop.sock_sendall, sock)
        self._fd = sock.fileno()
        self._queue: deque[Piece] = deque()
        self._writing = False
        self._lost = False
        self._told = False  # that a file failed
        # Rule 5. A unix socket counts what it holds; TCP counts what was not acknowledged, which
        # is less, as what was acknowledged may still wait, in the same pages, at this host.
        self._tells_taken = sock.family == socket.AF_UNIX
        self._sent = 0  # bytes that ever left
        self._lent: deque[tuple[int, ReplyEnd]] = deque()  # where the reply ends, of all that left
        self._taken_every = TAKEN_EVERY
        self._may_send = 0  # bytes, before the loop has its turn
        self.reading = False
        """Whether `on_readable` is called when there is something to receive."""
        self.queued = 0
        """Bytes that wait to be sent."""
        self.queued_files = 0
        """Those of them that are in files, and take no memory."""
        self.on_readable: Callable[[], None] = lambda: None
        self.on_blocked: Callable[[], None] = lambda: None
        self.on_drained: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None

    def address(self) -> tuple[Any, ...] | None:
        """What ``getpeername`` says, of TCP; None of a local peer, and of one that has gone."""
        if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        with suppress(OSError):
            return tuple(self._sock.getpeername())
        return None

    def peer(self) -> str:
        """Who is at the other end, for people."""
        if self._sock.family == socket.AF_UNIX:
            return "a local client"
        address = self.address()
        if address is None:
            return "a client"
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def owner(self) -> tuple[int | None, frozenset[int]]:
        """The user and the groups of a local peer when it connected; None and none of others."""
        if self._sock.family != socket.AF_UNIX:
            return None, frozenset()
        credentials = struct.Struct("iII")
        _, uid, gid = credentials.unpack(
            self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        )
        groups = array("I")
        with suppress(OSError):  # before Linux 4.13 there is no such list
            found = self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
            groups.frombytes(found)
        return uid, frozenset({gid, *groups})

    async def start_tls(self, context: ssl.SSLContext) -> Tunnel:
        """Shake hands as the server; from now on everything passes through TLS.

        Raises `TlsError`, `EOFError` if the peer closes before, `OSError`.
        """
        tunnel = Tunnel(self._sock, context, server_side=True)
        await tunnel.handshake()
        self._tunnel = self._channel = tunnel
        self._recv, self._sendall = tunnel.recv, tunnel.sendall
        self._tells_taken = False  # nothing is lent
        return tunnel

    @property
    def lent(self) -> bool:
        """Whether the peer may not have taken yet what has to stay in its place."""
        return bool(self._lent)

    def taken(self) -> int:
        """How many bytes the peer has taken, at least; of a unix socket it may be negative at
        first, as that counts what goes with them.
        """
        return self._sent - self._held()

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

    async def skip(self, length: int) -> None:
        """Drop the next ``length`` bytes, in constant memory."""
        while length:
            part = await self._recv(min(length, SKIP_PIECE))
            if not part:
                raise EOFError
            length -= len(part)
            await asyncio.sleep(0)  # with data at hand, asyncio receives without a turn of the loop

    async def write(self, data: Buffer) -> None:
        """Send all of ``data``."""
        await self._sendall(data)

    # Transmission: whatever is there, in batches

    def resume_reading(self) -> None:
        """Call `on_readable` whenever there is something to receive."""
        if self._fd < 0:
            return
        if not self.reading:
            self.reading = True
            self._loop.add_reader(self._fd, self.on_readable)
        if self._tunnel and self._tunnel.pending:
            self._loop.call_soon(self._read_on)  # of this the socket tells nothing

    def _read_on(self) -> None:
        if self.reading:
            self.on_readable()

    def pause_reading(self) -> None:
        if self.reading:
            self.reading = False
            self._loop.remove_reader(self._fd)

    def receive_into(self, view: memoryview) -> int | None:
        """Receive what is there; how many bytes, 0 at the end of the stream, None if there is
        nothing now.
        """
        try:
            return self._channel.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None

    def send_view(self, view: memoryview) -> None:
        """Send ``view``, which the caller goes on using: what does not leave at once is copied."""
        if self._lost:
            return
        while not self._queue:
            try:
                sent = self._channel.send(view)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._lose()
                return
            self._sent += sent
            view = view[sent:]
            if not view:
                return
        self._send_copy(view)

    def _send_copy(self, view: memoryview) -> None:
        try:
            rest = bytes(view)
        except MemoryError:
            self._no_memory()
        else:
            self.send((rest,))

    def send(self, pieces: Iterable[Piece]) -> None:
        """Send ``pieces`` in order, after those that still wait."""
        if self._lost:
            for piece in pieces:
                if isinstance(piece, ReplyEnd):
                    piece.over()
            return
        for piece in pieces:
            self._queue.append(piece)
            self.queued += size_of(piece)
            if isinstance(piece, FilePiece):
                self.queued_files += piece.length
        if self._writing:
            self.on_blocked()
        else:
            self._send_queue()

    def close(self) -> None:
        """Close the socket at once; what waits is lost."""
        if self._fd >= 0:
            self.pause_reading()
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)
            self._fd = -1
            if self._tunnel and not self._lost and not self._queue:
                self._tunnel.close_notify()
            self._lost = True
            self._drop_queue()
            self._sock.close()

    def abort(self) -> None:
        """Give up a peer that takes nothing: the kernel keeps nothing for it either."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._lose()

    def _lose(self) -> None:
        """The peer has gone, or a reply cannot be finished: nothing more can be said to it."""
        self._lost = True
        self._drop_queue()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self.on_lost()

    def _no_memory(self) -> None:
        log.info("%s disconnected: there is no memory for its replies", self.peer())
        self._lose()

    def _drop_queue(self) -> None:
        for piece in (*self._queue, *(end for _, end in self._lent)):
            if isinstance(piece, ReplyEnd):
                piece.over()
        self._lent.clear()
        self._queue.clear()
        self.queued = self.queued_files = 0

    def _on_writable(self) -> None:
        self._send_queue()
        if not self._queue and not self._lost:
            self.on_drained()

    def _send_queue(self) -> None:
        queue = self._queue
        self._may_send = SEND_TURN
        try:
            while queue:
                if self._may_send <= 0:
                    raise BlockingIOError  # the socket calls again, after the others
                piece = queue[0]
                if isinstance(piece, FilePiece):
                    self._send_file(piece)
                elif isinstance(piece, ReplyEnd):
                    self._settle(piece)
                else:
                    self._send_buffers()
        except (BlockingIOError, InterruptedError):
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._on_writable)
            self.on_blocked()
        except OSError:
            self._lose()
        except MemoryError:
            self._no_memory()
        else:
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)

    def _send_buffers(self) -> None:
        queue = self._queue
        buffers: list[Buffer] = []
        room, before_file = self._may_send, False
        for piece in queue:
            if isinstance(piece, ReplyEnd) and not piece.broken:
                self._end_reading(piece)
                buffers.append(piece.done)
            elif isinstance(piece, FilePiece | ReplyEnd):
                before_file = True
                break
            else:
                buffers.append(piece)
            room -= len(buffers[-1])
            if room <= 0 or len(buffers) == IOV_MAX:
                break
        if room < 0:
            now: list[Buffer] = [*buffers[:-1], memoryview(buffers[-1])[:room]]
        else:
            now = buffers
        if self._tunnel:
            sent = self._tunnel.sendmsg(now, more=before_file)
            self._may_send -= sent * COPY_COST
        else:
            sent = self._sock.send(now[0]) if len(now) == 1 else self._sock.sendmsg(now)
            self._may_send -= sent
        self.queued -= sent
        self._sent += sent
        for buffer in buffers:
            size = len(buffer)
            if sent < size:
                queue[0] = memoryview(buffer)[sent:]
                break
            sent -= size
            queue.popleft()

    def _send_file(self, piece: FilePiece) -> None:
        try:
            if self._tunnel or (piece.read and not self._tells_taken):
                sent = self._copy(piece)
            else:
                length = min(piece.length, self._may_send)
                sent = os.sendfile(self._fd, piece.fd, piece.offset, length)
                self._may_send -= sent
        except (BlockingIOError, InterruptedError, ConnectionError):
            raise
        except OSError as error:  # if it was the socket's after all, the zeroes meet it again
            sent = 0
            if not self._told:
                self._told = True
                log.error("bytes of an image file could not be sent: %s", error.strerror)
        self.queued -= sent
        self.queued_files -= sent
        self._sent += sent
        rest = piece.length - sent
        if not rest:
            self._queue.popleft()
        elif sent:
            self._queue[0] = piece._replace(offset=piece.offset + sent, length=rest)
        elif piece.reply.failed is None:
            raise ConnectionAbortedError("a file failed in the middle of a simple reply")
        else:
            piece.reply.broken = True
            self.queued_files -= rest
            self._queue[0] = bytes(rest)

    def _copy(self, piece: FilePiece) -> int:
        """How many bytes have left."""
        view = _copied.view[: min(piece.length, CHUNK if self._tunnel else COPY_PIECE)]
        if self._tunnel and self._tunnel.owed:
            count = self._tunnel.owed  # these are encrypted already
        elif piece.read:
            count = piece.read(view, piece.offset)
        else:
            count = os.preadv(piece.fd, (view,), piece.offset)
        self._may_send -= count * COPY_COST
        return self._channel.send(view[:count]) if count else 0

    def _end_reading(self, end: ReplyEnd) -> None:
        """All file pieces of a reply have left."""
        if not end.release:
            return
        if not self._tells_taken:
            end.over()
            return
        if not self._lent:
            self._taken_every = TAKEN_EVERY
            self._loop.call_later(TAKEN_EVERY, self._release_taken)
        self._lent.append((self._sent, end))

    def _release_taken(self) -> None:
        """Release the replies that the peer has taken."""
        if self._lost:
            return
        before, taken = len(self._lent), self.taken()
        while self._lent and self._lent[0][0] <= taken:
            self._lent.popleft()[1].over()
        if not self._lent:
            self.on_drained()
            return
        in_vain = len(self._lent) == before
        self._taken_every = min(2 * self._taken_every, TAKEN_SELDOM) if in_vain else TAKEN_EVERY
        self._loop.call_later(self._taken_every, self._release_taken)

    def _held(self) -> int:
        """What the socket holds, of a unix socket with all that goes with it, and so never less."""
        return int.from_bytes(ioctl(self._fd, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _settle(self, end: ReplyEnd) -> None:
        """Put the words in place with which the reply ends, now that all its bytes have left."""
        self._end_reading(end)
        words = (end.failed if end.broken else end.done) or b""
        self.queued += len(words) - len(end.done)
        if words:
            self._queue[0] = words
        else:
            self._queue.popleft()


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    for option, value in zip(options, KEEPALIVE, strict=True):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def size_of(piece: Piece) -> int:
    """How many bytes a piece will send."""
    if isinstance(piece, FilePiece):
        return piece.length
    return len(piece.done if isinstance(piece, ReplyEnd) else piece)
