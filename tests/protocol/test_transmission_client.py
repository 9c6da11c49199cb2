"""What a client makes of replies, in the three dialects, and what it does not accept.

The bytes are put together here from the specification ("Simple reply message", "Structured reply
chunk message", "Extended reply chunk message", "Structured reply types"), not by the package.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import ExportInfo, Session
from pynbd.protocol.transmission import Request, dialect
from pynbd.protocol.transmission_client import Asked, Replies, Status, encode
from pynbd.protocol.values import TransmissionFlag

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
DONE = 1
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
SIZE = 1 << 40
CONTEXTS = {4: "base:allocation", 9: "qemu:dirty-bitmap:b"}


class Mode(Enum):
    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


CHUNKED = [Mode.STRUCTURED, Mode.EXTENDED]
every_mode = pytest.mark.parametrize("mode", list(Mode))
chunked = pytest.mark.parametrize("mode", CHUNKED)


def session(mode: Mode, contexts: Mapping[int, str] = CONTEXTS) -> Session:
    return Session(
        export=ExportInfo("", "", SIZE, TransmissionFlag(1), (1, 4096, 1 << 25), ()),
        flags=TransmissionFlag(1),
        structured=mode is Mode.STRUCTURED,
        extended=mode is Mode.EXTENDED,
        contexts=contexts,
    )


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


@dataclass
class Link:
    """The client's end of a session, and the words of a server for it."""

    mode: Mode
    finished: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.replies = Replies(session(self.mode), self.finished.append)
        self.asked: dict[int, Asked] = {}

    def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1
    ) -> Asked:
        view = memoryview(bytearray(b"?" * length)) if command == READ else None
        contexts = tuple(CONTEXTS) if command == BLOCK_STATUS else ()
        asked = Asked(Request(flags, command, cookie, offset, length), view=view, contexts=contexts)
        self.replies.asked[cookie] = self.asked[cookie] = asked
        return asked

    def chunk(self, kind: int, payload: bytes = b"", flags: int = 0, cookie: int = 1) -> bytes:
        if self.mode is Mode.STRUCTURED:
            head = struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload))
        else:
            offset = self.asked[cookie].request.offset
            head = struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload))
        return head + payload

    def data(self, at: int, data: bytes, flags: int = 0, cookie: int = 1) -> bytes:
        return self.chunk(DATA, struct.pack(">Q", at) + data, flags, cookie)

    def hole(self, at: int, length: int, flags: int = 0, cookie: int = 1) -> bytes:
        return self.chunk(HOLE, struct.pack(">QI", at, length), flags, cookie)

    def done(self, cookie: int = 1) -> bytes:
        return self.chunk(NONE, flags=DONE, cookie=cookie)

    def error(self, error: int, text: bytes = b"", rest: bytes = b"", flags: int = DONE) -> bytes:
        kind = ERROR_OFFSET if rest else ERROR
        return self.chunk(kind, struct.pack(">IH", error, len(text)) + text + rest, flags)

    def status(self, context: int, *extents: tuple[int, int], flags: int = 0) -> bytes:
        if self.mode is Mode.STRUCTURED:
            words = b"".join(struct.pack(">II", *extent) for extent in extents)
            return self.chunk(STATUS, struct.pack(">I", context) + words, flags)
        words = b"".join(struct.pack(">QQ", *extent) for extent in extents)
        return self.chunk(STATUS_EXT, struct.pack(">II", context, len(extents)) + words, flags)

    def hear(self, said: bytes, pieces: Iterator[int] | None = None) -> None:
        """Receive all of it, as much at once as there is room for, or in such pieces."""
        while said:
            room = self.replies.room()
            count = min(len(room), len(said), next(pieces) if pieces else len(said))
            assert count
            room[:count] = said[:count]
            said = said[count:]
            self.replies.received(count)


def read_of(asked: Asked) -> bytes:
    assert asked.view is not None
    return bytes(asked.view)


# Requests


def test_requests() -> None:
    """ "Compact request message" and "Extended request message", field by field."""
    compact = dialect(structured=True, extended=False)
    extended = dialect(structured=False, extended=True)
    asked = Asked(Request(FUA, TRIM, 7, 1 << 33, 512))
    assert encode(compact, asked, filtered=False).hex() == (
        "256095130001000400000000000000070000000200000000" + "00000200"
    )
    assert encode(extended, asked, filtered=False).hex() == (
        "21e41c710001000400000000000000070000000200000000" + "0000000000000200"
    )


