"""The socket of one connection.

The connection owns its non-blocking socket instead of a transport: it receives into its own buffer,
sends gathered buffers, and lets the kernel send long runs of file bytes without copying them. Its
rules:

1. During the handshake never a byte is read that was not asked for, so that nothing which arrived
   in clear can be taken for something that came through TLS.
2. Buffers that are handed to `PlainStream.send` belong to the stream until they are sent.
3. What cannot be sent at once waits in a queue, in order; `on_drained` tells when it is empty
   again.
4. Once the peer is lost nothing more is sent: after a reply that was cut short, the next one would
   be taken for its data.
5. A file that cannot be sent to its end is not the peer's fault: zeroes take the place of the rest,
   and the reply ends with an error where its dialect can say so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

log = logging.getLogger("pynbd")

# sendmsg takes no more pieces than this in one call (IOV_MAX).
IOV_MAX = 1024
# What is skipped during the handshake goes through a buffer of this size.
SKIP_PIECE = 1 << 16
# Bytes of socket buffer that are asked for, so that a batch of replies leaves in one call; the
# kernel may give less.
_SOCKET_BUFFER = 1 << 22

Buffer = bytes | bytearray | memoryview


class ReplyEnd:
    """The end of a reply that has file pieces: ``done``, or ``failed`` once a file could not be
    read to the end of its piece.

    ``failed`` is None in a dialect that cannot say so any more: then the connection has to go.
    """

    __slots__ = ("broken", "done", "failed")

    def __init__(self, done: bytes, failed: bytes | None) -> None:
        self.done = done
        self.failed = failed
        self.broken = False


class FilePiece(NamedTuple):
    """``length`` bytes at ``offset`` of an open file, in the middle of the reply that ends with
    ``reply``.
    """

    fd: int
    offset: int
    length: int
    reply: ReplyEnd


Piece = Buffer | FilePiece | ReplyEnd


class PlainStream:
    """A connected stream socket, in clear."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._queue: deque[Piece] = deque()
        self._writing = False
        self._lost = False
        self._told = False  # that a file failed
        self.reading = False
        """Whether `on_readable` is called when there is something to receive."""
        self.queued = 0
        """Bytes that wait to be sent."""
        self.on_readable: Callable[[], None] = lambda: None
        self.on_drained: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None

    def peer(self) -> str:
        """Who is at the other end, for people."""
        try:
            address = self._sock.getpeername()
        except OSError:
            return "a client"  # it has gone already
        if self._sock.family == socket.AF_UNIX:
            return "a local client"
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    # The handshake: exactly what is asked for

    async def read_exactly(self, length: int) -> bytes:
        """The next ``length`` bytes. Raises `EOFError` if the peer closes before."""
        parts: list[bytes] = []
        while length:
            part = await self._loop.sock_recv(self._sock, length)
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    async def skip(self, length: int) -> None:
        """Drop the next ``length`` bytes, in constant memory."""
        while length:
            part = await self._loop.sock_recv(self._sock, min(length, SKIP_PIECE))
            if not part:
                raise EOFError
            length -= len(part)
            await asyncio.sleep(0)  # with data at hand, asyncio receives without a turn of the loop

    async def write(self, data: Buffer) -> None:
        """Send all of ``data``."""
        await self._loop.sock_sendall(self._sock, data)

    # Transmission: whatever is there, in batches

    def resume_reading(self) -> None:
        """Call `on_readable` whenever there is something to receive."""
        if not self.reading and self._fd >= 0:
            self.reading = True
            self._loop.add_reader(self._fd, self.on_readable)

    def pause_reading(self) -> None:
        if self.reading:
            self.reading = False
            self._loop.remove_reader(self._fd)

    def receive_into(self, view: memoryview) -> int | None:
        """Receive what is there; how many bytes, 0 at the end of the stream, None if there is
        nothing now.
        """
        try:
            return self._sock.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None

    def send_view(self, view: memoryview) -> None:
        """Send ``view``, which the caller goes on using: what does not leave at once is copied."""
        if self._lost:
            return
        sent = 0
        if not self._queue:
            try:
                sent = self._sock.send(view)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self._lose()
                return
            if sent == len(view):
                return
        self.send((bytes(view[sent:]),))

    def send(self, pieces: Iterable[Piece]) -> None:
        """Send ``pieces`` in order, after those that still wait."""
        if self._lost:
            return
        for piece in pieces:
            self._queue.append(piece)
            self.queued += size_of(piece)
        if not self._writing:
            self._send_queue()

    def close(self) -> None:
        """Close the socket at once; what waits is lost."""
        if self._fd >= 0:
            self.pause_reading()
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)
            self._fd = -1
            self._lost = True
            self._queue.clear()
            self.queued = 0
            self._sock.close()

    def _lose(self) -> None:
        """The peer has gone, or a reply cannot be finished: nothing more can be said to it."""
        self._lost = True
        self._queue.clear()
        self.queued = 0
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        self.on_lost()

    def _on_writable(self) -> None:
        self._send_queue()
        if not self._queue:
            self.on_drained()

    def _send_queue(self) -> None:
        queue = self._queue
        try:
            while queue:
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
        except OSError:
            self._lose()
        else:
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)

    def _send_buffers(self) -> None:
        queue = self._queue
        buffers: list[Buffer] = []
        for piece in queue:
            if isinstance(piece, ReplyEnd) and not piece.broken:
                buffers.append(piece.done)
            elif isinstance(piece, FilePiece | ReplyEnd):
                break
            else:
                buffers.append(piece)
            if len(buffers) == IOV_MAX:
                break
        sent = self._sock.send(buffers[0]) if len(buffers) == 1 else self._sock.sendmsg(buffers)
        self.queued -= sent
        for buffer in buffers:
            size = len(buffer)
            if sent < size:
                queue[0] = memoryview(buffer)[sent:]
                break
            sent -= size
            queue.popleft()

    def _send_file(self, piece: FilePiece) -> None:
        try:
            sent = os.sendfile(self._fd, piece.fd, piece.offset, piece.length)
        except (BlockingIOError, InterruptedError, ConnectionError):
            raise
        except OSError as error:  # if it was the socket's after all, the zeroes meet it again
            sent = 0
            if not self._told:
                self._told = True
                log.error("bytes of an image file could not be sent: %s", error.strerror)
        self.queued -= sent
        rest = piece.length - sent
        if not rest:
            self._queue.popleft()
        elif sent:
            self._queue[0] = piece._replace(offset=piece.offset + sent, length=rest)
        elif piece.reply.failed is None:
            raise ConnectionAbortedError("a file failed in the middle of a simple reply")
        else:
            piece.reply.broken = True
            self._queue[0] = bytes(rest)

    def _settle(self, end: ReplyEnd) -> None:
        """Put the words in place with which the reply ends, now that all its bytes have left."""
        words = (end.failed if end.broken else end.done) or b""
        self.queued += len(words) - len(end.done)
        if words:
            self._queue[0] = words
        else:
            self._queue.popleft()


def size_of(piece: Piece) -> int:
    """How many bytes a piece will send."""
    if isinstance(piece, FilePiece):
        return piece.length
    return len(piece.done if isinstance(piece, ReplyEnd) else piece)
