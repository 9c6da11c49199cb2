"""Golden bytes of every reply in the three dialects, written from the NBD specification.

"Simple reply message", "Structured reply chunk message", "Extended reply chunk message",
"Structured reply types" and "Error values"; what the headers of requests look like is in
`test_wire`. The bytes are built a second time by construct declarations of the same sections.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from construct import (
    Const,
    Construct,
    GreedyBytes,
    GreedyRange,
    Int16ub,
    Int32ub,
    Int64ub,
    Prefixed,
    Struct,
    Terminated,
)
from hypothesis import given
from hypothesis import strategies as st

from pynbd.protocol.transmission import (
    Dialect,
    ExtendedReplies,
    Request,
    SimpleReplies,
    StructuredReplies,
    dialect,
)
from pynbd.protocol.values import Command, CommandFlag, Error

h = bytes.fromhex

SIMPLE, STRUCTURED, EXTENDED = SimpleReplies(), StructuredReplies(), ExtendedReplies()
DIALECTS = [SIMPLE, STRUCTURED, EXTENDED]
CHUNKED: list[Dialect] = [STRUCTURED, EXTENDED]
COOKIE = 0x0123456789ABCDEF
OFFSET = 0x1_0000_0200  # of the request: above 4 GiB, and unlike that of any chunk
AT = 0x1_0000_0400  # of a chunk

every_dialect = pytest.mark.parametrize("replies", DIALECTS, ids=["simple", "structured", "ext"])
chunked = pytest.mark.parametrize("replies", CHUNKED, ids=["structured", "ext"])

# Declarations of the chunks ----------------------------------------------------------------------

STRUCTURED_CHUNK = Struct(
    Const(0x668E33EF, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "payload" / Prefixed(Int32ub, GreedyBytes),
    Terminated,
)
EXTENDED_CHUNK = Struct(
    Const(0x6E8A278C, Int32ub),
    "flags" / Int16ub,
    "type" / Int16ub,
    "cookie" / Int64ub,
    "offset" / Int64ub,
    "payload" / Prefixed(Int64ub, GreedyBytes),
    Terminated,
)
ERROR = Struct("error" / Int32ub, "message" / Prefixed(Int16ub, GreedyBytes), Terminated)
BLOCK_STATUS = Struct(
    "context" / Int32ub,
    "extents" / GreedyRange(Struct("length" / Int32ub, "flags" / Int32ub)),
    Terminated,
)
BLOCK_STATUS_EXT = Struct(
    "context" / Int32ub,
    "count" / Int32ub,
    "extents" / GreedyRange(Struct("length" / Int64ub, "flags" / Int64ub)),
    Terminated,
)


def parsed(replies: Dialect, data: bytes | memoryview) -> Any:
    """The one chunk that ``data`` is; the extended one repeats the request's offset."""
    layout: Construct = EXTENDED_CHUNK if replies.extended else STRUCTURED_CHUNK
    chunk = layout.parse(data)
    assert chunk.cookie == COOKIE
    if replies.extended:
        assert chunk.offset == OFFSET
    assert layout.build(chunk) == data
    return chunk


# Golden bytes ------------------------------------------------------------------------------------


def test_done() -> None:
    assert SIMPLE.done(COOKIE, OFFSET) == h("67446698 00000000 0123456789abcdef")
    assert STRUCTURED.done(COOKIE, OFFSET) == h("668e33ef 0001 0000 0123456789abcdef 00000000")
    assert EXTENDED.done(COOKIE, OFFSET) == h(
        "6e8a278c 0001 0000 0123456789abcdef 0000000100000200 0000000000000000"
    )


def test_head_of_data_that_more_follows() -> None:
    assert SIMPLE.data(COOKIE, OFFSET, OFFSET, 512) == h("67446698 00000000 0123456789abcdef")
    assert STRUCTURED.data(COOKIE, OFFSET, AT, 512) == h(
        "668e33ef 0000 0001 0123456789abcdef 00000208 0000000100000400"
    )
    assert EXTENDED.data(COOKIE, OFFSET, AT, 512) == h(
        "6e8a278c 0000 0001 0123456789abcdef 0000000100000200 0000000000000208 0000000100000400"
    )


