"""Sessions whose bytes are written from the NBD specification, and what is told of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.protocol.trace import Tracer
from pynbd.protocol.traced import Direction, Traced

Session = list[tuple[str, bytes]]

GREETING = b"NBDMAGICIHAVEOPT" + pack(">H", 3)
CLIENT_FLAGS = pack(">I", 3)
OPENING: Session = [("<", GREETING), (">", CLIENT_FLAGS)]
OPENED = [
    "< NBDMAGIC IHAVEOPT NBD_FLAG_FIXED_NEWSTYLE|NBD_FLAG_NO_ZEROES",
    "> client flags NBD_FLAG_C_FIXED_NEWSTYLE|NBD_FLAG_C_NO_ZEROES",
]
DONE = 1


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


def string(text: bytes) -> bytes:
    return pack(">I", len(text)) + text


def compact(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def extended(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)


def simple(cookie: int, error: int = 0) -> bytes:
    return pack(">IIQ", 0x67446698, error, cookie)


def structured_chunk(kind: int, cookie: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def extended_chunk(
    kind: int, cookie: int, offset: int, payload: bytes = b"", flags: int = 0
) -> bytes:
    return pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload)) + payload


def traced(session: Iterable[tuple[str, bytes]], piece: int = 1 << 20) -> list[Traced]:
    """What is told of a session that passes in pieces of so many bytes."""
    told: list[Traced] = []
    tracer = Tracer(told.append)
    for direction, data in session:
        for at in range(0, len(data), piece):
            tracer.passed(Direction(direction), data[at : at + piece])
    return told


def lines(session: Session) -> list[str]:
    """The same as text; it does not depend on how the bytes are cut."""
    told = list(map(str, traced(session)))
    for piece in (1, 3, 17):
        assert list(map(str, traced(session, piece))) == told
    return told


def check(session: Session, *expected: str) -> None:
    assert lines(OPENING + session) == OPENED + list(expected)


# Negotiation -------------------------------------------------------------------------------------


def test_go() -> None:
    check(
        [
            (">", option(8)),
            ("<", reply(8, 1)),
            (">", option(7, string(b"disk") + pack(">HHH", 2, 3, 9))),
            ("<", reply(7, 3, pack(">HQH", 0, 1 << 20, 0x83))),
            ("<", reply(7, 3, pack(">HIII", 3, 1, 4096, 1 << 25))),
            ("<", reply(7, 3, pack(">H", 2) + b"mine")),
            ("<", reply(7, 3, pack(">H", 1) + b"disk")),
            ("<", reply(7, 3, pack(">H", 77) + b"12345")),
            ("<", reply(7, 1)),
        ],
        "> NBD_OPT_STRUCTURED_REPLY",
        "< NBD_REP_ACK option NBD_OPT_STRUCTURED_REPLY",
        "> NBD_OPT_GO name 'disk' infos [NBD_INFO_BLOCK_SIZE; 0x9]",
        "< NBD_REP_INFO NBD_INFO_EXPORT option NBD_OPT_GO size 1048576"
        " flags NBD_FLAG_HAS_FLAGS|NBD_FLAG_READ_ONLY|NBD_FLAG_SEND_DF",
        "< NBD_REP_INFO NBD_INFO_BLOCK_SIZE option NBD_OPT_GO"
        " minimum 1 preferred 4096 maximum 33554432",
        "< NBD_REP_INFO NBD_INFO_DESCRIPTION option NBD_OPT_GO description 'mine'",
        "< NBD_REP_INFO NBD_INFO_NAME option NBD_OPT_GO name 'disk'",
        "< NBD_REP_INFO 0x4d option NBD_OPT_GO length 7",
        "< NBD_REP_ACK option NBD_OPT_GO",
    )


def test_refusals_and_what_nobody_knows() -> None:
    check(
        [
            (">", option(6, string(b"\xffz\n") + pack(">H", 0))),
            ("<", reply(6, 2**31 + 6, b"no such\nexport")),
            (">", option(99, b"what?")),
            ("<", reply(99, 2**31 + 1)),
            (">", option(3)),
            ("<", reply(3, 2, string(b"a") + b"the first")),
            ("<", reply(3, 1)),
            (">", option(2)),
            ("<", reply(2, 1)),
        ],
        r"> NBD_OPT_INFO name '\udcffz\n' infos []",
        r"< NBD_REP_ERR_UNKNOWN option NBD_OPT_INFO text 'no such\nexport'",
        "> 0x63 length 5",
        "< NBD_REP_ERR_UNSUP option 0x63",
        "> NBD_OPT_LIST",
        "< NBD_REP_SERVER option NBD_OPT_LIST name 'a' description 'the first'",
        "< NBD_REP_ACK option NBD_OPT_LIST",
        "> NBD_OPT_ABORT",
        "< NBD_REP_ACK option NBD_OPT_ABORT",
    )


def test_malformed_options_are_told_as_such() -> None:
    """And the messages after them are followed."""
    check(
        [
            (">", option(7, b"\0\0\0\x7fshort")),
            ("<", reply(7, 2**31 + 3, b"short")),
            (">", option(9, string(b"") + pack(">I", 5))),
            ("<", reply(9, 4, b"id")),
            ("<", reply(9, 3)),
        ],
        "> NBD_OPT_GO malformed 'it is shorter than its fields'",
        "< NBD_REP_ERR_INVALID option NBD_OPT_GO text 'short'",
        "> NBD_OPT_LIST_META_CONTEXT malformed 'there are fewer queries than announced'",
        "< NBD_REP_META_CONTEXT option NBD_OPT_LIST_META_CONTEXT"
        " malformed 'it is shorter than its fields'",
        "< NBD_REP_INFO option NBD_OPT_LIST_META_CONTEXT malformed 'no information type'",
    )


def test_long_option() -> None:
    """It is passed over, not kept; a long text is cut."""
    check(
        [(">", option(9, bytes(1 << 18))), (">", option(7, string(b"x" * 200) + bytes(2)))],
        "> NBD_OPT_LIST_META_CONTEXT length 262144",
        f"> NBD_OPT_GO name '{'x' * 80}'... infos []",
    )


@pytest.mark.parametrize("client_flags, padding", [(0, 124), (1, 124), (3, 0)])
def test_oldest_clients(client_flags: int, padding: int) -> None:
    """The reply to EXPORT_NAME has no magic; zeroes follow it unless that was negotiated."""
    session = [
        ("<", GREETING),
        (">", pack(">I", client_flags)),
        (">", option(1, b"old")),
        ("<", pack(">QH", 512, 1) + bytes(padding)),
        (">", compact(0, 7, 0, 512)),
        ("<", simple(7) + bytes(512)),
    ]
    assert lines(session)[2:] == [
        "> NBD_OPT_EXPORT_NAME name 'old'",
        "< reply to NBD_OPT_EXPORT_NAME size 512 flags NBD_FLAG_HAS_FLAGS",
        "> NBD_CMD_READ cookie 0x7 offset 0 length 512",
        "< simple reply cookie 0x7 length 512",
    ]


# Transmission ------------------------------------------------------------------------------------


def test_simple_replies() -> None:
    """Only the reply to a read that succeeded has data, in whatever order they come."""
    check(
        [
            (">", compact(0, 1, 512, 1024)),
            (">", compact(1, 2, 0, 3, flags=1) + b"abc"),
            (">", compact(0, 3, 1 << 40, 1024)),
            (">", compact(3, 4, 0, 0)),
            ("<", simple(3, 22)),
            ("<", simple(2)),
            ("<", simple(1) + b"\x67" * 1024),
            ("<", simple(4, 1234)),
            (">", compact(2, 5, 0, 0)),
        ],
        "> NBD_CMD_READ cookie 0x1 offset 512 length 1024",
        "> NBD_CMD_WRITE NBD_CMD_FLAG_FUA cookie 0x2 offset 0 length 3",
        "> NBD_CMD_READ cookie 0x3 offset 1099511627776 length 1024",
        "> NBD_CMD_FLUSH cookie 0x4 offset 0 length 0",
        "< simple reply cookie 0x3 error NBD_EINVAL",
        "< simple reply cookie 0x2",
        "< simple reply cookie 0x1 length 1024",
        "< simple reply cookie 0x4 error 0x4d2",
        "> NBD_CMD_DISC cookie 0x5 offset 0 length 0",
    )


def test_structured_replies() -> None:
    check(
        [
            (">", compact(0, 1, 0, 4096, flags=4)),
            ("<", structured_chunk(1, 1, pack(">Q", 0) + bytes(1024))),
            ("<", structured_chunk(2, 1, pack(">QI", 1024, 3072), DONE)),
            (">", compact(6, 2, 0, 512, flags=0x8012)),
            ("<", structured_chunk(0, 2, flags=DONE)),
            (">", compact(0, 3, 9, 9)),
            ("<", structured_chunk(2**15 + 1, 3, pack(">IH", 5, 4) + b"ouch")),
            ("<", structured_chunk(2**15 + 2, 3, pack(">IH", 5, 0) + pack(">Q", 11), DONE)),
            ("<", structured_chunk(2**15 + 9, 3, pack(">IH", 28, 0) + b"later", DONE)),
            ("<", structured_chunk(40, 3, b"news", DONE)),
        ],
        "> NBD_CMD_READ NBD_CMD_FLAG_DF cookie 0x1 offset 0 length 4096",
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x1 offset 0 length 1024",
        "< NBD_REPLY_TYPE_OFFSET_HOLE NBD_REPLY_FLAG_DONE cookie 0x1 offset 1024 length 3072",
        "> NBD_CMD_WRITE_ZEROES NBD_CMD_FLAG_NO_HOLE|NBD_CMD_FLAG_FAST_ZERO|0x8000"
        " cookie 0x2 offset 0 length 512",
        "< NBD_REPLY_TYPE_NONE NBD_REPLY_FLAG_DONE cookie 0x2",
        "> NBD_CMD_READ cookie 0x3 offset 9 length 9",
        "< NBD_REPLY_TYPE_ERROR cookie 0x3 error NBD_EIO text 'ouch'",
        "< NBD_REPLY_TYPE_ERROR_OFFSET NBD_REPLY_FLAG_DONE cookie 0x3 error NBD_EIO offset 11",
        "< 0x8009 NBD_REPLY_FLAG_DONE cookie 0x3 error NBD_ENOSPC",
        "< 0x28 NBD_REPLY_FLAG_DONE cookie 0x3 length 4",
    )


SET_CONTEXTS = option(
    10,
    string(b"disk") + pack(">I", 2) + string(b"base:allocation") + string(b"x" * 22),
)
SELECTED: Session = [
    (">", SET_CONTEXTS),
    ("<", reply(10, 4, pack(">I", 3) + b"base:allocation")),
    ("<", reply(10, 4, pack(">I", 5) + b"qemu:dirty-bitmap:b")),
    ("<", reply(10, 4, pack(">I", 8) + b"qemu:allocation-depth")),
    ("<", reply(10, 4, pack(">I", 9) + b"x:y")),
    ("<", reply(10, 1)),
]


def check_selected(session: Session, *expected: str) -> None:
    told = lines(OPENING + SELECTED + session)
    assert told[2:4] == [
        f"> NBD_OPT_SET_META_CONTEXT name 'disk' queries ['base:allocation'; '{'x' * 22}']",
        "< NBD_REP_META_CONTEXT option NBD_OPT_SET_META_CONTEXT id 3 name 'base:allocation'",
    ]
    assert told[8:] == list(expected)


def test_block_status() -> None:
    pairs = [(65536, 3), (512, 0), (512, 1), (512, 2), (9, 3), (9, 0)]
    base = b"".join(pack(">II", *pair) for pair in pairs)
    check_selected(
        [
            (">", compact(7, 1, 0, 1 << 20, flags=8)),
            ("<", structured_chunk(5, 1, pack(">I", 3) + base)),
            ("<", structured_chunk(5, 1, pack(">III", 5, 512, 1))),
            ("<", structured_chunk(5, 1, pack(">III", 8, 512, 2))),
            ("<", structured_chunk(5, 1, pack(">III", 9, 512, 0x21))),
            ("<", structured_chunk(5, 1, pack(">III", 4, 512, 0), DONE)),
        ],
        "> NBD_CMD_BLOCK_STATUS NBD_CMD_FLAG_REQ_ONE cookie 0x1 offset 0 length 1048576",
        "< NBD_REPLY_TYPE_BLOCK_STATUS cookie 0x1 context 'base:allocation'"
        " extents [65536 hole,zero; 512 data; 512 hole; 512 zero] more 2",
        "< NBD_REPLY_TYPE_BLOCK_STATUS cookie 0x1 context 'qemu:dirty-bitmap:b'"
        " extents [512 dirty]",
        "< NBD_REPLY_TYPE_BLOCK_STATUS cookie 0x1 context 'qemu:allocation-depth'"
        " extents [512 depth 2]",
        "< NBD_REPLY_TYPE_BLOCK_STATUS cookie 0x1 context 'x:y' extents [512 0x21]",
        "< NBD_REPLY_TYPE_BLOCK_STATUS NBD_REPLY_FLAG_DONE cookie 0x1 context 0x4"
        " extents [512 0x0]",
    )


def test_extended_headers() -> None:
    """The chunk repeats the offset of the request; it is told only if it does not."""
    payload = pack(">QII", 1 << 40, 3, 77)
    check_selected(
        [
            (">", extended(7, 1, 512, len(payload), flags=32) + payload),
            ("<", extended_chunk(6, 1, 512, pack(">IIQQ", 3, 1, 1 << 40, 3), DONE)),
            (">", extended(1, 2, 0, 4, flags=32) + b"data"),
            ("<", extended_chunk(0, 2, 0, flags=DONE)),
            (">", extended(0, 3, 1 << 33, 8)),
            ("<", extended_chunk(1, 3, 0, pack(">Q", 1 << 33) + bytes(8))),
            ("<", extended_chunk(0, 4, 0, flags=DONE)),
            (">", extended(3, 5, 0, 6, flags=32) + b"nobody"),
            (">", extended(6, 6, 0, 1 << 50)),
            (">", extended(7, 7, 0, 9, flags=32) + b"malformed"),
            ("<", extended_chunk(6, 7, 0, pack(">IIQQ", 3, 2, 1, 1), DONE)),
        ],
        "> NBD_CMD_BLOCK_STATUS NBD_CMD_FLAG_PAYLOAD_LEN cookie 0x1 offset 512 length 16"
        " effect 1099511627776 contexts ['base:allocation'; 0x4d]",
        "< NBD_REPLY_TYPE_BLOCK_STATUS_EXT NBD_REPLY_FLAG_DONE cookie 0x1"
        " context 'base:allocation' extents [1099511627776 hole,zero]",
        "> NBD_CMD_WRITE NBD_CMD_FLAG_PAYLOAD_LEN cookie 0x2 offset 0 length 4",
        "< NBD_REPLY_TYPE_NONE NBD_REPLY_FLAG_DONE cookie 0x2",
        "> NBD_CMD_READ cookie 0x3 offset 8589934592 length 8",
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x3 request_offset 0 offset 8589934592 length 8",
        "< NBD_REPLY_TYPE_NONE NBD_REPLY_FLAG_DONE cookie 0x4 request_offset 0",
        "> NBD_CMD_FLUSH NBD_CMD_FLAG_PAYLOAD_LEN cookie 0x5 offset 0 length 6",
        "> NBD_CMD_WRITE_ZEROES cookie 0x6 offset 0 length 1125899906842624",
        "> NBD_CMD_BLOCK_STATUS NBD_CMD_FLAG_PAYLOAD_LEN cookie 0x7 offset 0 length 9"
        " malformed 'its length is not 8 + n*4'",
        "< NBD_REPLY_TYPE_BLOCK_STATUS_EXT NBD_REPLY_FLAG_DONE cookie 0x7"
        " malformed 'its length does not match its descriptors'",
    )


def test_short_chunks_are_malformed() -> None:
    check(
        [
            ("<", structured_chunk(1, 1, b"four")),
            ("<", structured_chunk(2, 1, b"four")),
            ("<", structured_chunk(5, 1, b"id")),
            ("<", structured_chunk(2**15 + 2, 1, pack(">IH", 5, 3) + b"off")),
        ],
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x1 malformed 'it is shorter than its fields'",
        "< NBD_REPLY_TYPE_OFFSET_HOLE cookie 0x1 malformed 'it is shorter than its fields'",
        "< NBD_REPLY_TYPE_BLOCK_STATUS cookie 0x1 malformed 'it is shorter than its fields'",
        "< NBD_REPLY_TYPE_ERROR_OFFSET cookie 0x1 malformed 'it is shorter than its fields'",
    )


def test_contexts_of_an_option_that_fails() -> None:
    """A new selection replaces the last one, also when it fails."""
    told = lines(
        [
            *OPENING,
            *SELECTED,
            (">", SET_CONTEXTS),
            ("<", reply(10, 2**31 + 6)),
            ("<", structured_chunk(5, 1, pack(">III", 3, 512, 0))),
        ]
    )
    assert told[-1] == "< NBD_REPLY_TYPE_BLOCK_STATUS cookie 0x1 context 0x3 extents [512 0x0]"


def test_pipelined_options() -> None:
    """Nothing is expected of the order in which both directions are heard."""
    check(
        [
            (">", option(8) + option(3) + option(1, b"x") + compact(0, 1, 0, 8)),
            ("<", reply(8, 1) + reply(3, 2**31 + 2) + pack(">QH", 8, 1)),
            ("<", structured_chunk(1, 1, pack(">Q", 0) + bytes(8), DONE)),
        ],
        "> NBD_OPT_STRUCTURED_REPLY",
        "> NBD_OPT_LIST",
        "> NBD_OPT_EXPORT_NAME name 'x'",
        "> NBD_CMD_READ cookie 0x1 offset 0 length 8",
        "< NBD_REP_ACK option NBD_OPT_STRUCTURED_REPLY",
        "< NBD_REP_ERR_POLICY option NBD_OPT_LIST",
        "< reply to NBD_OPT_EXPORT_NAME size 8 flags NBD_FLAG_HAS_FLAGS",
        "< NBD_REPLY_TYPE_OFFSET_DATA NBD_REPLY_FLAG_DONE cookie 0x1 offset 0 length 8",
    )


def test_file_bytes_are_skipped() -> None:
    told: list[Traced] = []
    tracer = Tracer(told.append)
    for direction, data in OPENING:
        tracer.passed(Direction(direction), data)
    head = structured_chunk(1, 1, pack(">Q", 0) + bytes(1 << 20))[: -(1 << 20)]
    tracer.passed(Direction.TO_CLIENT, head)
    tracer.skipped(Direction.TO_CLIENT, 1 << 19)
    tracer.skipped(Direction.TO_CLIENT, 1 << 19)
    tracer.passed(Direction.TO_CLIENT, structured_chunk(0, 1, flags=DONE))
    assert [message.message for message in told[2:]] == [
        "NBD_REPLY_TYPE_OFFSET_DATA",
        "NBD_REPLY_TYPE_NONE",
    ]


# What cannot be followed -------------------------------------------------------------------------


def test_garbage_is_told_once() -> None:
    """And the other direction goes on."""
    check(
        [
            (">", b"GET / HTTP/1.0\r\n\r\n"),
            (">", option(3)),
            ("<", reply(3, 1)),
        ],
        "> undecodable, and so is the rest"
        " reason 'no option and no request begins with 0x47455420'",
        "< NBD_REP_ACK option NBD_OPT_LIST",
    )


def test_not_newstyle() -> None:
    assert lines([("<", b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53" + bytes(16))]) == [
        "< undecodable, and so is the rest reason 'malformed Greeting: wrong magic number'"
    ]


MESSAGES = [
    (">", option(7, string(b"disk") + pack(">HH", 1, 3))),
    (">", option(10, string(b"") + pack(">I", 1) + string(b"base:allocation"))),
    (">", option(1, b"x")),
    (">", compact(0, 1, 0, 512)),
    (">", extended(7, 1, 0, 12, flags=32) + bytes(12)),
    ("<", reply(10, 4, pack(">I", 3) + b"base:allocation")),
    ("<", reply(7, 3, pack(">HQH", 0, 1 << 20, 0x83))),
    ("<", reply(3, 2, string(b"a") + b"the first")),
    ("<", simple(1)),
    ("<", structured_chunk(5, 1, pack(">III", 3, 512, 1))),
    ("<", structured_chunk(2**15 + 2, 3, pack(">IH", 5, 0) + pack(">Q", 11), DONE)),
    ("<", extended_chunk(6, 1, 512, pack(">IIQQ", 3, 1, 1 << 40, 3), DONE)),
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A message in which bytes are changed, or that is cut."""
    direction, message = draw(st.sampled_from(MESSAGES))
    data = bytearray(message)
    for at in draw(st.lists(st.integers(0, len(data) - 1), max_size=4)):
        data[at] = draw(st.integers(0, 255))
    return direction, bytes(data[: draw(st.integers(0, len(data)))])


