"""What a server says to our client until transmission ("Newstyle negotiation", "Fixed newstyle
negotiation" and "Option reply types" of the NBD specification).

The first byte of an input says what the client wants; the rest is the server's stream.

Allowed: `OptionError`, the server's refusal, and `ProtocolError`, its violation of the
specification. No step reads more than the longest reply, nor in all more than was received; what is
said to people is one line; what comes out has the sizes that the specification allows.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Any

from pynbd.errors import OptionError, ProtocolError
from pynbd.protocol.handshake import ExportInfo, Read, Session, Write, negotiate
from pynbd.protocol.handshake_client import RemoteExport, enter, survey
from pynbd.protocol.values import TransmissionFlag
from tests.client.playing import (
    ACK,
    ERR_UNSUP,
    EXTENDED_HEADERS,
    GO,
    INFO,
    LIST,
    LIST_META,
    META_CONTEXT,
    REP_INFO,
    SERVER,
    SET_META,
    STRUCTURED_REPLY,
    reply,
)

ALLOWED = (OptionError, ProtocolError)
MAX_LEN = 8192
DICTIONARY = (
    *(struct.pack(">Q", 0x3E889045565A9), b"NBDMAGIC", b"IHAVEOPT", b"base:allocation"),
    *(struct.pack(">I", number) for number in (*range(1, 12), *range(0x80000001, 0x8000000B))),
    *(struct.pack(">HQH", 0, 1 << 63, 1), struct.pack(">HIII", 3, 1, 4096, 1 << 25)),
)
_CONTEXTS = ("base:allocation", "qemu:", "qemu:dirty-bitmap:b")
_GREETING = b"NBDMAGICIHAVEOPT\0\3"
_LONGEST_READ = 1 << 16


def seeds() -> Iterable[bytes]:
    """For each of the settings below, what a good server says; and a few that are less so."""
    go = reply(GO, REP_INFO, struct.pack(">HQH", 0, 1 << 20, 1))
    go += reply(GO, REP_INFO, struct.pack(">HIII", 3, 1, 4096, 1 << 25))
    go += reply(GO, REP_INFO, b"\0\1name") + reply(GO, REP_INFO, b"\0\2text") + reply(GO, ACK)
    context = reply(SET_META, META_CONTEXT, struct.pack(">I", 7) + b"base:allocation")
    listed = reply(LIST_META, META_CONTEXT, struct.pack(">I", 0) + b"qemu:allocation-depth")
    metas = listed + reply(LIST_META, ACK) + context + reply(SET_META, ACK)
    extended, structured = reply(EXTENDED_HEADERS, ACK), reply(STRUCTURED_REPLY, ACK)
    yield b"\x00" + _GREETING + go
    yield b"\x03" + _GREETING + extended + go
    for sizes in (
        (3, 4096, 1 << 25),
        (1, 256, 1 << 25),
        (1, 4096, 4095),
        (1 << 17, 1 << 17, 1 << 25),
    ):
        odd = struct.pack(">HIII", 3, *sizes)
        yield b"\x00" + _GREETING + go.replace(struct.pack(">HIII", 3, 1, 4096, 1 << 25), odd)
    yield b"\x03" + _GREETING + reply(EXTENDED_HEADERS, ERR_UNSUP, b"why") + structured + go
    yield b"\x07" + _GREETING + extended + metas + go
    yield b"\x05" + _GREETING + structured + metas + go
    yield b"\x05" + _GREETING + structured + metas.replace(b"base:", b"else:") + go
    yield b"\x00" + _GREETING + reply(GO, ERR_UNSUP) + struct.pack(">QH", 1 << 20, 1)
    yield b"\x00NBDMAGICIHAVEOPT\0\0" + struct.pack(">QH", 1 << 20, 1) + bytes(124)
    yield b"\x00NBDMAGIC" + (0x420281861253).to_bytes(8, "big") + bytes(136)
    server = reply(LIST, SERVER, struct.pack(">I", 4) + b"diskits text") + reply(LIST, ACK)
    info = go.replace(struct.pack(">II", GO, REP_INFO), struct.pack(">II", INFO, REP_INFO))
    info = info[:-20] + reply(INFO, ACK)
    yield b"\x0b" + _GREETING + extended + server + info + listed + reply(LIST_META, ACK)
    yield b"\x00" + _GREETING + reply(GO, 0x80000006, b"\x1b[2Jno\nsuch \xff export")
    yield from (bytes([wanted]) + _from_our_server(wanted) for wanted in (0, 1, 3, 5, 7, 8, 11))


def one_input(data: bytes) -> None:
    wanted, stream = data[0] if data else 0, data[1:]
    steps = _client(wanted)
    at, brought = 0, None
    try:
        while True:
            step = steps.send(brought)
            brought = None
            if isinstance(step, Write):
                _look_at(step.data)
                continue
            assert isinstance(step, Read), "a client skips nothing"
            assert 1 <= step.size <= _LONGEST_READ
            brought = stream[at : at + step.size]
            at += step.size
            if at > len(stream):
                break
    except StopIteration as stop:
        for export in stop.value if wanted & 8 else [stop.value.export]:
            _judge(export)
        if not wanted & 8:
            _judge_session(stop.value, wanted)


def _client(wanted: int) -> Generator[Any, bytes | None, Any]:
    dialects = {"structured": bool(wanted & 1), "extended": bool(wanted & 2)}
    if wanted & 8:
        return survey(**dialects)
    return enter("disk", _CONTEXTS if wanted & 4 else (), **dialects)


def _from_our_server(wanted: int) -> bytes:
    """All that it says to our client."""
    client, server = _client(wanted), negotiate(_Exports())
    said, heard, at, taken = b"", b"", 0, 0
    with suppress(StopIteration):
        step, answer = next(client), next(server)
        while True:
            if isinstance(answer, Write):
                said += answer.data
                answer = server.send(None)
            elif isinstance(step, Write):
                heard += step.data
                step = client.send(None)
            elif at + step.size <= len(said):
                at += step.size
                step = client.send(said[at - step.size : at])
            else:
                taken += answer.size
                answer = server.send(heard[taken - answer.size : taken])
    return said


class _Exports:
    """Those of a server that has one."""

    stopping = False
    only = ExportInfo(
        "disk", "text", 1 << 20, TransmissionFlag.HAS_FLAGS, (1, 4096, 1 << 25), _CONTEXTS[::2]
    )

    def find(self, name: str) -> ExportInfo:
        return self.only

    def listing(self) -> Iterable[ExportInfo]:
        return [self.only]


def _look_at(said: bytes) -> None:
    """What a client says is its flags, or one whole option."""
    if len(said) == 4:
        assert int.from_bytes(said) <= 3
    else:
        magic, _, length = struct.unpack_from(">8sII", said)
        assert (magic, length) == (b"IHAVEOPT", len(said) - 16)


def _judge(export: RemoteExport) -> None:
    assert 0 <= export.size < 1 << 63
    minimum, preferred, maximum = export.block_size
    assert minimum.bit_count() == preferred.bit_count() == 1
    assert minimum <= 1 << 16
    assert max(512, minimum) <= preferred <= maximum
    texts = (export.name, export.description, *export.contexts)
    assert max(len(text.encode("utf-8", "surrogateescape")) for text in texts) <= 4096
    assert not any("\0" in text for text in texts)


def _judge_session(session: Session, wanted: int) -> None:
    assert session.structured <= bool(wanted & 1)
    assert session.extended <= bool(wanted & 2)
    assert not (session.structured and session.extended)
    assert not session.contexts or (wanted & 4 and (session.structured or session.extended))
    assert len(set(session.contexts.values())) == len(session.contexts)
    for name in session.contexts.values():
        assert name in _CONTEXTS or name.startswith("qemu:")