def test_the_payload_of_a_write_is_told_in_extended_headers() -> None:
    asked = Asked(Request(FUA, WRITE, 1, 0, 3, memoryview(b"abc")))
    assert encode(dialect(structured=True, extended=False), asked, filtered=False)[4:6] == b"\0\1"
    assert encode(dialect(structured=False, extended=True), asked, filtered=False)[4:6] == b"\0\x21"


def test_the_payload_that_filters() -> None:
    """NBD_CMD_BLOCK_STATUS: 64 bits of effect length, and 32 for each context."""
    asked = Asked(Request(REQ_ONE, BLOCK_STATUS, 1, 4096, 1 << 35), contexts=(9,))
    assert encode(dialect(structured=False, extended=True), asked, filtered=True) == (
        struct.pack(">IHHQQQ", 0x21E41C71, REQ_ONE | PAYLOAD_LEN, BLOCK_STATUS, 1, 4096, 12)
        + struct.pack(">QI", 1 << 35, 9)
    )


# Replies


def test_simple_replies() -> None:
    link = Link(Mode.SIMPLE)
    read, failed = link.ask(READ, 512, 4), link.ask(READ, 0, 4, cookie=2)
    flush = link.ask(FLUSH, cookie=3)
    link.hear(simple(3) + simple(2, 5) + simple(1, 0, b"data"))
    assert link.finished == [flush, failed, read]
    assert (read_of(read), read.error, failed.error, flush.error) == (b"data", 0, 5, 0)
    assert not link.replies.asked


@chunked
def test_chunks_in_any_order_between_those_of_others(mode: Mode) -> None:
    link = Link(mode)
    one, two = link.ask(READ, 1000, 10), link.ask(READ, 0, 3, cookie=2)
    link.hear(link.data(1006, b"wxyz") + link.data(0, b"ab", cookie=2))
    link.hear(link.hole(1002, 4) + link.hole(2, 1, flags=DONE, cookie=2))
    assert link.finished == [two]
    link.hear(link.data(1000, b"st") + link.done())
    assert link.finished == [two, one]
    assert (read_of(one), read_of(two)) == (b"st\0\0\0\0wxyz", b"ab\0")


@chunked
def test_an_error_fails_the_request_and_the_rest_is_read(mode: Mode) -> None:
    link = Link(mode)
    asked = link.ask(READ, 0, 10)
    link.hear(link.data(0, b"abc"))
    link.hear(link.error(5, b"worn\nout", struct.pack(">Q", 4), flags=0))
    link.hear(link.error(12, b"later", flags=0) + link.data(6, b"x") + link.done())
    assert link.finished == [asked]
    assert (asked.error, asked.message) == (5, "worn out")


@chunked
def test_an_error_of_an_unknown_type(mode: Mode) -> None:
    """ "it MUST consider the current reply as errored, but MAY continue transmission" """
    link = Link(mode)
    asked = link.ask(FLUSH)
    link.hear(link.chunk(0x8077, struct.pack(">IH", 28, 4) + b"full" + b"and more", DONE))
    assert (asked.error, asked.message) == (28, "full")


@chunked
def test_flags_that_are_not_known_are_ignored(mode: Mode) -> None:
    link = Link(mode)
    asked = link.ask(READ, 0, 2)
    link.hear(link.data(0, b"ab", flags=0x8002) + link.chunk(NONE, flags=0xFFFF))
    assert link.finished == [asked]


def test_a_simple_reply_among_structured_ones() -> None:
    """ "MAY use either a simple reply or a structured reply to all other requests" """
    link = Link(Mode.STRUCTURED)
    write, status = link.ask(WRITE, 0, 5), link.ask(BLOCK_STATUS, 0, 5, cookie=2)
    link.hear(simple(1, 28) + simple(2, 22))
    assert (write.error, status.error) == (28, 22)


@chunked
def test_block_status(mode: Mode) -> None:
    link = Link(mode)
    asked = link.ask(BLOCK_STATUS, 4096, 1000)
    link.hear(link.status(9, (100, 1), (200, 0), (5000, 1)))
    link.hear(link.status(4, (1000, 3), flags=DONE))
    assert link.finished == [asked]
    assert {id_: list(each) for id_, each in asked.statuses.items()} == {
        9: [(100, 1), (200, 0), (5000, 1)],
        4: [(1000, 3)],
    }
    assert asked.statuses[9].lengths.dtype == np.int64