def test_head_of_a_read_in_one_piece() -> None:
    golden = {
        SIMPLE: "67446698 00000000 0123456789abcdef",
        STRUCTURED: "668e33ef 0001 0001 0123456789abcdef 00000208 0000000100000200",
        EXTENDED: "6e8a278c 0001 0001 0123456789abcdef 0000000100000200"
        " 0000000000000208 0000000100000200",
    }
    for replies, expected in golden.items():
        buffer = bytearray(b"\xaa" * 64)
        replies.put_data_head(buffer, 3, COOKIE, OFFSET, 512)
        end = 3 + replies.data_head_size
        assert buffer[3:end] == h(expected)
        assert buffer[:3] == b"\xaa" * 3
        assert buffer[end:] == b"\xaa" * (64 - end)


def test_hole() -> None:
    """A hole's size has 32 bits in the extended dialect too."""
    assert STRUCTURED.hole(COOKIE, OFFSET, AT, 0x1FF_FFFF) == h(
        "668e33ef 0000 0002 0123456789abcdef 0000000c 0000000100000400 01ffffff"
    )
    assert EXTENDED.hole(COOKIE, OFFSET, AT, 0x1FF_FFFF) == h(
        "6e8a278c 0000 0002 0123456789abcdef 0000000100000200"
        " 000000000000000c 0000000100000400 01ffffff"
    )


def test_error() -> None:
    assert SIMPLE.error(COOKIE, OFFSET, Error.EIO, "bad") == h("67446698 00000005 0123456789abcdef")
    assert STRUCTURED.error(COOKIE, OFFSET, Error.EIO, "bäd") == h(
        "668e33ef 0001 8001 0123456789abcdef 0000000a 00000005 0004 62c3a464"
    )
    assert EXTENDED.error(COOKIE, OFFSET, Error.ENOTSUP, "") == h(
        "6e8a278c 0001 8001 0123456789abcdef 0000000100000200 0000000000000006 0000005f 0000"
    )


def test_status() -> None:
    lengths, states = np.array([0x10000, 0xFFFEFFFF]), np.array([0, 3])
    assert STRUCTURED.status(COOKIE, OFFSET, 7, lengths, states, last=True) == h(
        "668e33ef 0001 0005 0123456789abcdef 00000014 00000007 00010000 00000000 fffeffff 00000003"
    )
    assert STRUCTURED.status(COOKIE, OFFSET, 7, lengths[:1], states[:1], last=False) == h(
        "668e33ef 0000 0005 0123456789abcdef 0000000c 00000007 00010000 00000000"
    )
    lengths = np.array([0x10000, 0x2_0000_0000])
    assert EXTENDED.status(COOKIE, OFFSET, 7, lengths, states, last=True) == h(
        "6e8a278c 0001 0006 0123456789abcdef 0000000100000200 0000000000000028"
        " 00000007 00000002 0000000000010000 0000000000000000"
        " 0000000200000000 0000000000000003"
    )


@pytest.mark.parametrize("replies", [STRUCTURED, EXTENDED])
def test_descriptors_are_written_in_place(replies: Dialect) -> None:
    """A long reply takes its own bytes, and no copy of them."""
    lengths, states = np.full(100_000, 512), np.zeros(100_000, np.uint8)
    tracemalloc.start()
    try:
        reply = replies.status(COOKIE, OFFSET, 7, lengths, states, last=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reply) > 800_000
    assert peak < len(reply) + 65536


# The same bytes, parsed --------------------------------------------------------------------------


@chunked
@given(
    lengths=st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=9),
    states=st.data(),
    last=st.booleans(),
    context=st.integers(0, 2**32 - 1),
)
def test_status_descriptors(
    replies: Dialect, lengths: list[int], states: st.DataObject, last: bool, context: int
) -> None:
    flags = states.draw(
        st.lists(st.integers(0, 2**31), min_size=len(lengths), max_size=len(lengths))
    )
    reply = replies.status(
        COOKIE, OFFSET, context, np.array(lengths), np.array(flags, np.int64), last=last
    )
    chunk = parsed(replies, reply)
    assert (chunk.flags, chunk.type) == (int(last), 6 if replies.extended else 5)
    payload = (BLOCK_STATUS_EXT if replies.extended else BLOCK_STATUS).parse(chunk.payload)
    assert payload.context == context
    assert [(extent.length, extent.flags) for extent in payload.extents] == list(
        zip(lengths, flags, strict=True)
    )
    if replies.extended:
        assert payload.count == len(lengths)


