"""What passes on a connection, message by message.

"Newstyle negotiation" and "Transmission" of the NBD specification. A `Tracer` is handed the bytes
that pass in both directions, in pieces of any size, and tells of each message. Its rules:

1. It follows from the bytes: a message begins with a magic number that tells what it is, save the
   reply to NBD_OPT_EXPORT_NAME, which is due after that option.
2. Nothing that passes makes it fail. What it cannot follow it tells once, and then nothing more of
   that direction.
3. Memory is bounded: data are not kept.
4. It serves either end: ``>`` is what a client says, at the client's end, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator

from pynbd.errors import ProtocolError, PynbdError
from pynbd.protocol import wire
from pynbd.protocol.handshake import Read, Skip
from pynbd.protocol.traced import (
    OPTIONS,
    Direction,
    Fields,
    Hexadecimal,
    Traced,
    chunk,
    context_filter,
    looked_at,
    looked_into,
    option_reply,
)
from pynbd.protocol.transmission import Request, dialect
from pynbd.protocol.values import (
    EXPORT_NAME_PADDING,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    IHAVEOPT,
    OPTION_REPLY_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ClientFlag,
    Command,
    CommandFlag,
    Error,
    Info,
    Option,
    OptionReply,
    ReplyFlag,
    ReplyType,
)

# Bytes of an option, of its reply or of a filter that are looked into.
_LONGEST = 1 << 17

_Decoder = Generator[Read | Skip, bytes, None]
_Buffer = bytes | bytearray | memoryview


class Tracer:
    """Follows one connection from its first byte, and calls ``tell`` for each message."""

    def __init__(self, tell: Callable[[Traced], None]) -> None:
        self._tell = tell
        self._ways = {
            Direction.TO_SERVER: _Way(self._to_server()),
            Direction.TO_CLIENT: _Way(self._to_client()),
        }
        self._client_flags = ClientFlag(0)
        self._options: deque[Option] = deque()  # that have no final reply yet
        self._selected: dict[int, str] = {}  # by the NBD_OPT_SET_META_CONTEXT under way
        self._contexts: dict[int, str] = {}
        self._requests: dict[int, Request] = {}  # that have no final reply yet, by cookie

    def passed(self, direction: Direction, data: _Buffer) -> None:
        """The next bytes of one direction."""
        self._follow(direction, len(data), memoryview(data))

    def skipped(self, direction: Direction, length: int) -> None:
        """The next ``length`` bytes of one direction, unseen: data of a file."""
        self._follow(direction, length, None)

    def _follow(self, direction: Direction, length: int, data: memoryview | None) -> None:
        try:
            self._ways[direction].take(length, data)
        except Exception as error:  # a defect in here must not become one of the connection
            self._ways[direction].lost = True
            reason = str(error) if isinstance(error, PynbdError) else repr(error)
            self._told(direction, "undecodable, and so is the rest", reason=reason)

    def _told(self, direction: Direction, message: str, /, **fields: object) -> None:
        told = {name: value for name, value in fields.items() if value is not None}
        self._tell(Traced(direction, message, told))

    # What a client says

    def _to_server(self) -> _Decoder:
        self._client_flags = wire.ClientFlags.parse((yield Read(4))).flags
        self._told(Direction.TO_SERVER, "client flags", flags=self._client_flags)
        while True:
            head = yield Read(4)
            magic = int.from_bytes(head, "big")
            if magic == IHAVEOPT >> 32:
                yield from self._option(head)
            elif magic in (REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC):
                yield from self._request(head, extended=magic == EXTENDED_REQUEST_MAGIC)
            else:
                raise ProtocolError(f"no option and no request begins with {magic:#010x}")

    def _option(self, head: bytes) -> _Decoder:
        header = wire.OptionHeader.parse(head + (yield Read(12)))
        option, length = header.option, header.length
        self._options.append(option)
        fields: Fields = {"length": length or None}
        if option in OPTIONS and length <= _LONGEST:
            fields = looked_into(OPTIONS[option], (yield Read(length)))
            length = 0
        self._told(Direction.TO_SERVER, str(option), **fields)
        yield Skip(length)

    def _request(self, head: bytes, *, extended: bool) -> _Decoder:
        spoken = dialect(structured=False, extended=extended)
        rest = yield Read(spoken.request.size - len(head))
        request = Request(*spoken.request.unpack(head + rest)[1:])
        flags, command, cookie, offset, length, _ = request
        if command != Command.DISC and not self._ways[Direction.TO_CLIENT].lost:
            self._requests[cookie] = request
        payload = spoken.payload_length(flags, command, length)
        fields: Fields = {}
        if command == Command.BLOCK_STATUS and 0 < payload <= _LONGEST:
            fields = looked_into(context_filter, (yield Read(payload)), self._contexts)
            payload = 0
        self._told(
            Direction.TO_SERVER,
            str(Command(command)),
            flags=CommandFlag(flags) if flags else None,
            cookie=Hexadecimal(cookie),
            offset=offset,
            length=length,
            **fields,
        )
        yield Skip(payload)

    # What a server says

    def _to_client(self) -> _Decoder:
        greeting = wire.Greeting.parse((yield Read(18)))
        self._told(Direction.TO_CLIENT, "NBDMAGIC IHAVEOPT", flags=greeting.flags)
        while True:
            head = yield Read(4)
            magic = int.from_bytes(head, "big")
            if self._options and self._options[0] == Option.EXPORT_NAME:
                yield from self._export_name_reply(head)
            elif magic == OPTION_REPLY_MAGIC >> 32:
                yield from self._option_reply(head)
            elif magic == SIMPLE_REPLY_MAGIC:
                yield from self._simple_reply(head)
            elif magic in (STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC):
                yield from self._chunk(head, extended=magic == EXTENDED_REPLY_MAGIC)
            else:
                raise ProtocolError(f"no reply begins with {magic:#010x}")

    def _export_name_reply(self, head: bytes) -> _Decoder:
        option = self._options.popleft()
        reply = wire.ExportNameReply.parse(head + (yield Read(6)))
        self._told(Direction.TO_CLIENT, f"reply to {option}", size=reply.size, flags=reply.flags)
        if ClientFlag.NO_ZEROES not in self._client_flags:
            yield Skip(EXPORT_NAME_PADDING)

    def _option_reply(self, head: bytes) -> _Decoder:
        header = wire.OptionReplyHeader.parse(head + (yield Read(16)))
        option, reply, length = header.option, header.reply, header.length
        name = str(reply)
        fields: Fields = {"length": length}
        if length <= _LONGEST:
            data = yield Read(length)
            fields = looked_into(option_reply, reply, data)
            if reply == OptionReply.INFO and length >= 2:
                name += f" {Info(int.from_bytes(data[:2], 'big'))}"
            length = 0
        self._told(Direction.TO_CLIENT, name, option=option, **fields)
        if option == Option.SET_META_CONTEXT:
            match fields:
                case {"id": int(id_), "name": str(context)}:
                    self._selected[id_] = context
        if reply == OptionReply.ACK or reply.is_error:
            if self._options:
                self._options.popleft()
            if option == Option.SET_META_CONTEXT:
                self._contexts, self._selected = self._selected, {}
        yield Skip(length)

    def _simple_reply(self, head: bytes) -> _Decoder:
        rest = yield Read(wire.SIMPLE_REPLY.size - len(head))
        _, error, cookie = wire.SIMPLE_REPLY.unpack(head + rest)
        request = self._requests.pop(cookie, None)
        length = request.length if request and request.command == Command.READ and not error else 0
        self._told(
            Direction.TO_CLIENT,
            "simple reply",
            cookie=Hexadecimal(cookie),
            error=Error(error) if error else None,
            length=length or None,
        )
        yield Skip(length)

    def _chunk(self, head: bytes, *, extended: bool) -> _Decoder:
        layout = wire.EXTENDED_CHUNK if extended else wire.STRUCTURED_CHUNK
        rest = yield Read(layout.size - len(head))
        _, flags, kind, cookie, *offset, length = layout.unpack(head + rest)
        request = self._requests.get(cookie)
        # It repeats that of the request, and is told where it does not.
        strange = offset[0] if offset and (not request or offset[0] != request.offset) else None
        if flags & ReplyFlag.DONE:
            self._requests.pop(cookie, None)
        reply = ReplyType(kind)
        payload = yield Read(min(length, looked_at(reply)))
        self._told(
            Direction.TO_CLIENT,
            str(reply),
            flags=ReplyFlag(flags) if flags else None,
            cookie=Hexadecimal(cookie),
            request_offset=strange,
            **looked_into(chunk, reply, payload, length, self._contexts),
        )
        yield Skip(length - len(payload))


class _Way:
    """One direction: what the decoder waits for, in pieces."""

    def __init__(self, decoder: _Decoder) -> None:
        self._decoder = decoder
        self._step: Read | Skip = next(decoder)
        self._missing = self._step.size
        self._held = bytearray()
        self.lost = False

    def take(self, length: int, data: memoryview | None) -> None:
        """Take ``length`` bytes, which are zeroes as far as is known if there are no ``data``."""
        at = 0
        while at < length and not self.lost:
            here = min(self._missing, length - at)
            if isinstance(self._step, Read):
                self._held += bytes(here) if data is None else data[at : at + here]
            at += here
            self._missing -= here
            while not self._missing:
                self._step = self._decoder.send(bytes(self._held))
                self._missing = self._step.size
                self._held.clear()
