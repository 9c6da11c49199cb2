"""Client: one connection to an export of any NBD server.

Requests are pipelined: any number of coroutines may ask at the same time, and each has its answer
when it comes. What is longer than one request can be is split.

Before anything is sent, a request is held against what the server said of its export: what it
cannot do is `UnsupportedFeature`, what lies outside or is not aligned `RequestError`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Self

from pynbd.client.negotiation import negotiate, parsed
from pynbd.client.pending import Pending
from pynbd.client.stream import Stream
from pynbd.errors import ProtocolError, RequestError, UnsupportedFeature, UsageError
from pynbd.protocol.handshake import ExportInfo, Session
from pynbd.protocol.handshake_client import enter
from pynbd.protocol.transmission import Request, dialect
from pynbd.protocol.transmission_client import Asked, Replies, Status, encode
from pynbd.protocol.uri import NbdUri
from pynbd.protocol.values import (
    MAX_PAYLOAD,
    Command,
    CommandFlag,
    Error,
    TransmissionFlag,
)

# Seconds that the last words may take to leave.
_CLOSE_LIMIT = 2.0
# How often one turn of the loop receives.
_RECEIVES = 16
# Compact requests have 32 bits of length; this is a multiple of every minimum block size.
_LONGEST_COMPACT = (1 << 32) - (1 << 16)

# As plain ints: every request is held against these, and flags of an enumeration are slow.
_NEEDED = {
    int(Command.FLUSH): int(TransmissionFlag.SEND_FLUSH),
    int(Command.TRIM): int(TransmissionFlag.SEND_TRIM),
    int(Command.CACHE): int(TransmissionFlag.SEND_CACHE),
    int(Command.WRITE_ZEROES): int(TransmissionFlag.SEND_WRITE_ZEROES),
}
_NEEDED_BY_FLAG = {
    int(CommandFlag.FUA): int(TransmissionFlag.SEND_FUA),
    int(CommandFlag.FAST_ZERO): int(TransmissionFlag.SEND_FAST_ZERO),
}
_GROWS = frozenset({Command.WRITE, Command.WRITE_ZEROES})  # where there is no place
_CHANGES = frozenset(map(int, (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)))

Buffer = bytes | bytearray | memoryview


class Client:
    """One connection; `Client.open` or `connect` makes it.

    ``info`` is what was negotiated about the export, ``size`` and ``flags`` are its; ``contexts``
    the names of the negotiated metadata contexts. Offsets and lengths are bytes.

    Every request raises `RequestError` if the server refuses it, `OSError` if the connection is
    lost and `ProtocolError` if the server breaks the protocol.
    """

    def __init__(self, uri: NbdUri, stream: Stream, session: Session) -> None:
        self.name = str(uri)
        self.info: ExportInfo = session.export
        self.size = session.export.size
        self.flags = session.flags
        self.structured = session.structured
        self.extended = session.extended
        self.contexts = tuple(session.contexts.values())
        self._ids = {name: id_ for id_, name in session.contexts.items()}
        self._minimum, _, maximum = session.export.block_size
        self._longest_payload = min(maximum, MAX_PAYLOAD) // self._minimum * self._minimum
        self._longest_effect = max(self.size, 1) if session.extended else _LONGEST_COMPACT
        self._stream = stream
        self._dialect = dialect(structured=session.structured, extended=session.extended)
        self._replies = Replies(session, self._finished)
        self._cookies = count(1)
        self._create_future = asyncio.get_running_loop().create_future
        self._gone: Callable[[], Exception] | None = None  # what every request raises from now on
        self._closing = False
        stream.start(self._on_readable, self._on_lost)

    @classmethod
    async def open(
        cls,
        uri: str | NbdUri,
        *,
        contexts: Sequence[str] = (),
        structured: bool = True,
        extended: bool = True,
    ) -> Client:
        """Connect to an export; the caller closes it.

        ``contexts``: names of metadata contexts, or "base:", "qemu:", "qemu:dirty-bitmap:" for all
        that begin so; which of them there are is in `contexts`. ``structured``, ``extended``: what
        is asked for at most.

        Raises `UsageError` for a URI that is none, `OptionError` if the server refuses, `OSError`
        and `ProtocolError`.
        """
        _check_names(contexts)
        where = parsed(uri)
        stream, session = await negotiate(
            where,
            enter(where.export, contexts, tls=where.tls, structured=structured, extended=extended),
        )
        return cls(where, stream, session)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def read_only(self) -> bool:
        """Whether the export cannot be written to."""
        return TransmissionFlag.READ_ONLY in self.flags

    # Reading

    async def pread(self, offset: int, length: int) -> bytearray:
        """The bytes [offset, offset + length)."""
        self._check(Command.READ, 0, offset, length)
        data = bytearray(length)
        await self._start_read(offset, memoryview(data))
        return data

    async def pread_into(self, offset: int, view: bytearray | memoryview) -> None:
        """Fill ``view`` from ``offset`` on."""
        await self.start_read(offset, view)

    def start_read(self, offset: int, view: bytearray | memoryview) -> Pending:
        """As `pread_into`, without a Task for each of many: what it returns is awaited later.

        It has to be awaited; until then ``view`` is the client's.
        """
        view = memoryview(view).cast("B")
        self._check(Command.READ, 0, offset, len(view))
        return self._start_read(offset, view)

    def _start_read(self, offset: int, view: memoryview) -> Pending:
        return self._pending(
            [
                self._ask(Command.READ, 0, offset + at, size, view=view[at : at + size])
                for at, size in _split(len(view), self._longest_payload)
            ]
        )

    async def cache(self, offset: int, length: int) -> None:
        """Let the server bring a range near."""
        await self._effect(Command.CACHE, 0, offset, length)

    async def block_status(
        self,
        offset: int,
        length: int,
        *,
        contexts: Collection[str] | None = None,
        req_one: bool = False,
    ) -> dict[str, Status]:
        """What the metadata contexts say about the bytes from ``offset`` on, by their names.

        Each answer covers one byte at least and ``length`` at most; servers answer short, so the
        caller asks again from where an answer ends. ``contexts``: those that are wanted, of the
        negotiated ones; all without. ``req_one``: one extent of each is enough.
        """
        flags = int(CommandFlag.REQ_ONE) if req_one else 0
        self._check(Command.BLOCK_STATUS, flags, offset, length)
        _check_names(contexts or ())
        wanted = self.contexts if contexts is None else tuple(dict.fromkeys(contexts))
        if missing := [name for name in wanted if name not in self._ids]:
            there = ", ".join(self.contexts) or "none"
            raise UnsupportedFeature(
                f"{self.name}: the metadata context {missing[0]!r} was not negotiated; there is:"
                f" {there}"
            )
        if not wanted:
            raise UnsupportedFeature(f"{self.name}: no metadata context was negotiated")
        if not length:
            text = "the status of no bytes"
            raise self._refusal(Error.EINVAL, Command.BLOCK_STATUS, offset, length, text)
        filtered = (
            len(wanted) < len(self.contexts) and TransmissionFlag.BLOCK_STATUS_PAYLOAD in self.flags
        )
        length = min(length, self._longest_effect)
        ids = tuple(map(self._ids.__getitem__, wanted if filtered else self.contexts))
        asked = self._ask(
            Command.BLOCK_STATUS, flags, offset, length, contexts=ids, filtered=filtered
        )
        await self._pending([asked])
        return {name: asked.statuses[self._ids[name]].clip(length) for name in wanted}

    # Writing

    async def pwrite(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` onto stable storage.

        ``data`` must not change before the answer is there; if the call is cancelled, before the
        connection is closed.
        """
        await self.start_write(offset, data, fua=fua)

    def start_write(self, offset: int, data: Buffer, *, fua: bool = False) -> Pending:
        """As `pwrite`, without a Task for each of many: what it returns is awaited later."""
        view = memoryview(data).cast("B")
        flags = int(CommandFlag.FUA) if fua else 0
        self._check(Command.WRITE, flags, offset, len(view))
        return self._pending(
            [
                self._ask(Command.WRITE, flags, offset + at, size, payload=view[at : at + size])
                for at, size in _split(len(view), self._longest_payload)
            ]
        )

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        no_hole: bool = False,
        fast_zero: bool = False,
        fua: bool = False,
    ) -> None:
        """Make a range read as zeroes. ``no_hole``: it stays allocated. ``fast_zero``: fail with
        NBD_ENOTSUP, and leave it as it is, if that is no faster than writing.
        """
        flags = CommandFlag.NO_HOLE * no_hole | CommandFlag.FAST_ZERO * fast_zero
        await self._effect(Command.WRITE_ZEROES, flags | CommandFlag.FUA * fua, offset, length)

    async def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Tell the server that nobody needs a range any more."""
        await self._effect(Command.TRIM, CommandFlag.FUA * fua, offset, length)

    async def flush(self) -> None:
        """Every write that was answered onto stable storage."""
        self._check(Command.FLUSH, 0, 0, 0)
        await self._pending([self._ask(Command.FLUSH, 0, 0, 0)])

    async def close(self) -> None:
        """Take leave (NBD_CMD_DISC) and close; requests under way fail with `OSError`."""
        if self._gone is None and not self._closing:
            self._closing = True
            farewell = Asked(Request(0, Command.DISC, next(self._cookies), 0, 0))
            self._stream.send(encode(self._dialect, farewell, filtered=False))
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CLOSE_LIMIT):
                        await self._stream.drain()
            finally:
                self._give_up(self._loss(errno.ECONNABORTED, "the connection was closed"))

    # One request

    def _check(self, command: Command, flags: int, offset: int, length: int) -> None:
        """Raise unless the server can serve such a request."""
        if self._gone is not None:
            raise self._gone()
        if self._closing:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the client is closing", self.name)
        number = int(command)
        if number in _CHANGES and self.read_only:
            raise self._refusal(Error.EPERM, command, offset, length, "the export is read-only")
        needed = _NEEDED.get(number, 0)
        if flags:
            needed |= sum(also for flag, also in _NEEDED_BY_FLAG.items() if flags & flag)
        if missing := needed & ~int(self.flags):
            shown = f"{command} {CommandFlag(flags)}" if flags else f"{command}"
            raise UnsupportedFeature(
                f"{self.name}: the server does not offer {shown}: no {TransmissionFlag(missing)}"
            )
        if not 0 <= offset <= offset + length <= self.size:
            text = f"outside the export, which has {self.size} bytes"
            error = Error.ENOSPC if command in _GROWS else Error.EINVAL
            raise self._refusal(error, command, offset, length, text)
        if (offset | length) % self._minimum:
            text = f"not a multiple of the block size {self._minimum}"
            raise self._refusal(Error.EINVAL, command, offset, length, text)

    def _refusal(
        self, error: Error, command: Command, offset: int, length: int, text: str
    ) -> RequestError:
        return RequestError(error, f"{self.name}: {command} {offset}+{length}: {text}")

    def _ask(
        self,
        command: Command,
        flags: int,
        offset: int,
        length: int,
        *,
        view: memoryview | None = None,
        payload: memoryview | None = None,
        contexts: Collection[int] = (),
        filtered: bool = False,
    ) -> Asked:
        request = Request(flags, command, next(self._cookies), offset, length, payload)
        asked = Asked(request, view=view, contexts=contexts, waiter=self._create_future())
        self._replies.asked[request.cookie] = asked
        head = encode(self._dialect, asked, filtered=filtered)
        if payload is None:
            self._stream.send(head)
        else:
            self._stream.send(head, payload)
        return asked

    async def _effect(self, command: Command, flags: int, offset: int, length: int) -> None:
        """A command without payload, in as many requests as its length needs."""
        self._check(command, flags, offset, length)
        asked = [
            self._ask(command, flags, offset + at, size)
            for at, size in _split(length, self._longest_effect)
        ]
        await self._pending(asked)

    def _pending(self, asked: Sequence[Asked]) -> Pending:
        return Pending(asked, self._abandon)

    def _abandon(self, asked: Asked) -> None:
        asked.waiter.cancel()
        self._replies.abandon(asked)

    # What comes back

    def _on_readable(self) -> None:
        try:
            for _ in range(_RECEIVES):
                room = self._replies.room()
                received = self._stream.receive_into(room)
                if received is None:
                    return
                if not received:
                    self._give_up(self._loss(errno.ECONNRESET, "the server closed the connection"))
                    return
                self._replies.received(received)
                if received < len(room):
                    return
        except ProtocolError as error:
            self._give_up(partial(ProtocolError, f"{self.name}: {error}"))
        except OSError as error:
            self._on_lost(error)

    def _on_lost(self, error: OSError) -> None:
        self._give_up(self._loss(error.errno or errno.EIO, error.strerror or str(error)))

    def _loss(self, number: int, text: str) -> Callable[[], Exception]:
        return partial(OSError, number, text, self.name)

    def _give_up(self, gone: Callable[[], Exception]) -> None:
        """Close the connection; ``gone`` is what happens to requests, now and later."""
        if self._gone is None:
            self._gone = gone
            self._stream.close()
            for asked in self._replies.asked.values():
                _fail(asked, gone())
            self._replies.asked.clear()

    def _finished(self, asked: Asked) -> None:
        if asked.error:
            said = f": {asked.message}" if asked.message else ""
            text = f"{self.name}: {asked.request}: {Error(asked.error)}{said}"
            _fail(asked, RequestError(asked.error, text))
        elif not asked.waiter.done():
            asked.waiter.set_result(None)


def _fail(asked: Asked, error: Exception) -> None:
    """Tell whoever waits, if somebody still does; an error that nobody takes is no news."""
    if not asked.waiter.done():
        asked.waiter.set_exception(error)
        asked.waiter.exception()


def _check_names(contexts: Collection[str]) -> None:
    if isinstance(contexts, str):
        raise UsageError(f"contexts: a list of names is expected, not {contexts!r}")


def _split(length: int, longest: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces of ``length`` bytes, each ``longest`` at most."""
    return ((at, min(longest, length - at)) for at in range(0, length, longest))