@chunked
@given(message=st.text(), error=st.sampled_from(Error))
def test_error_payload(replies: Dialect, message: str, error: Error) -> None:
    chunk = parsed(replies, replies.error(COOKIE, OFFSET, error, message))
    assert (chunk.flags, chunk.type) == (1, 0x8001)
    payload = ERROR.parse(chunk.payload)
    assert payload.error == error
    assert payload.message == message.encode()


@chunked
@pytest.mark.parametrize(
    "message, length",
    [
        ("x" * 900, 900),
        ("x" * 901, 900),
        ("x" * 899 + "é", 899),  # two bytes: the first would be the 900th
        ("x" * 898 + "é", 900),
        ("x" * 898 + "€", 898),  # three bytes
        ("x" * 897 + "😀", 897),  # four bytes
        ("😀" * 300, 900),
        ("€" * 500, 900),
    ],
)
def test_error_text_is_bounded_at_a_character(replies: Dialect, message: str, length: int) -> None:
    """QEMU's client drops the connection above 1000 bytes of error payload."""
    chunk = parsed(replies, replies.error(COOKIE, OFFSET, Error.EIO, message))
    text = ERROR.parse(chunk.payload).message
    assert len(text) == length
    assert message.startswith(text.decode())


@chunked
def test_error_text_that_has_no_utf8(replies: Dialect) -> None:
    chunk = parsed(replies, replies.error(COOKIE, OFFSET, Error.EIO, "file \udcff"))
    assert ERROR.parse(chunk.payload).message == b"file ?"


@chunked
def test_an_error_is_never_zero(replies: Dialect) -> None:
    chunk = parsed(replies, replies.error(COOKIE, OFFSET, 0, "?"))
    assert ERROR.parse(chunk.payload).error == 22


@every_dialect
@pytest.mark.parametrize("cookie", [0, 2**64 - 1])
def test_cookies_are_echoed(replies: Dialect, cookie: int) -> None:
    for reply in (replies.done(cookie, 0), replies.error(cookie, 0, Error.EIO, "")):
        assert reply[8:16] == cookie.to_bytes(8, "big")


# Requests ----------------------------------------------------------------------------------------


@every_dialect
@pytest.mark.parametrize("command", [*Command, Command(99)], ids=str)
@pytest.mark.parametrize("flags", [0, CommandFlag.FUA, CommandFlag.PAYLOAD_LEN, 0xFFFF])
def test_payload_length(replies: Dialect, command: Command, flags: int) -> None:
    """Compact: WRITE alone has a payload. Extended: whatever says PAYLOAD_LEN, and WRITE."""
    has_payload = command == Command.WRITE or (
        replies.extended and bool(flags & CommandFlag.PAYLOAD_LEN)
    )
    assert replies.payload_length(flags, command, 4096) == (4096 if has_payload else 0)


@pytest.mark.parametrize(
    "structured, extended, kind",
    [
        (False, False, SimpleReplies),
        (True, False, StructuredReplies),
        (True, True, ExtendedReplies),
        (False, True, ExtendedReplies),  # row S4: extended headers bring their replies along
    ],
)
def test_dialect_of_a_session(structured: bool, extended: bool, kind: type[Dialect]) -> None:
    chosen = dialect(structured=structured, extended=extended)
    assert type(chosen) is kind
    assert (chosen.request.size, chosen.magic) == (
        (32, 0x21E41C71) if extended else (28, 0x25609513)
    )


def test_requests_print_as_the_specification_names_them() -> None:
    assert str(Request(0, 0, 1, 512, 4096)) == "NBD_CMD_READ 512+4096"
    assert str(Request(0x21, 1, 1, 0, 1)) == (
        "NBD_CMD_WRITE NBD_CMD_FLAG_FUA|NBD_CMD_FLAG_PAYLOAD_LEN 0+1"
    )
    assert str(Request(0, 99, 1, 0, 0)) == "0x63 0+0"