def test_64_bits_of_status() -> None:
    link = Link(Mode.EXTENDED)
    asked = link.ask(BLOCK_STATUS, 0, SIZE)
    link.hear(link.status(9, (SIZE, 2**64 - 1)) + link.status(4, (SIZE, 0), flags=DONE))
    assert list(asked.statuses[9]) == [(SIZE, 2**64 - 1)]


def test_a_million_extents() -> None:
    link = Link(Mode.EXTENDED)
    asked = link.ask(BLOCK_STATUS, 0, SIZE)
    extents = np.empty((1 << 20, 2), ">u8")
    extents[:, 0], extents[:, 1] = 512, np.arange(1 << 20) % 2
    for id_ in CONTEXTS:
        payload = struct.pack(">II", id_, len(extents)) + extents.tobytes()
        link.hear(link.chunk(STATUS_EXT, payload, DONE * (id_ == 9)))
    assert int(asked.statuses[4].lengths.sum()) == 512 << 20
    assert int(asked.statuses[9].flags.sum()) == 1 << 19


@pytest.mark.parametrize(
    "length,expected",
    [
        (1, [(1, 7)]),
        (10, [(10, 7)]),
        (11, [(10, 7), (1, 8)]),
        (30, [(10, 7), (20, 8)]),
        (99, [(10, 7), (20, 8)]),
    ],
)
def test_a_status_is_clipped(length: int, expected: list[tuple[int, int]]) -> None:
    status = Status(np.array([10, 20], np.int64), np.array([7, 8], np.uint64))
    assert list(status.clip(length)) == expected
    assert list(status) == [(10, 7), (20, 8)]


# In pieces of any size


def conversation(mode: Mode) -> tuple[Link, bytes, bytes]:
    """Replies of all kinds and lengths; what the first, long READ is to bring."""
    link = Link(mode)
    content = bytes(range(256)) * 300
    link.ask(READ, 5000, len(content))
    link.ask(FLUSH, cookie=2)
    link.ask(READ, 0, 7, cookie=3)
    if mode is Mode.SIMPLE:
        return link, simple(2) + simple(1, 0, content) + simple(3, 0, b"content"), content
    link.ask(BLOCK_STATUS, 0, 100, cookie=4)
    said = link.done(2) + link.data(5000, content[:70000])
    said += link.chunk(ERROR, struct.pack(">IH", 5, 2) + b"no", DONE, cookie=4)
    said += link.data(0, b"content", DONE, cookie=3)
    return link, said + link.data(75000, content[70000:], DONE), content


@every_mode
def test_byte_by_byte(mode: Mode) -> None:
    link, said, content = conversation(mode)
    link.hear(said, iter(lambda: 1, 0))
    assert not link.replies.asked
    assert read_of(link.asked[1]) == content
    assert read_of(link.asked[3]) == b"content"


@given(st.sampled_from(Mode), st.lists(st.integers(1, 100_000), min_size=1))
def test_in_pieces(mode: Mode, sizes: list[int]) -> None:
    link, said, content = conversation(mode)

    def pieces() -> Iterator[int]:
        while True:
            yield from sizes

    link.hear(said, pieces())
    assert not link.replies.asked
    assert read_of(link.asked[1]) == content


