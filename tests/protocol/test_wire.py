"""Golden bytes, written by hand from the specification, for every message.

"Newstyle negotiation", "Option types", "Option reply types" for the handshake; "Request message",
"Simple reply message", "Structured reply chunk message", "Extended reply chunk message" and
"Structured reply types" for transmission.
"""

import struct

import pytest
from construct import Const, Construct, Int16ub, Int32ub, Int64ub, Sequence
from hypothesis import example, given
from hypothesis import strategies as st

from pynbd.errors import OptionError, ProtocolError
from pynbd.protocol import wire
from pynbd.protocol.values import (
    ClientFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

h = bytes.fromhex
OPTION = h("49484156454f5054")
REPLY = h("0003e889045565a9")

GOLDEN: list[tuple[wire.Message, bytes]] = [
    (
        wire.Greeting(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES),
        b"NBDMAGICIHAVEOPT\0\3",
    ),
    (wire.ClientFlags(ClientFlag.NO_ZEROES), h("00000002")),
    (wire.OptionHeader(Option.GO, 258), OPTION + h("00000007 00000102")),
    (wire.OptionHeader(Option(0xFFFFFFFF), 0), OPTION + h("ffffffff 00000000")),
    (
        wire.OptionReplyHeader(Option.LIST, OptionReply.ERR_POLICY, 5),
        REPLY + h("00000003 80000002 00000005"),
    ),
    (
        wire.ExportNameReply(2**63 - 1, TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_CACHE),
        h("7fffffffffffffff 0401"),
    ),
    (wire.ExportNameData(""), b""),
    (wire.ExportNameData("disk"), b"disk"),
    (wire.InfoData("", ()), h("00000000 0000")),
    (wire.InfoData("é", (3, 77)), h("00000002 c3a9 0002 0003 004d")),
    (wire.MetaContextData("", ()), h("00000000 00000000")),
    (
        wire.MetaContextData("x", ("base:", "", "\udcff")),
        h("00000001") + b"x" + h("00000003 00000005") + b"base:" + h("00000000 00000001 ff"),
    ),
    (wire.Server("d", "a disk"), h("00000001") + b"da disk"),
    (wire.Server("", ""), h("00000000")),
    (wire.MetaContext(2, "base:allocation"), h("00000002") + b"base:allocation"),
    (wire.ErrorText("no such export"), b"no such export"),
    (
        wire.InfoExport(0x10000, TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_DF),
        h("0000 0000000000010000 0081"),
    ),
    (wire.InfoName("d"), h("0001") + b"d"),
    (wire.InfoDescription("text"), h("0002") + b"text"),
    (wire.InfoBlockSize(1, 4096, 33554432), h("0003 00000001 00001000 02000000")),
]
FIXED = [
    (message, data)
    for message, data in GOLDEN
    if isinstance(
        message,
        wire.Greeting
        | wire.ClientFlags
        | wire.OptionHeader
        | wire.OptionReplyHeader
        | wire.ExportNameReply
        | wire.InfoData
        | wire.MetaContextData
        | wire.InfoExport
        | wire.InfoBlockSize,
    )
]


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, wire.Message) else ""


def refusal(message: wire.Message) -> type[Exception]:
    return OptionError if isinstance(message, wire.OptionData) else ProtocolError


@pytest.mark.parametrize("message, data", GOLDEN, ids=name)
def test_build_and_parse(message: wire.Message, data: bytes) -> None:
    assert message.build() == data
    assert type(message).parse(data) == message


@pytest.mark.parametrize("message, data", FIXED, ids=name)
def test_cut_short_at_every_byte_or_followed_by_one_more(
    message: wire.Message, data: bytes
) -> None:
    for end in range(len(data)):
        with pytest.raises(refusal(message)):
            type(message).parse(data[:end])
    with pytest.raises(refusal(message)):
        type(message).parse(data + b"\0")


@pytest.mark.parametrize("message", [wire.Greeting, wire.OptionHeader, wire.OptionReplyHeader])
def test_wrong_magic(message: type[wire.Message]) -> None:
    with pytest.raises(ProtocolError, match="wrong magic number"):
        message.parse(bytes(20))


