"""The transmission phase of one connection: a batch of requests in, a batch of replies out.

The unit of work is what one receive brought. All requests whose data are at hand are served in one
go, and their replies leave in one send; the loop, a Task and a system call are paid once a batch.
Its rules:

1. A read of plain bytes that are in the page cache is served in the loop of `_serve_batch` itself:
   one bisect, one system call, no coroutine. So is a short write that goes to where its bytes are.
2. Everything else is a coroutine whose first step is taken by hand (`steps`). If it ends there, no
   Task was made; if it waits for a disk, a Task adopts it, and its reply leaves when it is ready.
3. The writes of a batch share one hop into the pool.
4. Requests and bytes in flight have a limit, of this connection and of all (`shares`). Past it, or
   while the peer takes no replies, nothing more is received. Who stalls has to go (`stalls`).
5. A buffer that holds the payload of a write under way is lent to it, and not received into.
"""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_right
from collections.abc import Awaitable, Coroutine, Sequence
from time import monotonic, perf_counter
from typing import Any, Final

from pynbd.block.extent import COMPRESSED, DATA
from pynbd.block.steps import Finished, first_step
from pynbd.block.turns import ASKING
from pynbd.errors import ProtocolError, RequestError
from pynbd.protocol import wire
from pynbd.protocol.handshake import Session
from pynbd.protocol.transmission import Request, dialect
from pynbd.protocol.values import MAX_PAYLOAD, Command, CommandFlag
from pynbd.server.buffers import INLINE_SIZE, BufferPool, Lease
from pynbd.server.commands import SEND_FILE_MIN, Commands
from pynbd.server.contexts import MAX_EXTENTS_PER_REPLY
from pynbd.server.export import Export
from pynbd.server.hops import write_hops
from pynbd.server.limits import Limits
from pynbd.server.patience import LONGEST, Patience
from pynbd.server.shares import REQUEST_COST, Share
from pynbd.server.stalls import Brought, Stalls
from pynbd.server.stream import Piece, Stream, size_of
from pynbd.server.zeroes import DetectZeroes

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_DISC = int(Command.DISC)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
# Bytes that the answer to a BLOCK_STATUS may take.
_STATUS_HELD = MAX_EXTENTS_PER_REPLY * wire.DESCRIPTOR_EXT.size
_CHANGES = frozenset(map(int, (Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES)))

# What one receive may bring. A payload longer than half of it gets a buffer of its own.
RECEIVE_SIZE = 1 << 18
# A turn of the loop: so many requests that the page cache answers, or so long. Then the others have
# theirs. Sending what fills the inline buffer counts as much as some of those requests.
TURN_REQUESTS = 256
TURN_SECONDS = 0.001
FLUSH_COST = 32
DECOMPRESSION_COST = 16
_STORED: Final = (DATA, COMPRESSED)

_NO_BUFFER: Final = bytearray()

Serving = Coroutine[Any, Any, Sequence[Piece]]