@given(st.sampled_from(Mode), st.data())
def test_whatever_a_server_says(mode: Mode, data: st.DataObject) -> None:
    """Good replies with some bytes changed, cut or doubled are refused, or make sense."""
    link, good, _ = conversation(mode)
    said = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(said) - 1)))
        said[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with suppress(ProtocolError):
        link.hear(bytes(said))
    for asked in link.finished:
        assert asked.error or asked.view is None or asked.covered == len(asked.view)


def test_long_data_go_where_they_belong() -> None:
    link = Link(Mode.EXTENDED)
    asked = link.ask(READ, 0, 1 << 20)
    link.hear(link.data(0, bytes(1 << 20))[:100])
    room = link.replies.room()
    assert room.obj is asked.view.obj  # type: ignore[union-attr]
    assert len(room) == (1 << 20) - 60


@pytest.mark.parametrize("begun", [0, 60, 100_000])
def test_an_abandoned_read_touches_its_buffer_no_more(begun: int) -> None:
    link = Link(Mode.EXTENDED)
    asked = link.ask(READ, 0, 200_000)
    view = asked.view
    assert view is not None
    said = link.data(0, b"x" * 200_000, DONE)
    link.hear(said[:begun])
    link.replies.abandon(asked)
    view[:] = bytes(200_000)
    link.hear(said[begun:])
    assert link.finished == [asked]
    assert not any(view)


# What cannot be

Saying = Callable[[Link], bytes]


def refuses(link: Link, said: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        link.hear(said)


@every_mode
def test_another_magic_number(mode: Mode) -> None:
    link = Link(mode)
    link.ask(READ, 0, 512)
    refuses(link, b"\x12\x34\x56\x78" + bytes(60), "magic number 0x12345678")


def test_another_dialect() -> None:
    for mode, other in ((Mode.STRUCTURED, Mode.EXTENDED), (Mode.EXTENDED, Mode.STRUCTURED)):
        link, stranger = Link(mode), Link(other)
        link.ask(FLUSH)
        stranger.ask(FLUSH)
        refuses(link, stranger.done() + bytes(32), "magic number")
        link = Link(mode)
        link.ask(READ, 0, 512)
        refuses(link, simple(1) + bytes(512), "magic number|after structured replies")


@every_mode
def test_a_reply_to_nothing(mode: Mode) -> None:
    link = Link(mode)
    link.ask(FLUSH, cookie=0x77)
    said = simple(0x77) if mode is Mode.SIMPLE else link.done(0x77)
    refuses(link, said + said, "not sent, cookie 0x77")


def test_another_offset() -> None:
    link = Link(Mode.EXTENDED)
    asked = link.ask(READ, 4096, 512)
    said = link.data(4096, bytes(512))
    asked.request = asked.request._replace(offset=0)
    refuses(link, said, "repeats the offset 4096")


@chunked
@pytest.mark.parametrize(
    "saying,text",
    [
        (lambda link: link.data(99, b"ab"), r"content 99\+2, outside of the request"),
        (lambda link: link.data(109, b"ab"), r"content 109\+2, outside of the request"),
        (lambda link: link.data(2**64 - 1, b"ab"), "outside of the request"),
        (lambda link: link.hole(100, 11), r"content 100\+11, outside of the request"),
        (lambda link: link.hole(100, 0), r"content 100\+0, outside of the request"),
        (lambda link: link.data(100, b""), "NBD_REPLY_TYPE_OFFSET_DATA of 8 bytes"),
        (lambda link: link.chunk(DATA, b"1234567"), "NBD_REPLY_TYPE_OFFSET_DATA of 7 bytes"),
        (lambda link: link.chunk(HOLE, bytes(11)), "NBD_REPLY_TYPE_OFFSET_HOLE of 11 bytes"),
        (lambda link: link.data(100, b"123456") + link.hole(102, 6), "content that overlaps"),
        (lambda link: 2 * link.data(100, b"12345") + link.done(), "content that overlaps"),
        (
            lambda link: link.data(105, b"12345") + link.hole(104, 5) + link.done(),
            "content that overlaps",
        ),
        (lambda link: link.data(100, b"12345", DONE), "content is missing"),
        (lambda link: link.done(), "content is missing"),
        (lambda link: link.chunk(NONE), "NBD_REPLY_TYPE_NONE .* not at its end"),
        (lambda link: link.chunk(NONE, b"x", DONE), "NBD_REPLY_TYPE_NONE with a payload"),
        (lambda link: link.chunk(3, b"x"), "0x3 of 1 bytes"),
        (lambda link: link.chunk(STATUS, bytes(12)), "outside|NBD_REPLY_TYPE_BLOCK_STATUS|context"),
        (lambda link: link.error(0), "NBD_REPLY_TYPE_ERROR 0 with"),
        (lambda link: link.chunk(ERROR, b"12345"), "NBD_REPLY_TYPE_ERROR of 5 bytes"),
        (lambda link: link.chunk(ERROR, bytes(3) + b"\5\0\1"), "with a message of 1 bytes"),
        (lambda link: link.chunk(ERROR, bytes(1 << 16)), "NBD_REPLY_TYPE_ERROR of 65536 bytes"),
        (lambda link: link.error(5, b"", struct.pack(">Q", 99)), "at 99, outside of the request"),
        (lambda link: link.error(5, b"", struct.pack(">Q", 110)), "at 110, outside of"),
        (lambda link: link.chunk(ERROR_OFFSET, bytes(13)), "ERROR_OFFSET 0 with"),
    ],
)
def test_a_read_that_cannot_be(mode: Mode, saying: Saying, text: str) -> None:
    link = Link(mode)
    link.ask(READ, 100, 10)
    refuses(link, saying(link), text)


@chunked
@pytest.mark.parametrize(
    "saying,text",
    [
        (lambda link: link.status(4, (10, 0)) + link.done(), "a metadata context is missing"),
        (lambda link: link.done(), "a metadata context is missing"),
        (lambda link: link.status(5, (10, 0)), "context 5, which was not asked for"),
        (lambda link: 2 * link.status(4, (10, 0)), "context 4 a second time"),
        (lambda link: link.status(4), "NBD_REPLY_TYPE_BLOCK_STATUS.* of [48] bytes"),
        (lambda link: link.status(4, (0, 0)), "without length"),
        (lambda link: link.status(4, (512, 0), (0, 0)), "without length"),
        (lambda link: link.status(4, (1025, 0)), "past the end of the export"),
        (lambda link: link.status(4, (512, 0), (513, 0)), "past the end of the export"),
        (lambda link: link.status(4, (1000, 0), (1, 0)), "more extents than were asked for"),
        (lambda link: link.chunk(STATUS, bytes(13)), "NBD_REPLY_TYPE_BLOCK_STATUS of 13 bytes"),
        (lambda link: link.chunk(STATUS_EXT, bytes(25)), "BLOCK_STATUS_EXT of 25 bytes"),
        (lambda link: link.data(0, b"x"), "NBD_REPLY_TYPE_OFFSET_DATA of 9 bytes"),
        (lambda link: link.hole(0, 1), "NBD_REPLY_TYPE_OFFSET_HOLE of 12 bytes"),
    ],
)
def test_a_status_that_cannot_be(mode: Mode, saying: Saying, text: str) -> None:
    link = Link(mode)
    link.ask(BLOCK_STATUS, SIZE - 1024, 1000)
    refuses(link, saying(link), text)


@chunked
@pytest.mark.parametrize("command,count", [(BLOCK_STATUS, 1001), (READ, 1000), (FLUSH, 1)])
def test_no_room_is_made_for_more_descriptors_than_were_asked_for(
    mode: Mode, command: int, count: int
) -> None:
    """The head of the chunk is refused: a server could have 64 MiB of memory for twenty bytes."""
    link = Link(mode)
    link.ask(command, 0, 1000)
    head = len(link.chunk(NONE))
    refuses(link, link.status(4, *[(1, 0)] * count)[:head], "NBD_REPLY_TYPE_BLOCK_STATUS.* bytes")


@chunked
@pytest.mark.parametrize("extents", [[(10, 0), (10, 1)], [(1001, 0)]])
def test_one_extent_was_asked_for(mode: Mode, extents: list[tuple[int, int]]) -> None:
    link = Link(mode)
    link.ask(BLOCK_STATUS, 0, 1000, flags=REQ_ONE)
    refuses(link, link.status(4, *extents), "than were asked for|longer than the request")


@pytest.mark.parametrize(
    "saying,text",
    [
        (lambda link: link.status(4, (10, 1 << 32)), "more than 32 bits of status"),
        (lambda link: link.status(9, *[(2**63, 0)] * 3), "past the end of the export"),
        (lambda link: link.status(9, (2**64 - 1, 0)), "past the end of the export"),
        (
            lambda link: link.chunk(STATUS_EXT, struct.pack(">IIQQ", 4, 2, 10, 0)),
            "2 descriptors announced, 1 sent",
        ),
        (lambda link: link.chunk(STATUS, bytes(12)), "NBD_REPLY_TYPE_BLOCK_STATUS of 12 bytes"),
        (
            lambda _: struct.pack(">IHHQQQ", 0x6E8A278C, 0, STATUS_EXT, 1, 0, 8 + (16 << 58)),
            "NBD_REPLY_TYPE_BLOCK_STATUS_EXT of",
        ),
    ],
)
def test_an_extended_status_that_cannot_be(saying: Saying, text: str) -> None:
    link = Link(Mode.EXTENDED)
    link.ask(BLOCK_STATUS, 0, 1000)
    refuses(link, saying(link), text)


@chunked
def test_content_where_there_is_none(mode: Mode) -> None:
    link = Link(mode)
    link.ask(WRITE, 0, 512)
    refuses(link, link.data(0, bytes(512), DONE), "reply to NBD_CMD_WRITE 0.512: .*OFFSET_DATA")


def test_a_simple_reply_in_the_middle() -> None:
    link = Link(Mode.STRUCTURED)
    link.ask(BLOCK_STATUS, 0, 1000)
    refuses(link, link.status(4, (10, 0)) + simple(1), "in the middle")
    link = Link(Mode.STRUCTURED)
    link.ask(BLOCK_STATUS, 0, 1000)
    refuses(link, simple(1), "a metadata context is missing")