def test_an_option_reply_is_header_and_data() -> None:
    assert wire.option_reply(Option.LIST, OptionReply.SERVER, b"data") == (
        REPLY + h("00000003 00000002 00000004") + b"data"
    )
    assert wire.option_reply(Option.LIST, OptionReply.ACK) == REPLY + h(
        "00000003 00000001 00000000"
    )


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "shorter"),
        (h("00000000 00"), "does not match"),  # O14: fewer than six bytes
        (h("00000009 78 0000"), "shorter"),  # O15: name longer than what is left
        (h("ffffffff 78 0000"), "shorter"),  # O16: the same, absurdly
        (h("00000002 7800 0000"), "NUL"),  # O20
        (h("00001001") + b"n" * 4097 + h("0000"), "longer than 4096"),  # O17
        (h("00000001 78 0002 0001"), "does not match"),  # O22: more requests than data
        (h("00000001 78 0001 0001 00"), "does not match"),  # O23: trailing bytes
    ],
)
def test_malformed_info_data(data: bytes, reason: str) -> None:
    with pytest.raises(OptionError, match=reason) as caught:
        wire.InfoData.parse(data)
    assert caught.value.reply == OptionReply.ERR_INVALID


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "shorter"),  # M22
        (h("000000"), "shorter"),
        (h("00000000"), "fewer queries"),
        (h("00000000 00000001"), "fewer queries"),  # M21
        (h("00000000 ffffffff 00000000"), "fewer queries"),
        (h("00000000 00000001 00000002 62"), "runs past the end"),
        (h("00000000 00000001 ffffffff 62"), "runs past the end"),
        (h("00000000 00000001 00000002 6200"), "NUL"),  # M20
        (h("00000000 00000001 00000001 62 00"), "follow the last query"),  # M23
        (h("00000000 00000000") + OPTION + h("00000003 00000000"), "follow the last query"),
    ],
)
def test_malformed_meta_context_data(data: bytes, reason: str) -> None:
    with pytest.raises(OptionError, match=reason) as caught:
        wire.MetaContextData.parse(data)
    assert caught.value.reply == OptionReply.ERR_INVALID


def test_a_query_may_be_longer_than_a_string() -> None:  # M19
    queries = ("q" * 4097, "base:allocation")
    data = wire.MetaContextData("", queries).build()
    assert wire.MetaContextData.parse(data).queries == queries


def test_information_by_its_type() -> None:
    assert wire.parse_info(h("0001 78")) == wire.InfoName("x")
    assert wire.parse_info(wire.InfoBlockSize(1, 2, 3).build()) == wire.InfoBlockSize(1, 2, 3)
    assert wire.parse_info(h("004d 0102")) is None
    with pytest.raises(ProtocolError):
        wire.parse_info(h("00"))
    with pytest.raises(ProtocolError):
        wire.parse_info(int(Info.EXPORT).to_bytes(2, "big"))


def test_an_error_text_is_cut_between_characters() -> None:  # H19, O18
    assert wire.encode_message("x" * 5000) == b"x" * 900
    assert wire.encode_message("x" + "é" * 5000) == b"x" + "é".encode() * 449
    assert wire.encode_message("\udcff") == b"?"
    assert wire.ErrorText.parse(b"\xff").message == "\N{REPLACEMENT CHARACTER}"


def test_a_quotation_is_short_and_printable() -> None:
    assert wire.quote("disk") == "'disk'"
    assert wire.quote("x" * 81) == "'" + "x" * 80 + "'..."
    assert wire.quote("\n\udcff\x00") == r"'\n\udcff\x00'"


@pytest.mark.parametrize("message", sorted({type(m) for m, _ in GOLDEN}, key=str))
def test_garbage_is_refused_or_parsed(message: type[wire.Message]) -> None:
    @given(st.binary(max_size=64))
    @example(b"\xff" * 32)
    def check(data: bytes) -> None:
        try:
            parsed = message.parse(data)
        except (OptionError, ProtocolError):
            return
        if message is not wire.ErrorText:
            assert parsed.build() == data

    check()


# The fixed headers: struct builds what construct declares and what the specification shows. -------

