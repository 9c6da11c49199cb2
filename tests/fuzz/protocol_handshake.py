"""What a client says to a server, from its flags to transmission ("Newstyle negotiation", "Fixed
newstyle negotiation" and "Option types" of the NBD specification).

The first byte of an input says what the server supports; the rest is the client's stream, through
TLS from where that begins.

Allowed: `ProtocolError`, a hard disconnect, where the specification leaves no other answer; here
these cases are told apart once more, from the bytes alone. Before it every option has exactly one
final reply, in order, and no step asks for a byte past the message that is being read. TLS is only
required where the specification allows to say so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import (
    ExportInfo,
    Read,
    Session,
    Skip,
    StartTls,
    TlsMode,
    Write,
    negotiate,
)
from pynbd.protocol.values import TransmissionFlag
from tests.conformance.client import (
    IHAVEOPT,
    MAX_PAYLOAD,
    NBDMAGIC,
    OPTION_REPLY_MAGIC,
    Mode,
    Option,
    Rep,
    client_flags,
    info_data,
    meta_data,
    opening,
    option,
)

ALLOWED = (ProtocolError,)
MAX_LEN = 4096
DICTIONARY = (
    *(IHAVEOPT, b"disk", b"base:allocation", b"qemu:", b"qemu:dirty-bitmap:", b"base:"),
    *(struct.pack(">I", number) for number in (1, 3, 7, 10, 32 << 20, (32 << 20) + 1, 1 << 17)),
)
_NAMES = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b:")
_FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
_EXPORTS = {
    name: ExportInfo(name, text, size, _FLAGS, (1, 4096, 32 << 20), contexts)
    for name, text, size, contexts in (
        ("disk", "a description", 1 << 20, _NAMES),
        ("é" * 2048, "", 2**63 - 1, _NAMES[:1]),
        ("\udcff", "", 0, ()),
    )
}
_FINDABLE = [name for name in _EXPORTS if name.isprintable()]  # the other is no UTF-8
_MODES = (TlsMode.NOTLS, TlsMode.FORCEDTLS, TlsMode.SELECTIVETLS, TlsMode.NOTLS)
# Of bytes that are kept: the longest data that an option is asked for.
_LONGEST_READ = 4 + 4096 + 2 + 2 * 65535


class _Exports:
    """The default export is "disk"."""

    def __init__(self, *, stopping: bool, listed: bool) -> None:
        self.stopping = stopping
        self._listed = listed

    def find(self, name: str) -> ExportInfo | None:
        return _EXPORTS.get(name or "disk")

    def listing(self) -> Iterable[ExportInfo] | None:
        return _EXPORTS.values() if self._listed else None


def seeds() -> Iterable[bytes]:
    every = client_flags(3)
    for code in (Option.STARTTLS, Option.LIST, Option.PEEK_EXPORT, 99):
        every += option(code) + option(code, b"data")
    every += option(Option.STRUCTURED_REPLY) + option(Option.EXTENDED_HEADERS)
    every += option(Option.LIST_META_CONTEXT, meta_data("disk", []))
    every += option(Option.SET_META_CONTEXT, meta_data("disk", _NAMES))
    every += option(Option.INFO, info_data("nobody", [0, 1, 2, 3]))
    for mode in Mode:
        yield b"\x0b" + opening(mode, contexts=_NAMES if mode is not Mode.SIMPLE else ())
    yield b"\x0b" + every + option(Option.GO, info_data("disk", [3, 1]))
    yield b"\x0b" + every + option(Option.ABORT, b"bye")
    yield b"\x0f" + every
    start = client_flags(3) + option(Option.STRUCTURED_REPLY) + option(Option.STARTTLS)
    for mode in (b"\x1b", b"\x2b"):
        yield mode + every + option(Option.GO, info_data("disk", [3, 1]))
        yield mode + client_flags(3) + option(Option.STARTTLS) + every[4:]
        yield mode + start + opening(Mode.EXTENDED, contexts=_NAMES)[4:]
        yield mode + start + option(Option.EXPORT_NAME, b"disk")
        yield mode + client_flags(3) + option(Option.EXPORT_NAME, b"disk")
        yield mode + start + option(Option.ABORT)
    other = option(Option.GO, info_data("é" * 2048))
    yield (
        b"\x0b" + opening(Mode.EXTENDED, contexts=_NAMES)[: -len(option(7, info_data("")))] + other
    )
    for wanted in (0, 1, 2, 3):
        yield b"\x0b" + client_flags(wanted) + option(Option.EXPORT_NAME, b"disk")
    yield b"\x0b" + client_flags(3) + option(Option.INFO, bytes(200_000))
    yield b"\x0b" + client_flags(3) + IHAVEOPT + struct.pack(">II", 6, 32 << 20)
    yield b"\x0b" + client_flags(3) + IHAVEOPT + struct.pack(">II", 6, (32 << 20) + 1)


def one_input(data: bytes) -> None:
    settings, stream = data[0] if data else 0, data[1:]
    exports = _Exports(stopping=bool(settings & 4), listed=bool(settings & 8))
    mode = _MODES[settings >> 4 & 3]
    steps = negotiate(exports, structured=bool(settings & 1), extended=bool(settings & 2), tls=mode)
    messages = _Messages(stream, mode)
    at, said, brought = 0, bytearray(), None
    session: Session | None = None
    violation: ProtocolError | None = None
    try:
        while True:
            step = steps.send(brought)
            brought = None
            if isinstance(step, Write):
                said += step.data
                continue
            if isinstance(step, StartTls):
                assert mode is not TlsMode.NOTLS
                assert messages.secure_from > at, "TLS in TLS"
                messages.secure_from = at
                continue
            assert at + step.size <= messages.end_of(at), "a byte past the message"
            if at + step.size > len(stream):
                break
            if isinstance(step, Read):
                assert 1 <= step.size <= _LONGEST_READ
                brought = stream[at : at + step.size]
            else:
                assert isinstance(step, Skip)
                assert 1 <= step.size <= MAX_PAYLOAD
            at += step.size
    except StopIteration as stop:
        session = stop.value
    except ProtocolError as error:
        violation = error
    _judge(messages, bytes(said), at, session, disconnected=violation is not None)
    if violation:
        assert _is_hopeless(messages, at, exports), "the specification has an answer to this"
        raise violation


class _Option(NamedTuple):
    """``start`` and ``end`` of its data in the stream, in which they need not all be."""

    magic: bytes
    code: int
    start: int
    end: int


class _Messages:
    """The stream, parted as the specification has it; ``secure_from`` is where TLS begins."""

    def __init__(self, stream: bytes, mode: TlsMode) -> None:
        self.stream = stream
        self.mode = mode
        self.secure_from = len(stream) + 1
        self.flags = int.from_bytes(stream[:4])
        self.options: list[_Option] = []
        at = 4
        while at + 16 <= len(stream):
            magic, code, length = struct.unpack_from(">8sII", stream, at)
            self.options.append(_Option(magic, code, at + 16, at + 16 + length))
            at += 16 + length

    def end_of(self, at: int) -> int:
        """How far may be read at ``at``: a header, which tells the length of the data, or these."""
        last = 0
        for start, end in ((4, 4), *((told.start, told.end) for told in self.options)):
            if at < start:
                return start
            if at < end:
                return end
            last = end
        return last + 16


def _judge(
    messages: _Messages, said: bytes, at: int, session: Session | None, *, disconnected: bool
) -> None:
    assert said[:18] == NBDMAGIC + IHAVEOPT + b"\0\3"
    rest = said[18:]
    if disconnected:
        answered = [told for told in messages.options if told.start <= at][:-1]
    else:
        answered = [told for told in messages.options if told.end <= at]
    by_name = bool(session) and answered[-1].code == Option.EXPORT_NAME
    for told in answered[: -1 if by_name else None]:
        rest = _replies(rest, told.code, may_require_tls=_may_require_tls(messages, told))
    if session:
        assert answered[-1].code in (Option.EXPORT_NAME, Option.GO)
        assert session.contexts.items() <= dict(enumerate(session.export.contexts)).items()
        assert not session.contexts or session.structured or session.extended
    if session and by_name:
        assert rest[:10] == struct.pack(">QH", session.export.size, session.flags)
        assert rest[10:] == bytes(0 if messages.flags & 2 else 124)
    else:
        assert rest == b""


def _may_require_tls(messages: _Messages, told: _Option) -> bool:
    """Whether the specification allows to answer an option with NBD_REP_ERR_TLS_REQD."""
    if told.start > messages.secure_from or messages.mode is TlsMode.NOTLS:
        return False
    return messages.mode is TlsMode.FORCEDTLS or told.code in (Option.INFO, Option.GO)


def _replies(said: bytes, code: int, *, may_require_tls: bool) -> bytes:
    """What follows the replies to one option, of which exactly the last is final."""
    while True:
        magic, to, kind, length = struct.unpack_from(">QIII", said)
        assert (magic, to) == (OPTION_REPLY_MAGIC, code)
        payload, said = said[20 : 20 + length], said[20 + length :]
        assert len(payload) == length
        assert kind != Rep.ERR_TLS_REQD or may_require_tls
        if kind & 1 << 31:
            assert length <= 900
            payload.decode()
            return said
        if kind == Rep.ACK:
            assert not payload
            return said


def _is_hopeless(messages: _Messages, at: int, exports: _Exports) -> bool:
    """Whether the flags, or else the last option whose header was read, have to end the session."""
    if messages.flags & ~3:
        return True
    *before, fatal = (told for told in messages.options if told.start <= at)
    length = fatal.end - fatal.start
    if fatal.magic != IHAVEOPT or length > MAX_PAYLOAD:
        return True
    if fatal.code != Option.EXPORT_NAME:
        return not messages.flags & 1
    secure = fatal.start > messages.secure_from
    if messages.mode is TlsMode.FORCEDTLS and not secure:
        return True
    name = messages.stream[fatal.start : fatal.end].decode("utf-8", "surrogateescape")
    extended = any(
        told.code == Option.EXTENDED_HEADERS and told.start == told.end
        for told in before
        if not secure or told.start > messages.secure_from  # all else is forgotten
    )
    return exports.stopping or extended or length > 4096 or name not in ("", *_FINDABLE)
