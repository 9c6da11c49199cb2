"""A small blocking NBD peer that speaks in bytes, for the rows of docs/protocol-support.md.

It is written from the layouts and numbers of the NBD specification alone, and imports nothing of
pynbd: what it expects cannot come from the code under test. It sends whatever a test wants, legal
or not, and every wait has a deadline.

1. The functions build messages; `Peer` sends and reads them. A test that wants odd bytes packs them
   itself and uses `Peer.send`.
2. Names keep the specification's words without the prefix they share: `Option.GO` is NBD_OPT_GO.
3. `Peer.mode` follows what was negotiated through `Peer.negotiate`, and says which headers
   `Peer.request` and `Peer.reply` use.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, IntEnum, IntFlag
from types import TracebackType
from typing import NamedTuple, Self

DEADLINE = 10.0
"""Seconds that any single wait may take: what is late fails, but a busy disk is no failure."""

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
COMPACT_REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

C_FIXED_NEWSTYLE = 1
C_NO_ZEROES = 2

MAX_PAYLOAD = 32 << 20


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Cmd(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CmdFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    """Reply types of structured and extended replies."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


DONE = 1
"""The one flag of a reply chunk."""


class Errno(IntEnum):
    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class Mode(Enum):
    """What the transmission phase speaks."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


# Messages of the negotiation ------------------------------------------------------------------


def client_flags(flags: int = C_FIXED_NEWSTYLE | C_NO_ZEROES) -> bytes:
    return struct.pack(">I", flags)


def option(code: int, data: bytes = b"", *, magic: bytes = IHAVEOPT, length: int = -1) -> bytes:
    """An option; ``length`` is what its header says, if not the truth."""
    return magic + struct.pack(">II", code, len(data) if length < 0 else length) + data


def info_data(name: str | bytes, infos: Sequence[int] = ()) -> bytes:
    """The data of INFO and GO."""
    raw = _raw(name)
    return struct.pack(f">I{len(raw)}sH{len(infos)}H", len(raw), raw, len(infos), *infos)


def meta_data(name: str | bytes, queries: Sequence[str | bytes] = ()) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    raw = _raw(name)
    data = struct.pack(f">I{len(raw)}sI", len(raw), raw, len(queries))
    return data + b"".join(struct.pack(">I", len(q)) + q for q in map(_raw, queries))


def _raw(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def opening(mode: Mode, export: str | bytes = "", contexts: Sequence[str] = ()) -> bytes:
    """All that a client sends, from its flags to GO, to come to transmission in ``mode``."""
    script = client_flags()
    if mode is Mode.STRUCTURED:
        script += option(Option.STRUCTURED_REPLY)
    if mode is Mode.EXTENDED:
        script += option(Option.EXTENDED_HEADERS)
    if contexts:
        script += option(Option.SET_META_CONTEXT, meta_data(export, contexts))
    return script + option(Option.GO, info_data(export))


class OptionReply(NamedTuple):
    option: int
    type: int
    data: bytes


class ExportInfo(NamedTuple):
    """What INFO or GO told: ``infos`` are the raw payloads by type, each type once."""

    infos: dict[int, bytes]

    @property
    def size(self) -> int:
        return int(struct.unpack(">HQH", self.infos[Info.EXPORT])[1])

    @property
    def flags(self) -> int:
        return int(struct.unpack(">HQH", self.infos[Info.EXPORT])[2])


# Messages of the transmission -----------------------------------------------------------------


def request(
    mode: Mode,
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
    magic: int | None = None,
) -> bytes:
    """A request with the header of ``mode``, and its payload. ``length`` goes into the header as
    it is.
    """
    if mode is Mode.EXTENDED:
        magic = EXTENDED_REQUEST_MAGIC if magic is None else magic
        return struct.pack(">IHHQQQ", magic, flags, command, cookie, offset, length) + payload
    magic = COMPACT_REQUEST_MAGIC if magic is None else magic
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + payload


def filter_payload(effect_length: int, ids: Sequence[int]) -> bytes:
    """The payload of BLOCK_STATUS."""
    return struct.pack(f">Q{len(ids)}I", effect_length, *ids)


class ReplyChunk(NamedTuple):
    """One chunk as it came. ``offset`` is that of an extended header, None in a structured one."""

    flags: int
    type: int
    cookie: int
    offset: int | None
    payload: bytes

    @property
    def done(self) -> bool:
        return bool(self.flags & DONE)


class Extent(NamedTuple):
    length: int
    flags: int


class Reply(NamedTuple):
    """A whole reply. ``error`` is 0 for success; ``chunks`` is empty for a simple reply.

    ``data`` is what a READ brought, holes filled with zeroes (only where there was no error).
    ``status`` is what BLOCK_STATUS brought, by context id.
    """

    cookie: int
    error: int
    data: bytes
    chunks: list[ReplyChunk]
    status: dict[int, list[Extent]]


class Disconnected(Exception):
    """The server closed the connection while more was expected of it."""


# The peer -------------------------------------------------------------------------------------


class Peer:
    """One connection to a server: to a unix socket, or to the host and port of TCP."""

    def __init__(
        self, where: str | os.PathLike[str] | tuple[str, int], *, deadline: float = DEADLINE
    ) -> None:
        far = isinstance(where, tuple)
        self.sock = socket.socket(socket.AF_INET if far else socket.AF_UNIX)
        self.sock.settimeout(deadline)
        self.sock.connect(where if far else os.fspath(where))
        self.mode = Mode.SIMPLE
        self._deadline = deadline
        self._cookies = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.sock.close()

    # Bytes

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except ConnectionError as error:
            raise Disconnected from error

    def send_anyway(self, data: bytes) -> None:
        """Send as much as the server takes before it closes."""
        with suppress(Disconnected):
            self.send(data)

    def send_bytewise(self, data: bytes) -> None:
        """Send one byte at a time, each only once the server has taken the one before."""
        for at in range(len(data)):
            self.send(data[at : at + 1])
            self.wait_taken()

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise Disconnected from error

    def wait_taken(self) -> None:
        """Wait until the server has received all that was sent."""
        deadline = time.monotonic() + self._deadline
        while struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0" * 4))[0]:
            assert time.monotonic() < deadline, "the server does not read"
            os.sched_yield()

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        data = bytearray()
        while len(data) < length:
            try:
                part = self.sock.recv(min(length - len(data), 1 << 20))
            except ConnectionError as error:
                raise Disconnected(f"after {bytes(data)!r}") from error
            if not part:
                raise Disconnected(f"after {bytes(data)!r}")
            data += part
        return bytes(data)

    def read_to_end(self) -> bytes:
        """Everything until the server closes."""
        data = b""
        try:
            while part := self.sock.recv(1 << 20):
                data += part
        except ConnectionError:
            pass  # it closed with bytes of ours unread
        return data

    def expect_disconnect(self) -> None:
        """The server says nothing more, and closes."""
        rest = self.read_to_end()
        assert rest == b"", f"before it closed, the server sent {rest!r}"

    def expect_silence(self, seconds: float = 0.05) -> None:
        """The server says nothing for a while, and does not close."""
        self.sock.settimeout(seconds)
        try:
            data = self.sock.recv(1)
        except TimeoutError:
            return
        finally:
            self.sock.settimeout(self._deadline)
        raise AssertionError(f"the server sent {data!r}" if data else "the server closed")

    # Negotiation

    def read_greeting(self) -> int:
        """Check the two magics; return the handshake flags."""
        greeting = self.read(18)
        assert greeting[:16] == NBDMAGIC + IHAVEOPT
        return int.from_bytes(greeting[16:])

    def greet(self, flags: int = C_FIXED_NEWSTYLE | C_NO_ZEROES) -> None:
        """Read the greeting and answer it."""
        assert self.read_greeting() == 3
        self.send(client_flags(flags))

    def option(self, code: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option and read all of its replies."""
        self.send(option(code, data))
        return self.read_option_replies(code)

    def read_option_reply(self) -> OptionReply:
        magic, code, kind, length = struct.unpack(">QIII", self.read(20))
        assert magic == OPTION_REPLY_MAGIC
        return OptionReply(code, kind, self.read(length))

    def read_option_replies(self, code: int) -> list[OptionReply]:
        """All replies to the option ``code``: the last one is an ACK or an error."""
        replies = []
        while True:
            replies.append(self.read_option_reply())
            assert replies[-1].option == code
            if replies[-1].type == Rep.ACK or replies[-1].type & 1 << 31:
                return replies

    def refused(self, code: int, data: bytes = b"") -> tuple[int, str]:
        """Send an option that the server refuses in one reply: the reply type and its text."""
        self.send(option(code, data))
        return self.read_refusal(code)

    def read_refusal(self, code: int) -> tuple[int, str]:
        (reply,) = self.read_option_replies(code)
        assert reply.type & 1 << 31, f"not refused: {reply}"
        return reply.type, reply.data.decode()

    def acknowledged(self, code: int, data: bytes = b"") -> list[bytes]:
        """Send an option that succeeds: the payloads of the replies before the ACK."""
        replies = self.option(code, data)
        assert replies[-1] == (code, Rep.ACK, b""), replies
        return [reply.data for reply in replies[:-1]]

    def listing(self) -> dict[str, str]:
        """LIST: descriptions by name."""
        exports = {}
        for data in self.acknowledged(Option.LIST):
            length = int.from_bytes(data[:4])
            exports[data[4 : 4 + length].decode()] = data[4 + length :].decode()
        return exports

    def info(self, code: int, export: str | bytes = "", infos: Sequence[int] = ()) -> ExportInfo:
        """INFO or GO that succeeds."""
        payloads = self.acknowledged(code, info_data(export, infos))
        told = {int.from_bytes(data[:2]): data for data in payloads}
        assert len(told) == len(payloads), "an information was sent twice"
        return ExportInfo(told)

    def meta(
        self, code: int, export: str | bytes = "", queries: Sequence[str | bytes] = ()
    ) -> dict[str, int]:
        """LIST_META_CONTEXT or SET_META_CONTEXT that succeeds: ids by name, in the order of the
        replies.
        """
        payloads = self.acknowledged(code, meta_data(export, queries))
        contexts = {data[4:].decode(): int.from_bytes(data[:4]) for data in payloads}
        assert len(contexts) == len(payloads), "a context was sent twice"
        return contexts

    def headers(self, mode: Mode) -> None:
        """Negotiate the reply headers of ``mode``."""
        if mode is Mode.STRUCTURED:
            assert self.acknowledged(Option.STRUCTURED_REPLY) == []
        if mode is Mode.EXTENDED:
            assert self.acknowledged(Option.EXTENDED_HEADERS) == []
        self.mode = mode

    def negotiate(
        self, mode: Mode = Mode.SIMPLE, export: str | bytes = "", contexts: Sequence[str] = ()
    ) -> dict[str, int]:
        """From the greeting to transmission; the ids of ``contexts``, all of which must exist."""
        self.greet()
        self.headers(mode)
        ids = self.meta(Option.SET_META_CONTEXT, export, contexts) if contexts else {}
        assert sorted(ids) == sorted(contexts)
        self.info(Option.GO, export)
        return ids

    # Transmission

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> int:
        """Send a request; ``length`` is the payload's if there is one and none is given. Returns
        the cookie.
        """
        self._cookies += 1
        cookie = self._cookies if cookie is None else cookie
        length = length or len(payload)
        self.send(
            request(self.mode, command, offset, length, flags=flags, cookie=cookie, payload=payload)
        )
        return cookie

    def read_chunk(self) -> ReplyChunk:
        """The next chunk of a structured or an extended reply."""
        if self.mode is Mode.EXTENDED:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.read(32))
            assert magic == EXTENDED_REPLY_MAGIC, hex(magic)
            return ReplyChunk(flags, kind, cookie, offset, self.read(length))
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.read(20))
        assert magic == STRUCTURED_REPLY_MAGIC, hex(magic)
        return ReplyChunk(flags, kind, cookie, None, self.read(length))

    def reply(self, offset: int = 0, length: int = 0) -> Reply:
        """The next whole reply, which nothing may interrupt.

        ``offset`` and ``length`` are those of a READ; in simple mode ``length`` bytes are read if
        the reply says that there was no error.
        """
        if self.mode is Mode.SIMPLE:
            magic, error, cookie = struct.unpack(">IIQ", self.read(16))
            assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
            return Reply(cookie, error, self.read(0 if error else length), [], {})
        chunks = [self.read_chunk()]
        while not chunks[-1].done:
            chunks.append(self.read_chunk())
            assert chunks[-1].cookie == chunks[0].cookie
        return assemble(chunks, offset, length)

    def ask(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> Reply:
        """Send a request and read its reply."""
        sent = self.request(command, offset, length, flags=flags, payload=payload, cookie=cookie)
        reply = self.reply(offset, length if command == Cmd.READ else 0)
        assert reply.cookie == sent
        return reply

    def pread(self, offset: int, length: int) -> bytes:
        """A READ that succeeds."""
        reply = self.ask(Cmd.READ, offset, length)
        assert reply.error == 0, reply
        return reply.data

    def disconnect(self) -> None:
        """DISC: the server closes and says nothing."""
        self.request(Cmd.DISC)
        self.expect_disconnect()


def assemble(chunks: Sequence[ReplyChunk], offset: int, length: int) -> Reply:
    """What the chunks of one reply say, each held against the specification's layout.

    The content of a READ of ``length`` bytes at ``offset`` has to be there exactly once.
    """
    error = 0
    content = bytearray(length)
    missing = length
    status: dict[int, list[Extent]] = {}
    for chunk in chunks:
        payload = chunk.payload
        match chunk.type:
            case Chunk.NONE:
                assert chunk.done
                assert payload == b""
            case Chunk.OFFSET_DATA:
                start = int.from_bytes(payload[:8]) - offset
                assert len(payload) > 8
                assert 0 <= start <= length - len(payload[8:])
                content[start : start + len(payload) - 8] = payload[8:]
                missing -= len(payload) - 8
            case Chunk.OFFSET_HOLE:
                at, size = struct.unpack(">QI", payload)
                assert size
                assert 0 <= at - offset <= length - size
                missing -= size
            case Chunk.BLOCK_STATUS:
                assert chunk.offset is None
                status[int.from_bytes(payload[:4])] = [
                    Extent(*pair) for pair in struct.iter_unpack(">II", payload[4:])
                ]
            case Chunk.BLOCK_STATUS_EXT:
                assert chunk.offset is not None
                number, count = struct.unpack(">II", payload[:8])
                assert count == (len(payload) - 8) / 16
                status[number] = [Extent(*pair) for pair in struct.iter_unpack(">QQ", payload[8:])]
            case Chunk.ERROR | Chunk.ERROR_OFFSET:
                error, size = struct.unpack(">IH", payload[:6])
                assert error
                payload[6 : 6 + size].decode()
                assert len(payload) == 6 + size + (8 if chunk.type == Chunk.ERROR_OFFSET else 0)
            case _:
                raise AssertionError(f"a chunk of type {chunk.type}")
    assert missing == 0 or error or status, f"{missing} bytes of the READ are missing"
    return Reply(chunks[0].cookie, error, b"" if error else bytes(content), list(chunks), status)