noise = st.tuples(st.sampled_from("<>"), st.binary(max_size=64))


@given(st.lists(damaged() | st.sampled_from(MESSAGES) | noise, max_size=12))
def test_nothing_makes_it_fail(session: Session) -> None:
    """Garbage is told in the words of a rule that it breaks, never those of an accident."""
    told = traced(OPENING + session)
    for message in told:
        assert str(message).isprintable()
        json.dumps(message.record("one"))
    lost = [message for message in told if message.message.startswith("undecodable")]
    assert len({message.direction for message in lost}) == len(lost)
    for message in lost:
        reason = str(message.fields["reason"])
        assert re.match(r"no (option|reply)|malformed ", reason), reason


def test_values() -> None:
    """What goes into JSON: numbers, names of the specification, texts, and lists of them."""
    session = [
        *OPENING,
        *SELECTED,
        (">", option(7, string(b"\xffa") + pack(">HH", 1, 3))),
        ("<", structured_chunk(5, 1, pack(">III", 3, 512, 3), DONE)),
    ]
    go, status = (message.record("one") for message in traced(session)[-2:])
    assert go == {
        "connection": "one",
        "direction": "to server",
        "nbd": {"message": "NBD_OPT_GO", "name": "\\udcffa", "infos": ["NBD_INFO_BLOCK_SIZE"]},
    }
    assert status["nbd"] == {
        "message": "NBD_REPLY_TYPE_BLOCK_STATUS",
        "flags": "NBD_REPLY_FLAG_DONE",
        "cookie": "0x1",
        "context": "base:allocation",
        "extents": [{"length": 512, "state": "hole,zero"}],
    }