FF = 0xFFFFFFFFFFFFFFFF
HEADERS: dict[str, tuple[struct.Struct, Construct, tuple[int, ...], str]] = {
    "compact request": (
        wire.COMPACT_REQUEST,
        Sequence(Const(0x25609513, Int32ub), Int16ub, Int16ub, Int64ub, Int64ub, Int32ub),
        (0x25609513, 1, 6, 0x0102030405060708, 0x1000, 0x200),
        "25609513 0001 0006 0102030405060708 0000000000001000 00000200",
    ),
    "extended request": (
        wire.EXTENDED_REQUEST,
        Sequence(Const(0x21E41C71, Int32ub), Int16ub, Int16ub, Int64ub, Int64ub, Int64ub),
        (0x21E41C71, 0x20, 7, FF, 0x1000, 12),
        "21e41c71 0020 0007 ffffffffffffffff 0000000000001000 000000000000000c",
    ),
    "simple reply": (
        wire.SIMPLE_REPLY,
        Sequence(Const(0x67446698, Int32ub), Int32ub, Int64ub),
        (0x67446698, 22, 3),
        "67446698 00000016 0000000000000003",
    ),
    "structured chunk": (
        wire.STRUCTURED_CHUNK,
        Sequence(Const(0x668E33EF, Int32ub), Int16ub, Int16ub, Int64ub, Int32ub),
        (0x668E33EF, 1, 0x8001, 3, 6),
        "668e33ef 0001 8001 0000000000000003 00000006",
    ),
    "extended chunk": (
        wire.EXTENDED_CHUNK,
        Sequence(Const(0x6E8A278C, Int32ub), Int16ub, Int16ub, Int64ub, Int64ub, Int64ub),
        (0x6E8A278C, 1, 0, 3, 0x1000, 0),
        "6e8a278c 0001 0000 0000000000000003 0000000000001000 0000000000000000",
    ),
    "structured data": (
        wire.STRUCTURED_DATA,
        Sequence(Const(0x668E33EF, Int32ub), Int16ub, Int16ub, Int64ub, Int32ub, Int64ub),
        (0x668E33EF, 0, 1, 3, 520, 0x1000),
        "668e33ef 0000 0001 0000000000000003 00000208 0000000000001000",
    ),
    "extended data": (
        wire.EXTENDED_DATA,
        Sequence(Const(0x6E8A278C, Int32ub), Int16ub, Int16ub, Int64ub, Int64ub, Int64ub, Int64ub),
        (0x6E8A278C, 0, 1, 3, 0x1000, 520, 0x1200),
        "6e8a278c 0000 0001 0000000000000003 0000000000001000 0000000000000208 0000000000001200",
    ),
    "offset data": (wire.OFFSET_DATA, Sequence(Int64ub), (0x1200,), "0000000000001200"),
    "offset hole": (
        wire.OFFSET_HOLE,
        Sequence(Int64ub, Int32ub),
        (0x1200, 0x200),
        "0000000000001200 00000200",
    ),
    "error payload": (wire.ERROR_PAYLOAD, Sequence(Int32ub, Int16ub), (5, 2), "00000005 0002"),
    "error offset": (wire.ERROR_OFFSET, Sequence(Int64ub), (0x1200,), "0000000000001200"),
    "block status": (wire.BLOCK_STATUS, Sequence(Int32ub), (2,), "00000002"),
    "extended block status": (
        wire.BLOCK_STATUS_EXT,
        Sequence(Int32ub, Int32ub),
        (2, 1),
        "00000002 00000001",
    ),
    "descriptor": (
        wire.DESCRIPTOR,
        Sequence(Int32ub, Int32ub),
        (0x10000, 3),
        "00010000 00000003",
    ),
    "extended descriptor": (
        wire.DESCRIPTOR_EXT,
        Sequence(Int64ub, Int64ub),
        (0x1_0000_0000, 3),
        "0000000100000000 0000000000000003",
    ),
}


@pytest.mark.parametrize("header", HEADERS)
def test_fixed_headers(header: str) -> None:
    packed, declared, fields, golden = HEADERS[header]
    assert packed.pack(*fields) == h(golden)
    assert declared.build(fields) == h(golden)
    assert packed.unpack(h(golden)) == fields == tuple(declared.parse(h(golden)))


def test_sizes_that_the_specification_states() -> None:
    assert wire.COMPACT_REQUEST.size == 28
    assert wire.EXTENDED_REQUEST.size == wire.EXTENDED_CHUNK.size == 32
    assert wire.SIMPLE_REPLY.size == 16
    assert wire.STRUCTURED_CHUNK.size == 20
