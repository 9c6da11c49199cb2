"""The client's negotiation: what it says to each kind of server, and what it does not accept.

The bytes are put together here from the specification ("Newstyle negotiation", "Fixed newstyle
negotiation", "Option types", "Option reply types"), not by the package.
"""

import struct
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.errors import OptionError, ProtocolError
from pynbd.protocol import handshake_client
from pynbd.protocol.handshake import (
    ExportInfo,
    Read,
    Session,
    StartTls,
    Step,
    Write,
    negotiate,
)
from pynbd.protocol.handshake_client import RemoteExport, enter, printable, survey
from pynbd.protocol.values import TransmissionFlag

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = range(8, 12)
ACK, SERVER, REP_INFO, META_CONTEXT = range(1, 5)
ERR_UNSUP, ERR_POLICY, ERR_INVALID, _, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = range(
    0x80000001, 0x80000008
)
MIB = 2**20

GREETING = b"NBDMAGICIHAVEOPT\0\3"
FLAGS = 0x050F


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


def name(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def info_export(size: int = MIB, flags: int = FLAGS) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


def block_size(minimum: int = 1, preferred: int = 4096, maximum: int = 32 * MIB) -> bytes:
    return struct.pack(">HIII", 3, minimum, preferred, maximum)


def infos(number: int, *data: bytes) -> bytes:
    return b"".join(reply(number, REP_INFO, each) for each in data) + reply(number, ACK)


def context(id_: int, text: bytes) -> bytes:
    return struct.pack(">I", id_) + text


def queries(export: bytes, *texts: bytes) -> bytes:
    return name(export) + struct.pack(">I", len(texts)) + b"".join(map(name, texts))


# NAME, DESCRIPTION and BLOCK_SIZE are what is asked for.
ASK = name(b"disk") + struct.pack(">HHHH", 3, 1, 2, 3)
EXTENDED = GREETING + reply(EXTENDED_HEADERS, ACK)
GONE = infos(GO, info_export())


def converse(
    steps: Generator[Step, bytes | None, Any], clear: bytes, through: bytes = b""
) -> tuple[Any, bytes, bytes]:
    """What comes of it, and what the client said in clear and through TLS. Nothing that is in
    clear is read once TLS has begun.
    """
    said, written, secure = clear, [b"", b""], False
    answer = None
    try:
        while True:
            step = steps.send(answer)
            answer = None
            if isinstance(step, Read):
                assert 0 < step.size <= len(said), "it waits for what does not come"
                answer, said = said[: step.size], said[step.size :]
            elif isinstance(step, StartTls):
                assert not secure
                said, secure = through, True
            else:
                assert isinstance(step, Write)
                written[secure] += step.data
    except StopIteration as end:
        assert not said, "it has not read all"
        return end.value, written[0], written[1]


def talk(steps: Generator[Step, bytes | None, Any], said: bytes) -> tuple[Any, bytes]:
    """What comes of a negotiation with a server that says this, and what the client said."""
    found, written, _ = converse(steps, said)
    return found, written


def test_extended_headers_contexts_and_go() -> None:
    said = EXTENDED + reply(SET_META, META_CONTEXT, context(7, b"base:allocation"))
    said += reply(SET_META, META_CONTEXT, context(2, b"qemu:dirty-bitmap:b")) + reply(SET_META, ACK)
    said += infos(
        GO, b"\0\1disk", b"\0\2a disk", block_size(512, 65536, MIB), info_export(), b"\0\x63what"
    )
    asked = ["base:allocation", "qemu:dirty-bitmap:b"]
    session, written = talk(enter("disk", asked), said)
    assert written == (
        b"\0\0\0\3"
        + option(EXTENDED_HEADERS)
        + option(SET_META, queries(b"disk", b"base:allocation", b"qemu:dirty-bitmap:b"))
        + option(GO, ASK)
    )
    assert session == Session(
        export=RemoteExport(
            name="disk",
            description="a disk",
            size=MIB,
            flags=TransmissionFlag(FLAGS),
            block_size=(512, 65536, MIB),
            contexts=("base:allocation", "qemu:dirty-bitmap:b"),
            constrained=True,
        ),
        flags=TransmissionFlag(FLAGS),
        structured=False,
        extended=True,
        contexts={7: "base:allocation", 2: "qemu:dirty-bitmap:b"},
    )


@pytest.mark.parametrize("error", [ERR_UNSUP, ERR_POLICY, ERR_INVALID])
def test_falls_back_to_structured_replies(error: int) -> None:
    said = GREETING + reply(EXTENDED_HEADERS, error) + reply(STRUCTURED_REPLY, ACK) + GONE
    session, written = talk(enter("disk"), said)
    assert (session.structured, session.extended) == (True, False)
    assert written.endswith(option(EXTENDED_HEADERS) + option(STRUCTURED_REPLY) + option(GO, ASK))
    assert session.export.block_size == (1, 4096, 32 * MIB)  # "Size constraints": the defaults
    assert not session.export.constrained


def test_falls_back_to_simple_replies_without_contexts() -> None:
    said = GREETING + reply(EXTENDED_HEADERS, ERR_UNSUP) + reply(STRUCTURED_REPLY, ERR_UNSUP) + GONE
    session, written = talk(enter("disk", ["base:allocation"]), said)
    assert (session.structured, session.extended, session.contexts) == (False, False, {})
    assert option(SET_META)[:12] not in written


def test_asks_for_less_if_less_is_wanted() -> None:
    session, written = talk(
        enter("disk", structured=False, extended=False), GREETING + infos(GO, info_export())
    )
    assert (session.structured, session.extended) == (False, False)
    assert written == b"\0\0\0\3" + option(GO, ASK)


@pytest.mark.parametrize("greeting,padding", [(b"\0\1", 124), (b"\0\3", 0)])
def test_falls_back_to_export_name(greeting: bytes, padding: int) -> None:
    said = GREETING[:-2] + greeting + reply(STRUCTURED_REPLY, ACK) + reply(GO, ERR_UNSUP)
    said += struct.pack(">QH", MIB, FLAGS) + bytes(padding)
    session, written = talk(enter("disk", extended=False), said)
    assert written[:4] == b"\0\0" + greeting
    assert written.endswith(option(EXPORT_NAME, b"disk"))
    assert (session.export.size, session.flags, session.structured) == (MIB, FLAGS, True)


def test_a_server_without_fixed_newstyle_hears_one_option() -> None:
    said = GREETING[:-2] + b"\0\0" + struct.pack(">QH", MIB, FLAGS) + bytes(124)
    session, written = talk(enter("disk", ["base:allocation"]), said)
    assert written == bytes(4) + option(EXPORT_NAME, b"disk")
    assert (session.structured, session.extended, session.contexts) == (False, False, {})


def test_a_query_that_ends_like_a_wildcard_is_resolved_by_the_list() -> None:
    """Also the name of a bitmap may end with a colon."""
    asked = (b"base:allocation", b"qemu:", b"qemu:dirty-bitmap:odd:")
    found = (b"base:allocation", b"qemu:allocation-depth", b"qemu:dirty-bitmap:odd:")
    listed = [reply(LIST_META, META_CONTEXT, context(0, each)) for each in found]
    chosen = [reply(SET_META, META_CONTEXT, context(n, each)) for n, each in enumerate(found)]
    said = EXTENDED + b"".join(listed) + reply(LIST_META, ACK)
    said += b"".join(chosen) + reply(SET_META, ACK) + GONE
    session, written = talk(enter("disk", [each.decode() for each in asked]), said)
    assert option(LIST_META, queries(b"disk", *asked)) in written
    assert option(SET_META, queries(b"disk", *found)) in written
    assert list(session.contexts.values()) == [each.decode() for each in found]


def test_a_server_that_does_not_know_contexts_selects_none() -> None:
    said = EXTENDED + reply(SET_META, ERR_UNSUP) + GONE
    session, _ = talk(enter("disk", ["base:allocation"]), said)
    assert session.contexts == {}


def test_a_listing() -> None:
    said = EXTENDED + reply(LIST, SERVER, name(b"a") + b"first") + reply(LIST, SERVER, name(b""))
    said += reply(LIST, ACK)
    said += infos(INFO, info_export(5), block_size())
    said += reply(LIST_META, META_CONTEXT, context(0, b"base:allocation")) + reply(LIST_META, ACK)
    said += infos(INFO, b"\0\1real", info_export(6), b"\0\2second") + reply(LIST_META, ERR_UNSUP)
    exports, written = talk(survey(), said)
    flags = TransmissionFlag(FLAGS)
    sizes = (1, 4096, 32 * MIB)
    assert exports == [
        RemoteExport("a", "first", 5, flags, sizes, ("base:allocation",), True),
        RemoteExport("real", "second", 6, flags, sizes, (), False),
    ]
    assert written == (
        b"\0\0\0\3"
        + option(EXTENDED_HEADERS)
        + option(LIST)
        + option(INFO, name(b"a") + struct.pack(">HHHH", 3, 1, 2, 3))
        + option(LIST_META, queries(b"a"))
        + option(INFO, name(b"") + struct.pack(">HHHH", 3, 1, 2, 3))
        + option(LIST_META, queries(b""))
    )


@pytest.mark.parametrize(
    "steps,said,text",
    [
        (
            enter,
            EXTENDED + reply(GO, ERR_UNKNOWN, "no “disk”\n\x1b[2J".encode()),
            "NBD_OPT_GO: NBD_REP_ERR_UNKNOWN: no “disk”  [2J",
        ),
        (
            enter,
            GREETING + reply(EXTENDED_HEADERS, ERR_TLS_REQD),
            "NBD_OPT_EXTENDED_HEADERS: NBD_REP_ERR_TLS_REQD",
        ),
        (enter, EXTENDED + reply(GO, ERR_UNSUP), "NBD_OPT_GO: NBD_REP_ERR_UNSUP"),
        (enter, EXTENDED + reply(GO, 0x80001234, b"so"), "NBD_OPT_GO: 0x80001234: so"),
        (
            lambda _: survey(),
            EXTENDED + reply(LIST, ERR_POLICY, b"it is a secret"),
            "NBD_OPT_LIST: NBD_REP_ERR_POLICY: it is a secret",
        ),
        (
            lambda _: survey(),
            GREETING[:-2] + b"\0\0",
            "the server is too old for NBD_OPT_LIST",
        ),
    ],
)
def test_a_refusal(steps: Callable[[str], Any], said: bytes, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        talk(steps("disk"), said)
    assert str(caught.value) == text


BASE = context(1, b"base:allocation")


@pytest.mark.parametrize(
    "said,text",
    [
        (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(2), "oldstyle"),
        (b"SSH-2.0-OpenSSH_10.0p2", "wrong magic number"),
        (b"NBDMAGICIHAVEOPS\0\3", "wrong magic number"),
        (GREETING + b"\1" * 20, "wrong magic number"),
        (GREETING + reply(STRUCTURED_REPLY, ACK), "where NBD_OPT_EXTENDED_HEADERS was asked"),
        (GREETING + reply(EXTENDED_HEADERS, ACK, b"x"), "NBD_REP_ACK to .* with data"),
        (GREETING + reply(EXTENDED_HEADERS, REP_INFO, b"x"), "NBD_REP_INFO as a reply to"),
        (GREETING + reply(EXTENDED_HEADERS, 99), "0x63 as a reply to NBD_OPT_EXTENDED_HEADERS"),
        (EXTENDED + reply(SET_META, SERVER, name(b"")), "NBD_REP_SERVER as a reply to"),
        (
            EXTENDED + struct.pack(">QIII", 0x3E889045565A9, SET_META, META_CONTEXT, 2**31),
            "of 2147483648 bytes",
        ),
        (
            EXTENDED + reply(SET_META, META_CONTEXT, b"abc") + reply(SET_META, ACK),
            "malformed MetaContext",
        ),
        (
            EXTENDED + reply(SET_META, META_CONTEXT, context(1, b"x:y")) + reply(SET_META, ACK),
            "'x:y' was selected, but not asked for",
        ),
        (
            EXTENDED + 2 * reply(SET_META, META_CONTEXT, BASE) + reply(SET_META, ACK),
            "selected twice",
        ),
    ],
)
def test_a_breach(said: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        talk(enter("disk", ["base:allocation"]), said)


@pytest.mark.parametrize(
    "data,text",
    [
        ([], "0 times NBD_INFO_EXPORT"),
        ([info_export(), info_export()], "2 times NBD_INFO_EXPORT"),
        ([info_export(2**63)], "an export of 9223372036854775808 bytes"),
        ([info_export() + b"x"], "malformed InfoExport"),
        ([b"x"], "no information type"),
        ([info_export(), block_size(minimum=0)], "a minimum block size of 0"),
        ([info_export(), block_size(minimum=3)], "a minimum block size of 3"),
        ([info_export(), block_size(1 << 17, 1 << 17)], "a minimum block size of 131072"),
        ([info_export(), block_size(preferred=256)], "a preferred block size of 256"),
        ([info_export(), block_size(preferred=5000)], "a preferred block size of 5000"),
        ([info_export(), block_size(8192, 4096)], "a preferred block size of 4096"),
        ([info_export(), block_size(maximum=4095)], "a maximum payload of 4095"),
        ([info_export(), b"\0\1a\0b"], "a string contains NUL"),
        ([info_export(), b"\0\2" + b"x" * 4097], "longer than 4096 bytes"),
    ],
)
def test_information_that_cannot_be(data: list[bytes], text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        talk(enter("disk"), EXTENDED + infos(GO, *data))


def test_replies_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake_client, "_MOST_REPLIES", 10)
    with pytest.raises(ProtocolError, match="more than 10 replies to NBD_OPT_LIST"):
        talk(survey(), EXTENDED + 11 * reply(LIST, SERVER, name(b"")))


def test_long_replies_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept until the last one has come."""
    monkeypatch.setattr(handshake_client, "_LONGEST_REPLIES", 99)
    with pytest.raises(ProtocolError, match="more than 99 bytes of replies to NBD_OPT_LIST"):
        talk(survey(), EXTENDED + 5 * reply(LIST, SERVER, name(b"x" * 16)))


def test_both_sides_agree() -> None:
    """Our own server's negotiation and the client's, step by step."""
    flags = TransmissionFlag(FLAGS)
    disk = ExportInfo("disk", "a disk", MIB, flags, (1, 4096, 32 * MIB), ("base:allocation",))

    class Directory:
        stopping = False

        def find(self, _: str) -> ExportInfo:
            return disk

        def listing(self) -> list[ExportInfo]:
            return [disk]

    server, client = negotiate(Directory()), enter("disk", ["base:"])
    towards: dict[Any, bytes] = {server: b"", client: b""}
    steps: dict[Any, Step] = {server: next(server), client: next(client)}
    ended: dict[Any, Session] = {}
    while len(ended) < 2:
        for side, other in ((server, client), (client, server)):
            while side not in ended:
                step = steps[side]
                answer = None
                if isinstance(step, Write):
                    towards[other] += step.data
                elif len(towards[side]) < step.size:
                    break
                else:
                    answer, towards[side] = towards[side][: step.size], towards[side][step.size :]
                try:
                    steps[side] = side.send(answer)
                except StopIteration as end:
                    ended[side] = end.value
    ours, theirs = ended[server], ended[client]
    assert (theirs.flags, theirs.contexts, theirs.extended) == (ours.flags, ours.contexts, True)
    assert theirs.export.description == "a disk"


GOOD = EXTENDED + reply(SET_META, META_CONTEXT, BASE) + reply(SET_META, ACK)
GOOD += infos(GO, b"\0\1disk", b"\0\2a disk", block_size(), info_export())


@given(st.data())
def test_whatever_a_server_says(data: st.DataObject) -> None:
    """A good answer with some bytes changed, cut or doubled never surprises."""
    said = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(said) - 1))
        said[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    steps = enter("disk", ["base:allocation"])
    answer = None
    with suppress(ProtocolError, OptionError, StopIteration, EOFError):
        while True:
            step = steps.send(answer)
            answer = None
            if isinstance(step, Read):
                assert step.size <= 1 << 16
                answer, said = bytes(said[: step.size]), said[step.size :]
                if len(answer) < step.size:
                    raise EOFError


def test_printable() -> None:
    assert printable(" ä\tb\r\n\0\x1b[31m ") == "ä b    [31m"