class Transmission:
    """Serves one session until the peer disconnects."""

    def __init__(
        self,
        stream: Stream,
        export: Export,
        session: Session,
        pool: BufferPool,
        limits: Limits,
    ) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._size = export.node.size
        self._write_now = export.node.write_now
        # What the hot path reads, by the number of the window and by depth.
        self._windows, self._span = export.node.resolved.windows, export.node.resolved.span
        self._files = [export.node.file, *(node.file for node in export.node.chain())]
        self._decompressed_now = export.node.decompressed_now
        self._dialect = dialect(structured=session.structured, extended=session.extended)
        self.commands = Commands(export, session, self._dialect)
        self._limits = limits
        self._memory = pool.memory
        self._wanted = 0  # bytes of the next request, if it waits for memory
        self._ended = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by a number of their own
        self._changing: set[int] = set()  # those of them that change the image
        self._started = 0
        self._bytes_in_flight = 0
        self._closing = False  # no more requests are taken
        self._violation: ProtocolError | None = None  # why, if the peer broke a rule
        self._pool = pool
        self._patience = Patience()
        # Receiving: unparsed bytes are view[at:have]; or a payload or skipped bytes come in. There
        # is a buffer only while there is something in it.
        self._buffer = _NO_BUFFER
        self._view = memoryview(_NO_BUFFER)
        self._at = self._have = 0
        self._payload: memoryview | None = None
        self._payload_buffer = _NO_BUFFER
        self._payload_of: Request | None = None
        self._filled = 0
        self._skipping = 0
        self._after_skip: bytes = b""
        self._writes: list[Request] = []
        # Sending: bytes of replies in the pool's inline buffer, and the pieces of the others.
        self._inline_used = 0
        self._replies: list[Piece] = []
        self._ready_bytes = 0
        self._sending_soon = False
        self._yielding = False
        self._turn_ends = 0.0
        # The longest read that is served in place; -1 when every request is refused.
        self._inline_max = SEND_FILE_MIN - 1
        # Flags of a write that is served in place; -1, which no flags are, where none is.
        self._write_flags = int(CommandFlag.PAYLOAD_LEN) if session.extended else 0
        if export.read_only or export.detect_zeroes is not DetectZeroes.OFF:
            self._write_flags = -1

    async def run(self) -> None:
        """Serve until the session ends. Raises `ProtocolError` if the peer broke a rule."""
        ASKING.set(self)  # here, and in all that begins here: callbacks and Tasks
        self._share = Share(self._memory, self._resume, self._stream.taken)
        self._stalls = Stalls(self._limits, self._stream, self._share, self._brought, self._give_up)
        self._stream.on_readable = self._on_readable
        self._stream.on_blocked = self._blocked
        self._stream.on_drained = self._resume
        self._stream.on_lost = self._lost
        self._stream.resume_reading()
        self._pool.users += 1
        try:
            await self._ended.wait()
            await self._settled()
        except asyncio.CancelledError:
            self._closing = True
            self._stream.pause_reading()
            for task in self._tasks.values():
                task.cancel()
            await self._settled()
            raise
        finally:
            self._pool.users -= 1
            self._stream.pause_reading()
            self._flush()  # whom nobody can be told any more, lets go of what it holds
            self._drop_request()
            self._stalls.close()
            self._share.close()
        if self._violation:
            raise self._violation

    async def _settled(self) -> None:
        """Until nothing of this session is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks.values())
            self._tasks = {n: task for n, task in self._tasks.items() if not task.done()}

    def stop(self) -> None:
        """Refuse every further request with NBD_ESHUTDOWN, and end once those under way are
        answered.
        """
        self.commands.stopping = True
        self._inline_max = -1
        if not self._tasks:
            self._finish()

    # Receiving

    def _on_readable(self) -> None:
        if self._yielding or not self._stream.reading:
            return  # this connection has its turn soon, or none at all
        self._turn_ends = monotonic() + TURN_SECONDS
        try:
            if self._buffer is _NO_BUFFER:
                self._buffer = self._pool.take(RECEIVE_SIZE)
                self._view = memoryview(self._buffer)
            self._receive()
        except MemoryError:
            self._no_memory()
        self._let_go()

    def _let_go(self) -> None:
        """Keep no buffer that has nothing in it: most connections are idle most of the time."""
        if not self._have:
            self._pool.give(self._buffer)
            self._buffer = _NO_BUFFER
            self._view = memoryview(_NO_BUFFER)

    def _drop_request(self) -> None:
        """Let go of one that has begun, at once: what refers to this may wait for the collector."""
        self._payload = self._payload_of = None
        self._payload_buffer = self._buffer = _NO_BUFFER
        self._view = memoryview(_NO_BUFFER)

    def _receive(self) -> None:
        while True:
            try:
                count = self._stream.receive_into(self._room())
                if count is None:
                    count = self._look_for_more()
            except OSError as error:
                if error.errno == errno.EPROTO:
                    self._violation = ProtocolError(error.strerror)
                self._lost()
                return
            if count is None:
                return
            if count:
                self._received(count)
                self._flush()
            else:
                self._closing = True
            if self._closing:
                self._close()
                return
            if self._yielding or self._saturated():
                return
            if monotonic() > self._turn_ends:
                self._yield()
                return

    def _look_for_more(self) -> int | None:
        """What comes if this connection is patient, which it is only while nothing else is to be
        done.
        """
        if self._pool.users > 1 or self._tasks or not self._patience.worth_it():
            return None
        room = self._room()
        until = perf_counter() + LONGEST
        while perf_counter() < until:
            count = self._stream.receive_into(room)
            if count is not None:
                self._patience.came()
                return count
        self._patience.did_not_come()
        return None

    def _room(self) -> memoryview:
        """Where the next bytes belong."""
        if self._payload is not None:
            return self._payload[self._filled :]
        if self._skipping:
            return self._view[: min(self._skipping, RECEIVE_SIZE)]
        return self._view[self._have :]

    def _received(self, count: int) -> None:
        if self._payload is not None:
            self._filled += count
            if self._filled < len(self._payload):
                return
            assert self._payload_of is not None
            self._accept(self._payload_of, self._payload)
            self._payload = self._payload_of = None
            buffer, self._payload_buffer = self._payload_buffer, _NO_BUFFER
            self._start_writes(buffer)
            self._share.brought += self._filled
            self._hold()
        elif self._skipping:
            self._skipping -= count
            if not self._skipping:
                self._replies.append(self._after_skip)
        else:
            self._have += count
            self._serve_batch()

    def _serve_batch(self) -> None:
        """Serve every request that is complete in the buffer."""
        buffer, at, have = self._buffer, self._at, self._have
        inline, inline_view = self._pool.inline, self._pool.inline_view
        used = self._inline_used
        request_size, unpack_from = self._dialect.request.size, self._dialect.request.unpack_from
        head, put_data_head = self._dialect.data_head_size, self._dialect.put_data_head
        magic_expected, size = self._dialect.magic, self._size
        windows, span = self._windows, self._span
        files, decompressed_now = self._files, self._decompressed_now
        view, write_now, write_flags = self._view, self._write_now, self._write_flags
        done_size, put_done = self._dialect.done_size, self._dialect.put_done
        requests, limit = 0, TURN_REQUESTS
        while have - at >= request_size:
            if requests >= limit:
                self._yield()
                break
            requests += 1
            magic, flags, command, cookie, offset, length = unpack_from(buffer, at)
            if command == _READ and 0 < length <= self._inline_max and not flags:
                # Rule 1. What does not fit goes the way of all others, below.
                window = windows.get(offset // span)
                if window is not None and offset + length <= size and magic == magic_expected:
                    row = bisect_right(window.ends, offset)
                    kind = window.kinds[row]
                    if kind in _STORED and offset + length <= window.ends[row]:
                        if used + head + length > INLINE_SIZE:
                            self._inline_used = used
                            self._flush()
                            used = 0
                            limit -= FLUSH_COST
                            if self._saturated():
                                break
                        data = used + head
                        target = inline_view[data : data + length]
                        depth, place = window.depths[row], window.places[row]
                        if kind == DATA:
                            file = files[depth]
                            served = (
                                file is not None and file.read_now(target, offset + place) == length
                            )
                        else:
                            served = decompressed_now(depth, place, offset, target)
                            limit -= DECOMPRESSION_COST
                        if served:
                            put_data_head(inline, used, cookie, offset, length)
                            used = data + length
                            at += request_size
                            continue
            elif command == _WRITE and 0 < length <= self._inline_max and flags == write_flags:
                after = at + request_size + length
                if after <= have and offset + length <= size and magic == magic_expected:
                    if used + done_size > INLINE_SIZE:
                        self._inline_used = used
                        self._flush()
                        used = 0
                    if write_now(offset, view[at + request_size : after]):
                        put_done(inline, used, cookie, offset)
                        used += done_size
                        at = after
                        continue
            if magic != magic_expected:
                self._violation = ProtocolError(f"a request with magic {magic:#x}")
                self._closing = True
                break
            self._at = at + request_size
            self._inline_used = used
            served = self._serve_one(Request(flags, command, cookie, offset, length))
            used = self._inline_used
            if not served:  # its payload is not all here yet: it is read again as a whole
                break
            at, have = self._at, self._have
            if self._closing or self._saturated():
                break
            if monotonic() > self._turn_ends:
                limit = 0
        self._patience.received(requests)
        self._at = at
        self._inline_used = used
        self._make_room()

    def _serve_one(self, request: Request) -> bool:
        """Serve the request whose header ends at ``_at``, and go past its payload. False: come
        again.
        """
        flags, command, _, _, length, _ = request
        if command == _DISC:
            self._closing = True
            return True
        payload_length = self._dialect.payload_length(flags, command, length)
        self._wanted = payload_length or length * (command == _READ)
        if self._memory.short and not self._share.allows(self._wanted):
            return False
        self._wanted = 0
        if not payload_length:
            if command == _WRITE:
                self._accept(request, memoryview(b""))
            else:
                held = length if command == _READ else _STATUS_HELD * (command == _BLOCK_STATUS)
                self._start(self.commands.serve(request), held, changes=command in _CHANGES)
            return True
        if payload_length > MAX_PAYLOAD:
            self._violation = ProtocolError(f"{request} has more payload than {MAX_PAYLOAD}")
            self._closing = True
            return True
        here = self._have - self._at
        long = here < payload_length > RECEIVE_SIZE // 2
        try:
            self.commands.validate(request)
            if long:
                self._payload_buffer = self._pool.take(payload_length)
        except (RequestError, MemoryError) as error:
            refusal = self.commands.refusal(request, error)
            if here >= payload_length:
                self._at += payload_length
                self._replies.append(refusal)
            else:
                self._skipping, self._after_skip = payload_length - here, refusal
                self._at = self._have
                self._stalls.begun()
            return True
        if here >= payload_length:
            payload = self._view[self._at : self._at + payload_length]
            self._at += payload_length
            self._take(request, payload)
        elif long:
            self._payload = memoryview(self._payload_buffer)[:payload_length]
            self._payload[:here] = self._view[self._at : self._have]
            self._payload_of, self._filled = request, here
            self._at = self._have
            self._stalls.begun()
            self._hold()
        else:
            return False
        return True

    def _accept(self, request: Request, payload: memoryview) -> None:
        """Take a request whose payload is complete, but was not when its header came."""
        try:
            self.commands.validate(request)
        except RequestError as error:
            self._replies.append(self.commands.refusal(request, error))
        else:
            self._take(request, payload)

    def _take(self, request: Request, payload: memoryview) -> None:
        """Take a request that is valid, with its payload."""
        flags, command, cookie, offset, length, _ = request
        if command == _WRITE:
            self._writes.append(Request(flags, command, cookie, offset, length, payload))
        else:
            # A filter is short, and the buffer is received into again before it is answered.
            request = request._replace(payload=memoryview(bytes(payload)))
            self._start(self.commands.serve(request), _STATUS_HELD)

    def _make_room(self) -> None:
        """Move what is left of the buffer to its front, or into a fresh one if a write still needs
        it.
        """
        at, have = self._at, self._have
        rest = have - at
        if self._writes:
            lent = self._buffer
            self._buffer = self._pool.take(RECEIVE_SIZE)
            self._buffer[:rest] = self._view[at:have]
            self._view = memoryview(self._buffer)
            self._start_writes(lent)
        elif at and rest:
            self._buffer[:rest] = self._buffer[at:have]
        self._at, self._have = 0, rest
        if rest:
            self._stalls.begun(another=bool(at))

    def _saturated(self) -> bool:
        """Whether reading has to stop; then it goes on at `_resume`."""
        limits = self._limits
        if (
            len(self._tasks) < limits.requests
            and self._bytes_in_flight < limits.received_bytes
            and self._stream.queued < limits.queued_bytes
            # A payload that has begun to come has its memory; others wait for what it holds.
            and (not self._memory.short or self._payload or self._share.allows(self._wanted))
        ):
            return False
        self._stream.pause_reading()
        return True

    def _yield(self) -> None:
        """Give the others their turn; then this connection goes on, before the loop sleeps."""
        if not self._yielding:
            self._yielding = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._yielding = False
        if self._have or not self._stream.reading:
            self._resume()
        else:
            self._on_readable()

    def _resume(self) -> None:
        """Serve what is left in the buffer, then receive again."""
        self._hold()
        if self._closing or self._yielding or self._saturated():
            return
        if self._have and self._payload is None and not self._skipping:
            self._turn_ends = monotonic() + TURN_SECONDS
            try:
                self._serve_batch()
            except MemoryError:
                self._no_memory()
            self._flush()
            self._let_go()
            if self._closing:
                self._close()
                return
            if self._yielding or self._saturated():
                return
        self._stream.resume_reading()

    # Serving

    def _start_writes(self, buffer: bytearray) -> None:
        """Start the writes of this batch, as many hops as their bytes are worth.

        ``buffer`` holds their payloads and goes back to the pool after the last of them.
        """
        writes, self._writes = self._writes, []
        hops = write_hops(writes)
        lease = Lease(buffer, len(hops), self._pool)
        for hop, held in hops:
            self._start(self._write(hop, lease), held, changes=True)

    async def _write(self, requests: list[Request], lease: Lease) -> Sequence[Piece]:
        replies = await self.commands.write_batch(requests)
        lease.end()  # not if this was cancelled: the system call goes on, and reads the buffer
        return replies

    def _start(self, serving: Serving, length: int, *, changes: bool = False) -> None:
        """Serve at once what needs no disk. ``length``: bytes that it keeps in memory meanwhile.

        ``changes``: it changes the image, and so is finished even when the peer has gone.
        """
        step = first_step(serving)
        if isinstance(step, Finished):
            self._replies += step.value
            self._ready_bytes += sum(map(size_of, step.value))
            if self._ready_bytes > INLINE_SIZE:  # what the peer does not take must be seen
                self._flush()
            return
        self._bytes_in_flight += length
        number = self._started = self._started + 1
        serving_on = self._finish_serving(number, step, length)
        self._tasks[number] = self._loop.create_task(serving_on)
        if changes:
            self._changing.add(number)
        self._hold()

    async def _finish_serving(
        self, number: int, serving: Awaitable[Sequence[Piece]], length: int
    ) -> None:
        try:
            replies = await serving
            self._replies += replies
        except MemoryError:
            self._no_memory()
        finally:
            self._bytes_in_flight -= length
            self._tasks.pop(number, None)
            self._changing.discard(number)
            if not self._sending_soon:
                # Replies that become ready in the same turn of the loop leave together.
                self._sending_soon = True
                self._loop.call_soon(self._send_soon)

    def _send_soon(self) -> None:
        self._sending_soon = False
        self._flush()
        self._hold()
        if not self._stream.reading:
            self._resume()
        if not self._tasks and (self._closing or self.commands.stopping):
            self._finish()

    # What all connections share, and who stalls

    def _hold(self) -> None:
        """Tell what this connection holds in memory."""
        waits = self._stream.queued - self._stream.queued_files
        received = self._bytes_in_flight + len(self._payload_buffer)
        self._share.hold(waits + received + REQUEST_COST * len(self._tasks))

    def _blocked(self) -> None:
        """The peer does not take its replies at once."""
        self._hold()
        self._stalls.owed()

    def _brought(self) -> Brought | None:
        """How far the request is that has begun to come in, if one has."""
        if self._payload is None and not self._skipping and not self._have:
            return None
        done = self._filled if self._payload else self._have - self._skipping
        return Brought(done, wanted=self._stream.reading and not self._yielding)

    def _give_up(self, complaint: str) -> None:
        self._violation = ProtocolError(complaint)
        self._stream.pause_reading()
        self._stream.abort()

    def _no_memory(self) -> None:
        """To ask again would bring the same: this client has to go, and nobody else."""
        self._give_up("there is no memory for its requests")

    # Sending and ending

    def _flush(self) -> None:
        """Send the replies that are ready."""
        if self._inline_used:
            used, self._inline_used = self._inline_used, 0
            self._stream.send_view(self._pool.inline_view[:used])
        if self._replies:
            replies, self._replies = self._replies, []
            self._ready_bytes = 0
            self._stream.send(replies)

    def _close(self) -> None:
        """No more requests are taken: answer those under way, then end."""
        self._stream.pause_reading()
        if not self._tasks:
            self._finish()

    def _finish(self) -> None:
        """End once every reply has left, and the peer has taken what was lent for it."""
        self._closing = True
        if self._stream.queued or self._stream.lent:
            self._stream.on_drained = self._finish
            self._stalls.owed(ending=True)
        else:
            self._ended.set()

    def _lost(self) -> None:
        """The peer has gone: nobody waits for what is under way, but writes are finished."""
        self._closing = True
        for number in self._tasks.keys() - self._changing:
            self._tasks[number].cancel()
        self._ended.set()
