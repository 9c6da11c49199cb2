"""What a server says to our client in transmission ("Simple reply message", "Structured reply chunk
message", "Extended reply chunk message" and "Structured reply types" of the NBD specification).

An input: the dialect, how the stream is parted, how many requests are under way, these (command,
flags, offset, length), and the server's stream. Their cookies are 1, 2, ...

Allowed: `ProtocolError`. Until then every request that is over is what a second reading of the same
bytes says, however they were parted; nothing is written beside the buffer of a READ; and no more
room is made than the requests are worth.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import ExportInfo, Session
from pynbd.protocol.transmission import Request
from pynbd.protocol.transmission_client import Asked, Replies
from pynbd.protocol.values import TransmissionFlag
from tests.conformance.client import DONE, Chunk, Cmd, CmdFlag, Mode
from tests.fuzz.speaking import chunk, error_payload, simple_reply, status
from tests.fuzz.taking import Taking

ALLOWED = (ProtocolError,)
MAX_LEN = 12000
DICTIONARY = (
    *(bytes.fromhex(magic) for magic in ("67446698", "668e33ef", "6e8a278c")),
    *(struct.pack(">H", kind) for kind in Chunk),
    *(struct.pack(">Q", cookie) for cookie in range(1, 7)),
)
_MODES = list(Mode)
_CONTEXTS = {4: "base:allocation", 9: "qemu:dirty-bitmap:b"}
_SIZE = 1 << 20
_GUARD = b"\xa5" * 64
_BUFFER = 1 << 16
_LONG = 9000
# Bytes at a time; 0 is as many as there is room for.
_STEPS = (0, 1, 7, 61, 1000, 5000)


class _Wanted(NamedTuple):
    """A request; ``length`` 0 is so much that it is received where it belongs."""

    command: int
    flags: int
    offset: int
    length: int

    def encoded(self) -> bytes:
        return struct.pack(">BBHH", *self)


_REQUESTS = (
    _Wanted(Cmd.READ, 0, 16, 32),
    _Wanted(Cmd.BLOCK_STATUS, 0, 0, 1024),
    _Wanted(Cmd.WRITE, 0, 0, 8),
    _Wanted(Cmd.BLOCK_STATUS, CmdFlag.REQ_ONE, 0, 512),
    _Wanted(Cmd.READ, CmdFlag.DF, 0, 0),
)


def seeds() -> Iterable[bytes]:
    for mode in Mode:
        for step in (0, 3, 4):
            head = bytes([_MODES.index(mode), step, len(_REQUESTS)])
            said = _simple() if mode is Mode.SIMPLE else _chunks(mode)
            yield head + b"".join(wanted.encoded() for wanted in _REQUESTS) + said
    for mode in (Mode.STRUCTURED, Mode.EXTENDED):
        head = bytes([_MODES.index(mode), 0, 1]) + _REQUESTS[0].encoded()
        for at, length in ((16, 16), (24, 24), (15, 16), (33, 16), (32, 17), (32, 15)):
            said = chunk(mode, 0, Chunk.OFFSET_HOLE, 1, struct.pack(">QI", 16, 16), offset=16)
            data = struct.pack(">Q", at) + bytes(length)
            yield head + said + chunk(mode, DONE, Chunk.OFFSET_DATA, 1, data, offset=16)
        said = chunk(mode, 0, Chunk.OFFSET_DATA, 1, struct.pack(">Q", 16) + b"x" * 16, offset=16)
        said += chunk(mode, 0, Chunk.OFFSET_HOLE, 1, struct.pack(">QI", 24, 16), offset=16)
        yield head + said + chunk(mode, DONE, Chunk.NONE, 1, offset=16)


def _simple() -> bytes:
    said = simple_reply(1) + b"0123456789abcdef" * 2 + simple_reply(3, error=28)
    return said + simple_reply(2, error=22) + simple_reply(5) + bytes(_LONG)


def _chunks(mode: Mode) -> bytes:
    said = chunk(mode, 0, Chunk.OFFSET_DATA, 1, struct.pack(">Q", 16) + bytes(range(24)), offset=16)
    said += status(mode, 0, 2, 4, [(512, 0), (512, 3)])
    said += chunk(mode, DONE, Chunk.OFFSET_HOLE, 1, struct.pack(">QI", 40, 8), offset=16)
    said += chunk(mode, DONE, Chunk.NONE, 3)
    said += status(mode, DONE, 2, 9, [(1024, 1)]) + status(mode, 0, 4, 4, [(512, 0)])
    said += chunk(mode, 0, Chunk.ERROR_OFFSET, 4, error_payload(5, "bad\n\x1b", at=7))
    said += chunk(mode, DONE, Chunk.ERROR, 4, error_payload(22, ""))
    return said + chunk(mode, DONE, Chunk.OFFSET_DATA, 5, bytes(8) + b"x" * _LONG)


class _Conversation:
    """Our client with these requests under way."""

    def __init__(self, mode: Mode, requests: Sequence[_Wanted]) -> None:
        session = Session(
            export=ExportInfo("", "", _SIZE, TransmissionFlag(1), (1, 4096, 1 << 25), ()),
            flags=TransmissionFlag(1),
            structured=mode is Mode.STRUCTURED,
            extended=mode is Mode.EXTENDED,
            contexts=_CONTEXTS,
        )
        self.over: list[Asked] = []
        self.replies = Replies(session, self.over.append)
        self.buffers: list[bytearray] = []
        self.violation = ""
        self._most = _BUFFER
        for cookie, (command, flags, offset, length) in enumerate(requests, 1):
            view = None
            if command == Cmd.READ:
                self.buffers.append(bytearray(_GUARD + bytes(length) + _GUARD))
                view = memoryview(self.buffers[-1])[len(_GUARD) : -len(_GUARD)]
            contexts = tuple(_CONTEXTS) if command == Cmd.BLOCK_STATUS else ()
            if contexts:
                self._most = max(self._most, 16 * length + 8)
            request = Request(flags, command, cookie, offset, length)
            self.replies.asked[cookie] = Asked(request, view=view, contexts=contexts)

    def hear(self, stream: bytes, step: int) -> None:
        at = 0
        try:
            while at < len(stream):
                room = self.replies.room()
                assert 0 < len(room) <= self._most
                piece = stream[at : at + min(len(room), step or len(room))]
                room[: len(piece)] = piece
                at += len(piece)
                self.replies.received(len(piece))
        except ProtocolError as error:
            self.violation = str(error)
        for buffer in self.buffers:
            assert buffer.startswith(_GUARD)
            assert buffer.endswith(_GUARD)

    def outcome(self) -> object:
        over = [
            (
                asked.request.cookie,
                asked.error,
                asked.message,
                bytes(asked.view or b""),
                {number: list(told) for number, told in asked.statuses.items()},
            )
            for asked in self.over
        ]
        return over, self.violation


def one_input(data: bytes) -> None:
    taking = Taking(data)
    mode, step = _MODES[taking.below(3)], _STEPS[taking.below(len(_STEPS))]
    requests = []
    for _ in range(taking.below(7)):
        command, flags, offset, length = (taking.number(width) for width in (1, 1, 2, 2))
        requests.append(_Wanted(command % 8, flags & 0x3F, offset, length or _LONG))
    stream = taking.rest()
    heard, again = _Conversation(mode, requests), _Conversation(mode, requests)
    heard.hear(stream, step)
    again.hear(stream, 0)
    assert heard.outcome() == again.outcome()
    _judge(mode, stream, requests, heard.over)
    if heard.violation:
        raise ProtocolError(heard.violation)


def _judge(mode: Mode, stream: bytes, requests: Sequence[_Wanted], over: Sequence[Asked]) -> None:
    """What is over, in its order, is what the stream says of it."""
    left = {cookie: _Reading(wanted) for cookie, wanted in enumerate(requests, 1)}
    at = 0
    for asked in over:
        while True:
            cookie, done, at = _next(mode, stream, at, left)
            if done:
                break
        assert cookie == asked.request.cookie
        left.pop(cookie).check(asked)


def _next(mode: Mode, stream: bytes, at: int, left: dict[int, _Reading]) -> tuple[int, bool, int]:
    """Read the reply or chunk at ``at``: its cookie, whether that is over, and where it ends."""
    if stream.startswith(b"\x67\x44\x66\x98", at):
        assert mode is not Mode.EXTENDED
        _, error, cookie = struct.unpack_from(">IIQ", stream, at)
        reading = left[cookie]
        end = at + 16
        if error:
            reading.errors.append(error)
        elif reading.wanted.command == Cmd.READ:
            assert mode is Mode.SIMPLE
            end += reading.wanted.length
            reading.content(reading.wanted.offset, stream[at + 16 : end])
        return cookie, True, end
    if mode is Mode.EXTENDED:
        magic, flags, kind, cookie, offset, length = struct.unpack_from(">IHHQQQ", stream, at)
        assert (magic, offset) == (0x6E8A278C, left[cookie].wanted.offset)
        at += 32
    else:
        magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", stream, at)
        assert (mode, magic) == (Mode.STRUCTURED, 0x668E33EF)
        at += 20
    payload = stream[at : at + length]
    assert len(payload) == length
    left[cookie].chunk(kind, payload)
    return cookie, bool(flags & DONE), at + length


class _Reading:
    """What was said about one request."""

    def __init__(self, wanted: _Wanted) -> None:
        self.wanted = wanted
        self.errors: list[int] = []
        self.said = bytearray(wanted.length)
        self.missing = bytearray(b"1" * wanted.length)
        self.twice = False
        self.statuses: dict[int, list[tuple[int, ...]]] = {}

    def content(self, offset: int, data: bytes) -> None:
        start = offset - self.wanted.offset
        content = slice(start, start + len(data))
        assert 0 <= start < content.stop <= self.wanted.length
        self.said[content] = data
        self.twice |= self.missing[content] != b"1" * len(data)
        self.missing[content] = bytes(len(data))

    def chunk(self, kind: int, payload: bytes) -> None:
        match kind:
            case Chunk.NONE:
                assert not payload
            case Chunk.OFFSET_DATA:
                self.content(int.from_bytes(payload[:8]), payload[8:])
            case Chunk.OFFSET_HOLE:
                offset, length = struct.unpack(">QI", payload)
                self.content(offset, bytes(length))
            case Chunk.BLOCK_STATUS:
                number = int.from_bytes(payload[:4])
                assert number not in self.statuses
                self.statuses[number] = list(struct.iter_unpack(">II", payload[4:]))
            case Chunk.BLOCK_STATUS_EXT:
                number, count = struct.unpack_from(">II", payload)
                assert number not in self.statuses
                self.statuses[number] = list(struct.iter_unpack(">QQ", payload[8:]))
                assert len(self.statuses[number]) == count
            case _:
                assert kind & 0x8000
                self.errors.append(int.from_bytes(payload[:4]))

    def check(self, asked: Asked) -> None:
        assert asked.error == next(iter(self.errors), 0)
        assert asked.message == "" or asked.message.isprintable()
        if asked.error:
            return
        if self.wanted.command == Cmd.READ:
            assert not any(self.missing)
            assert not self.twice
            assert bytes(asked.view or b"") == self.said
        if self.wanted.command == Cmd.BLOCK_STATUS:
            assert self.statuses.keys() == _CONTEXTS.keys()
        assert {number: list(told) for number, told in asked.statuses.items()} == self.statuses
        for extents in self.statuses.values():
            lengths = [length for length, _ in extents]
            assert min(lengths) > 0
            assert self.wanted.offset + sum(lengths) <= _SIZE
            assert sum(lengths[:-1]) < self.wanted.length
            if self.wanted.flags & CmdFlag.REQ_ONE:
                assert len(lengths) == 1
                assert lengths[0] <= self.wanted.length
