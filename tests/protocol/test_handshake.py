"""The handshake against rows H, O, S, M and F: bytes in, bytes out, and what was negotiated.

The bytes are put together here from the specification ("Newstyle negotiation", "Option types",
"Option reply types"), not by the package.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import (
    ExportInfo,
    Negotiation,
    Read,
    Session,
    Skip,
    StartTls,
    Write,
    negotiate,
)
from pynbd.protocol.values import TransmissionFlag

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = range(8, 12)
ACK, SERVER, REP_INFO, META_CONTEXT = range(1, 5)
ERR_UNSUP, ERR_POLICY, ERR_INVALID = 0x80000001, 0x80000002, 0x80000003
ERR_UNKNOWN, ERR_SHUTDOWN, ERR_TOO_BIG = 0x80000006, 0x80000007, 0x80000009
ERR_EXT_HEADER_REQD = 0x8000000A
MIB = 2**20

GREETING = b"NBDMAGICIHAVEOPT\0\3"
PLAIN = 0x050F  # HAS_FLAGS, READ_ONLY, FLUSH, FUA, MULTI_CONN, CACHE: F2 without DF
DF, FILTER = 1 << 7, 1 << 12
DISK = ExportInfo(
    name="disk",
    description="a disk",
    size=0x10000,
    flags=TransmissionFlag(PLAIN),
    block_size=(1, 4096, 32 * MIB),
    contexts=("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"),
)
OTHER = ExportInfo("é", "", 0, TransmissionFlag(PLAIN), (1, 512, MIB), ("base:allocation",))


@dataclass
class Directory:
    exports: list[ExportInfo] = field(default_factory=lambda: [DISK, OTHER])
    default: ExportInfo | None = DISK
    stopping: bool = False
    may_list: bool = True

    def find(self, name: str) -> ExportInfo | None:
        return next((e for e in self.exports if e.name == name), None if name else self.default)

    def listing(self) -> Iterable[ExportInfo] | None:
        return self.exports if self.may_list else None


class Peer:
    """Drives a negotiation with what a client sends, in pieces of any size."""

    def __init__(self, negotiation: Negotiation) -> None:
        self.negotiation = negotiation
        self.step = next(negotiation)
        self.unread = bytearray()
        self.skipped = 0
        self.most_held = 0
        self.over = False
        self.session: Session | None = None
        self.replies = bytearray()
        self._advance()

    def send(self, data: bytes) -> None:
        self.unread += data
        self._advance()

    def shaken_hands(self) -> None:
        """The peers have begun TLS: nothing that was sent before comes through it."""
        assert self.step == StartTls()
        assert not self.unread
        self.step = self.negotiation.send(None)
        self._advance()

    def received(self) -> bytes:
        """Return what the server wrote since the last call."""
        data = bytes(self.replies)
        self.replies.clear()
        return data

    def _advance(self) -> None:
        while not self.over:
            match self.step:
                case Write(data):
                    assert data
                    self.replies += data
                    answer = None
                case Read(size):
                    assert size > 0
                    if len(self.unread) < size:
                        return
                    self.most_held = max(self.most_held, size)
                    answer = bytes(self.unread[:size])
                    del self.unread[:size]
                case Skip(size):
                    assert size > 0
                    take = min(size - self.skipped, len(self.unread))
                    del self.unread[:take]
                    self.skipped += take
                    if self.skipped < size:
                        return
                    self.skipped = 0
                    answer = None
                case StartTls():
                    return
            try:
                self.step = self.negotiation.send(answer)
            except StopIteration as stop:
                self.over, self.session = True, stop.value
            except ProtocolError:
                self.over = True
                raise


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return b"IHAVEOPT" + struct.pack(">II", number, size) + data


def info_data(name: bytes, *requests: int) -> bytes:
    return (
        struct.pack(">I", len(name))
        + name
        + struct.pack(f">{1 + len(requests)}H", len(requests), *requests)
    )


def meta_data(name: bytes, *queries: bytes) -> bytes:
    body = b"".join(struct.pack(">I", len(query)) + query for query in queries)
    return struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries)) + body


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


def info_replies(number: int, flags: int, *, name: bytes | None = None) -> bytes:
    """What INFO and GO answer for DISK."""
    replies = [struct.pack(">HQH", 0, 0x10000, flags), struct.pack(">HIII", 3, 1, 4096, 32 * MIB)]
    if name is not None:
        replies.append(struct.pack(">H", 1) + name)
    replies.append(struct.pack(">H", 2) + b"a disk")
    return b"".join(reply(number, REP_INFO, data) for data in replies) + reply(number, ACK)


def contexts(number: int, *names: tuple[int, bytes]) -> bytes:
    replies = [reply(number, META_CONTEXT, struct.pack(">I", id_) + name) for id_, name in names]
    return b"".join(replies) + reply(number, ACK)


def connect(
    directory: Directory | None = None,
    *,
    flags: int = 3,
    extended: bool = True,
    structured: bool = True,
) -> Peer:
    peer = Peer(negotiate(directory or Directory(), structured=structured, extended=extended))
    assert peer.received() == GREETING
    peer.send(struct.pack(">I", flags))
    assert peer.received() == b""
    return peer


def ask(peer: Peer, number: int, data: bytes = b"") -> bytes:
    peer.send(option(number, data))
    assert not peer.unread
    return peer.received()


def refusal(answer: bytes, number: int) -> int:
    """Return the error of an answer that is one error reply with a text for people."""
    magic, echoed, kind, length = struct.unpack_from(">QIII", answer)
    assert (magic, echoed, length) == (0x3E889045565A9, number, len(answer) - 20)
    text = answer[20:].decode()
    assert 0 < length <= 900
    assert text.isprintable()
    return int(kind)


def alive(peer: Peer) -> None:
    assert ask(peer, INFO, info_data(b"disk")) != b""
    assert not peer.over


def go(peer: Peer, name: bytes = b"disk", *requests: int) -> Session:
    ask(peer, GO, info_data(name, *requests))
    assert peer.over
    assert peer.session is not None
    return peer.session


# H: greeting and framing --------------------------------------------------------------------------


def test_greeting() -> None:  # H1
    peer = Peer(negotiate(Directory()))
    assert peer.received() == GREETING
    assert peer.step == Read(4)


@pytest.mark.parametrize("flags, padding", [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name(flags: int, padding: int) -> None:  # H2, H3, H4
    peer = connect(flags=flags)
    assert ask(peer, EXPORT_NAME, b"disk") == struct.pack(">QH", 0x10000, PLAIN) + bytes(padding)
    assert peer.session == Session(DISK, DISK.flags, False, False, {})


@pytest.mark.parametrize("number", [ABORT, LIST, STARTTLS, GO, 99])
def test_options_of_fixed_newstyle_without_it(number: int) -> None:  # H5, T16
    with pytest.raises(ProtocolError, match="without NBD_FLAG_C_FIXED_NEWSTYLE"):
        connect(flags=2).send(option(number))


@pytest.mark.parametrize("flags", [1 << 2, 1 << 31, 7])
def test_unknown_client_flags(flags: int) -> None:  # H6
    with pytest.raises(ProtocolError, match="unknown client flags"):
        connect(flags=flags)


def test_wrong_option_magic() -> None:  # H12
    with pytest.raises(ProtocolError, match="magic"):
        connect().send(b"IHAVEOPS" + struct.pack(">II", LIST, 0))


@pytest.mark.parametrize("number", [ABORT, LIST, INFO, SET_META, 99])
def test_an_option_longer_than_32_mib(number: int) -> None:  # H13
    with pytest.raises(ProtocolError, match="33554433 bytes"):
        connect().send(option(number, length=32 * MIB + 1))


@pytest.mark.parametrize(
    "number, error",
    [
        (99, ERR_UNSUP),
        (LIST, ERR_INVALID),
        (INFO, ERR_INVALID),
        (SET_META, ERR_TOO_BIG),
        (LIST_META, ERR_TOO_BIG),
    ],
)
def test_32_mib_are_skipped(number: int, error: int) -> None:  # H14, M31
    peer = connect()
    peer.send(option(number, length=32 * MIB))
    for _ in range(32):
        assert peer.received() == b""
        peer.send(bytes(MIB))
        assert not peer.unread
    assert refusal(peer.received(), number) == error
    assert peer.most_held <= 16
    alive(peer)


@pytest.mark.parametrize("number", [0, PEEK_EXPORT, 12, 99, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"0123456789"])
def test_unknown_options(number: int, data: bytes) -> None:  # H15, H16, H17
    peer = connect()
    assert refusal(ask(peer, number, data), number) == ERR_UNSUP
    alive(peer)


def test_many_options() -> None:  # H18
    peer = connect()
    for _ in range(1000):
        assert ask(peer, LIST).endswith(reply(LIST, ACK))
    alive(peer)


CONVERSATION = b"".join(
    [
        struct.pack(">I", 3),
        option(99, b"data"),
        option(LIST),
        option(STRUCTURED_REPLY),
        option(EXTENDED_HEADERS),
        option(SET_META, meta_data(b"disk", b"base:allocation", b"qemu:dirty-bitmap:b")),
        option(INFO, info_data(b"nosuch", 3)),
        option(GO, info_data(b"disk", 1, 3)),
    ]
)


def test_pipelined_and_one_byte_at_a_time() -> None:  # H10, H11
    whole = Peer(negotiate(Directory()))
    whole.send(CONVERSATION + b"transmission")
    assert bytes(whole.unread) == b"transmission"
    slow = Peer(negotiate(Directory()))
    for i in range(len(CONVERSATION)):
        assert not slow.over
        slow.send(CONVERSATION[i : i + 1])
    assert slow.over
    assert slow.received() == whole.received()
    assert slow.session == whole.session
    assert whole.session is not None
    assert whole.session.contexts == {0: "base:allocation", 2: "qemu:dirty-bitmap:b"}


def test_every_answer_comes_with_the_last_byte_of_its_option() -> None:
    peer = connect()
    for message in (option(99, b"data"), option(LIST), option(INFO, info_data(b"disk"))):
        peer.send(message[:-1])
        assert peer.received() == b""
        peer.send(message[-1:])
        assert peer.received() != b""


# O: EXPORT_NAME, ABORT, LIST, INFO, GO ------------------------------------------------------------


@pytest.mark.parametrize(
    "name, reason",
    [
        (b"nosuch", "there is no export 'nosuch'"),  # O1
        (b"n" * 4097, "4097 bytes"),  # O2
        (b"disk\0x", "NUL"),  # O3
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_export_name_that_cannot_be_served(name: bytes, reason: str) -> None:
    peer = connect()
    with pytest.raises(ProtocolError, match=reason):
        peer.send(option(EXPORT_NAME, name))
    assert peer.received() == b""


def test_export_name_after_extended_headers() -> None:  # O4
    peer = connect()
    ask(peer, EXTENDED_HEADERS)
    with pytest.raises(ProtocolError, match="after NBD_OPT_EXTENDED_HEADERS"):
        peer.send(option(EXPORT_NAME, b"disk"))


def test_export_name_after_structured_reply() -> None:  # O5
    peer = connect()
    ask(peer, STRUCTURED_REPLY)
    ask(peer, SET_META, meta_data(b"disk", b"base:allocation"))
    assert ask(peer, EXPORT_NAME, b"disk") == struct.pack(">QH", 0x10000, PLAIN | DF)
    assert peer.session == Session(
        DISK, TransmissionFlag(PLAIN | DF), True, False, {0: "base:allocation"}
    )


def test_export_name_may_be_empty() -> None:  # O31
    peer = connect()
    assert ask(peer, EXPORT_NAME) == struct.pack(">QH", 0x10000, PLAIN)


@pytest.mark.parametrize("data", [b"", b"data", bytes(5000)])
def test_abort(data: bytes) -> None:  # O6, O7
    peer = connect()
    assert ask(peer, ABORT, data) == reply(ABORT, ACK)
    assert peer.over
    assert peer.session is None


def test_list() -> None:  # O9, O11
    peer = connect()
    expected = (
        reply(LIST, SERVER, b"\0\0\0\4diska disk")
        + reply(LIST, SERVER, b"\0\0\0\2\xc3\xa9")
        + reply(LIST, ACK)
    )
    assert ask(peer, LIST) == expected
    assert ask(peer, LIST) == expected
    alive(peer)


def test_list_of_nothing() -> None:  # O12
    assert ask(connect(Directory([])), LIST) == reply(LIST, ACK)


def test_list_of_many() -> None:
    exports = [ExportInfo(str(i), "", 0, DISK.flags, (1, 512, MIB), ()) for i in range(1000)]
    expected = b"".join(
        reply(LIST, SERVER, struct.pack(">I", len(e.name)) + e.name.encode()) for e in exports
    )
    assert ask(connect(Directory(exports)), LIST) == expected + reply(LIST, ACK)


@pytest.mark.parametrize("directory, number, data, error", [
    (Directory(), LIST, b"x", ERR_INVALID),  # O10
    (Directory(may_list=False), LIST, b"", ERR_POLICY),  # O13
    (Directory(), STARTTLS, b"", ERR_POLICY),  # T1
    (Directory(), STARTTLS, b"x", ERR_INVALID),  # T5
    (Directory(), STRUCTURED_REPLY, b"x", ERR_INVALID),  # S3
    (Directory(), EXTENDED_HEADERS, b"x", ERR_INVALID),  # S7
])  # fmt: skip
def test_refused_options(directory: Directory, number: int, data: bytes, error: int) -> None:
    peer = connect(directory)
    assert refusal(ask(peer, number, data), number) == error
    alive(peer)


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("data, error", [
    (b"", ERR_INVALID),  # O14
    (b"\0", ERR_INVALID),
    (bytes(4), ERR_INVALID),
    (bytes(5), ERR_INVALID),
    (b"\0\0\0\5disk\0\0", ERR_INVALID),  # O15: the name takes the count's first byte
    (b"\0\0\0\x09disk\0\0", ERR_INVALID),
    (b"\xff\xff\xff\xffdisk\0\0", ERR_INVALID),  # O16
    (info_data(b"n" * 4097), ERR_INVALID),  # O17
    (info_data(b"n" * 4096), ERR_UNKNOWN),  # O18
    (info_data(b"n" * 256), ERR_UNKNOWN),  # O19
    (info_data(b"n" * 1000), ERR_UNKNOWN),
    (info_data(b"n" * 3000), ERR_UNKNOWN),
    (info_data(b"disk\0"), ERR_INVALID),  # O20
    (info_data(b"\xff\xfe"), ERR_UNKNOWN),  # O21
    (info_data(b"\xed\xb3\xbf"), ERR_UNKNOWN),
    (b"\0\0\0\4disk\0\2\0\3", ERR_INVALID),  # O22
    (info_data(b"disk", 3) + b"\0", ERR_INVALID),  # O23
    (bytes(140000), ERR_INVALID),
    (info_data(b"nosuch", 0, 1, 2, 3), ERR_UNKNOWN),  # O30
])  # fmt: skip
def test_info_and_go_that_fail(number: int, data: bytes, error: int) -> None:
    peer = connect()
    assert refusal(ask(peer, number, data), number) == error
    alive(peer)


def test_a_name_that_is_not_utf8_is_not_echoed() -> None:  # O21, H19
    answer = ask(connect(), INFO, info_data(b"abc\xff\xfe"))
    assert b"abc" not in answer
    assert ask(connect(), INFO, info_data(b"a\nb\xc3\xa9")).endswith(b"export 'a\\nb\xc3\xa9'")


@pytest.mark.parametrize("requests, name", [
    ((), None),
    ((3,), None),  # O28: sent in any case
    ((1,), b"disk"),  # O26
    ((77, 1, 1, 0, 2, 3, 77), b"disk"),  # O24
])  # fmt: skip
def test_info_and_go(requests: tuple[int, ...], name: bytes | None) -> None:  # O25, O27, O32
    peer = connect(flags=1)
    for _ in range(2):
        assert ask(peer, INFO, info_data(b"disk", *requests)) == info_replies(
            INFO, PLAIN, name=name
        )
        assert not peer.over
    assert ask(peer, GO, info_data(b"disk", *requests)) == info_replies(GO, PLAIN, name=name)
    assert peer.session == Session(DISK, DISK.flags, False, False, {})


def test_every_information_request_there_is() -> None:
    peer = connect()
    assert ask(peer, INFO, info_data(b"disk", *range(0xFFFF))) == info_replies(
        INFO, PLAIN, name=b"disk"
    )


def test_no_description() -> None:  # O27
    expected = [struct.pack(">HQH", 0, 0, PLAIN), struct.pack(">HIII", 3, 1, 512, MIB)]
    assert ask(connect(), INFO, info_data("é".encode(), 2)) == (
        b"".join(reply(INFO, REP_INFO, data) for data in expected) + reply(INFO, ACK)
    )


def test_the_default_export() -> None:  # O31
    assert ask(connect(), INFO, info_data(b"", 1)) == info_replies(INFO, PLAIN, name=b"disk")
    answer = ask(connect(Directory(default=None)), INFO, info_data(b""))
    assert refusal(answer, INFO) == ERR_UNKNOWN


def test_info_on_a_failing_export_then_go() -> None:  # O33
    peer = connect()
    assert refusal(ask(peer, INFO, info_data(b"nosuch")), INFO) == ERR_UNKNOWN
    assert go(peer).export == DISK


def test_go_that_fails_with_extended_headers() -> None:  # O35
    peer = connect()
    ask(peer, EXTENDED_HEADERS)
    assert refusal(ask(peer, GO, info_data(b"nosuch")), GO) == ERR_UNKNOWN
    assert refusal(ask(peer, GO, b""), GO) == ERR_INVALID
    assert go(peer).extended


@pytest.mark.parametrize("number", [*range(3, 13), 99])
@pytest.mark.parametrize("data", [b"", b"data", bytes(200_000)])
def test_a_stopping_server(number: int, data: bytes) -> None:  # O36
    peer = connect(Directory(stopping=True))
    assert refusal(ask(peer, number, data), number) == ERR_SHUTDOWN
    assert ask(peer, ABORT) == reply(ABORT, ACK)


def test_a_stopping_server_and_export_name() -> None:  # O36
    with pytest.raises(ProtocolError, match="shutting down"):
        connect(Directory(stopping=True)).send(option(EXPORT_NAME, b"disk"))


# S: structured replies and extended headers -------------------------------------------------------


def test_structured_replies() -> None:  # S1, S2
    peer = connect()
    assert ask(peer, STRUCTURED_REPLY) == reply(STRUCTURED_REPLY, ACK)
    assert refusal(ask(peer, STRUCTURED_REPLY), STRUCTURED_REPLY) == ERR_INVALID
    assert go(peer) == Session(DISK, TransmissionFlag(PLAIN | DF), True, False, {})


@pytest.mark.parametrize("first", [[], [STRUCTURED_REPLY]])
def test_extended_headers(first: list[int]) -> None:  # S4, S5, S6, S8
    peer = connect()
    for number in [*first, EXTENDED_HEADERS]:
        assert ask(peer, number) == reply(number, ACK)
    assert refusal(ask(peer, EXTENDED_HEADERS), EXTENDED_HEADERS) == ERR_INVALID
    assert refusal(ask(peer, STRUCTURED_REPLY), STRUCTURED_REPLY) == ERR_EXT_HEADER_REQD
    assert go(peer) == Session(DISK, TransmissionFlag(PLAIN | DF), True, True, {})


def test_contexts_survive_the_upgrade_to_extended_headers() -> None:  # S9
    peer = connect()
    ask(peer, STRUCTURED_REPLY)
    ask(peer, SET_META, meta_data(b"disk", b"base:allocation"))
    ask(peer, EXTENDED_HEADERS)
    assert ask(peer, GO, info_data(b"disk")) == info_replies(GO, PLAIN | DF | FILTER)
    assert peer.session is not None
    assert peer.session.contexts == {0: "base:allocation"}


@pytest.mark.parametrize("data", [b"", b"data"])
def test_a_server_without_structured_replies_or_extended_headers(data: bytes) -> None:  # S10, S11
    peer = connect(structured=False, extended=False)
    for number in (STRUCTURED_REPLY, EXTENDED_HEADERS):
        assert refusal(ask(peer, number, data), number) == ERR_UNSUP
    assert go(peer) == Session(DISK, DISK.flags, False, False, {})


def test_falling_back_to_structured_replies() -> None:  # S11
    peer = connect(extended=False)
    assert refusal(ask(peer, EXTENDED_HEADERS), EXTENDED_HEADERS) == ERR_UNSUP
    assert ask(peer, STRUCTURED_REPLY) == reply(STRUCTURED_REPLY, ACK)
    assert go(peer).structured


# M: metadata contexts -----------------------------------------------------------------------------

ALLOCATION, DEPTH, BITMAP = [name.encode() for name in DISK.contexts]


@pytest.fixture(params=[STRUCTURED_REPLY, EXTENDED_HEADERS])
def peer(request: pytest.FixtureRequest) -> Peer:
    peer = connect()
    ask(peer, request.param)
    return peer


@pytest.mark.parametrize("queries, names", [
    ([], [ALLOCATION, DEPTH, BITMAP]),  # M3
    ([b"base:"], [ALLOCATION]),  # M5
    ([b"qemu:"], [DEPTH, BITMAP]),  # M10
    ([b"qemu:dirty-bitmap:"], [BITMAP]),  # M12
    ([b"x-a:b", b""], []),  # M17, M18
])  # fmt: skip
def test_list_meta_context(queries: list[bytes], names: list[bytes]) -> None:  # M1
    answer = ask(connect(), LIST_META, meta_data(b"disk", *queries))
    assert answer == contexts(LIST_META, *((0, name) for name in names))


def test_set_meta_context_without_structured_replies() -> None:  # M2
    peer = connect()
    assert refusal(ask(peer, SET_META, meta_data(b"disk", ALLOCATION)), SET_META) == ERR_INVALID
    assert go(peer).contexts == {}


@pytest.mark.parametrize("queries, ids", [
    ([], []),  # M4
    ([b"base:"], []),  # M6
    ([ALLOCATION], [0]),  # M7
    ([b"base:foo"], []),  # M8
    ([ALLOCATION, ALLOCATION], [0]),  # M9
    ([b"qemu:", b"qemu:dirty-bitmap:"], []),  # M11, M13
    ([BITMAP, DEPTH, ALLOCATION], [0, 1, 2]),  # M29
    ([BITMAP] * 1000, [2]),  # M30
    ([b"q" * 4097, DEPTH], [1]),  # M19
    ([b"qemu:dirty-bitmap:\xff", DEPTH], [1]),
])  # fmt: skip
def test_set_meta_context(peer: Peer, queries: list[bytes], ids: list[int]) -> None:
    names = [ALLOCATION, DEPTH, BITMAP]
    answer = ask(peer, SET_META, meta_data(b"disk", *queries))
    assert answer == contexts(SET_META, *((id_, names[id_]) for id_ in ids))
    session = go(peer)
    assert session.contexts == {id_: names[id_].decode() for id_ in ids}
    assert bool(session.flags & FILTER) == (session.extended and bool(ids))  # F10, F11


FAILING = [
    (b"", ERR_INVALID),  # M22
    (bytes(3), ERR_INVALID),
    (bytes(4), ERR_INVALID),
    (meta_data(b"disk", b"base:\0"), ERR_INVALID),  # M20
    (b"\0\0\0\4disk\0\0\0\1", ERR_INVALID),  # M21
    (b"\0\0\0\4disk\xff\xff\xff\xff", ERR_INVALID),
    (b"\0\0\0\4disk\0\0\0\1\0\0\0\7base:", ERR_INVALID),
    (meta_data(b"disk", ALLOCATION) + b"\0", ERR_INVALID),  # M23
    (meta_data(b"disk", ALLOCATION) + option(ABORT), ERR_INVALID),
    (meta_data(b"nosuch", ALLOCATION), ERR_UNKNOWN),  # M24
    (meta_data(b"\xff", ALLOCATION), ERR_UNKNOWN),
    (meta_data(b"n" * 4097, ALLOCATION), ERR_INVALID),
    (meta_data(b"disk", *[b""] * 2**15), ERR_TOO_BIG),  # M31
]


@pytest.mark.parametrize("data, error", FAILING)
def test_set_meta_context_that_fails(peer: Peer, data: bytes, error: int) -> None:  # M25
    ask(peer, SET_META, meta_data(b"disk", ALLOCATION))
    assert refusal(ask(peer, SET_META, data), SET_META) == error
    session = go(peer)
    assert session.contexts == {}
    assert not session.flags & FILTER


@pytest.mark.parametrize("data, error", FAILING)
def test_list_meta_context_that_fails(data: bytes, error: int) -> None:
    peer = connect()
    assert refusal(ask(peer, LIST_META, data), LIST_META) == error
    alive(peer)


def test_many_queries_within_the_limit(peer: Peer) -> None:  # M31
    queries = [b""] * 30_000
    assert ask(peer, SET_META, meta_data(b"disk", *queries)) == reply(SET_META, ACK)


def test_listing_leaves_the_selection(peer: Peer) -> None:  # M26
    ask(peer, SET_META, meta_data(b"disk", BITMAP))
    ask(peer, LIST_META, meta_data(b"disk"))
    ask(peer, LIST_META, b"")
    assert go(peer).contexts == {2: BITMAP.decode()}


def test_a_selection_replaces_the_one_before(peer: Peer) -> None:
    ask(peer, SET_META, meta_data(b"disk", BITMAP))
    ask(peer, SET_META, meta_data(b"disk", DEPTH))
    assert go(peer).contexts == {1: DEPTH.decode()}


def test_a_selection_for_another_export_is_void(peer: Peer) -> None:  # M27
    ask(peer, SET_META, meta_data("é".encode(), ALLOCATION))
    session = go(peer)
    assert session.contexts == {}
    assert not session.flags & FILTER


@pytest.mark.parametrize("set_name, go_name", [(b"", b"disk"), (b"disk", b""), (b"", b"")])
def test_an_alias_is_the_same_export(peer: Peer, set_name: bytes, go_name: bytes) -> None:  # M28
    ask(peer, SET_META, meta_data(set_name, ALLOCATION))
    assert go(peer, go_name).contexts == {0: "base:allocation"}


def test_an_export_that_changed_its_contexts_is_another_one() -> None:
    directory = Directory()
    peer = connect(directory)
    ask(peer, STRUCTURED_REPLY)
    ask(peer, SET_META, meta_data(b"disk", BITMAP))
    directory.exports[0] = ExportInfo("disk", "", 0, DISK.flags, DISK.block_size, DISK.contexts[:1])
    assert go(peer).contexts == {}


# F: transmission flags ----------------------------------------------------------------------------


@pytest.mark.parametrize("negotiated, queries, info, final", [
    ([], [], PLAIN, PLAIN),  # F4, F11
    ([STRUCTURED_REPLY], [], PLAIN | DF, PLAIN | DF),
    ([STRUCTURED_REPLY], [ALLOCATION], PLAIN | DF, PLAIN | DF),
    ([EXTENDED_HEADERS], [], PLAIN | DF | FILTER, PLAIN | DF),  # F9, F10
    ([EXTENDED_HEADERS], [b"base:"], PLAIN | DF | FILTER, PLAIN | DF),
    ([EXTENDED_HEADERS], [ALLOCATION], PLAIN | DF | FILTER, PLAIN | DF | FILTER),
])  # fmt: skip
def test_flags(negotiated: list[int], queries: list[bytes], info: int, final: int) -> None:
    peer = connect()
    for number in negotiated:
        ask(peer, number)
    ask(peer, SET_META, meta_data(b"disk", *queries))
    assert ask(peer, INFO, info_data(b"disk")) == info_replies(INFO, info)
    assert ask(peer, GO, info_data(b"disk")) == info_replies(GO, final)
    assert peer.session is not None
    assert peer.session.flags == final


# Anything at all ----------------------------------------------------------------------------------

OPTIONS = st.builds(option, st.integers(0, 13), st.binary(max_size=40))


@given(st.lists(OPTIONS, max_size=8))
def test_garbage_gets_answers_or_a_disconnect(messages: list[bytes]) -> None:
    peer = connect()
    for message in messages:
        try:
            peer.send(message)
        except ProtocolError:
            return
        answer = peer.received()
        if peer.over:
            return
        assert answer[:12] == struct.pack(">Q", 0x3E889045565A9) + message[8:12]


def test_cut_short_at_every_byte() -> None:
    for end in range(len(CONVERSATION)):
        peer = Peer(negotiate(Directory()))
        peer.send(CONVERSATION[:end])
        assert not peer.over
        peer.negotiation.close()


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_options": 5}, {"max_option_bytes": 5 * (16 + 8)}], ids=str)
def test_options_without_end(limit: dict[str, int]) -> None:
    """Rows H14 and H18: as many as are allowed are served, and with one more it is over."""
    peer = Peer(negotiate(Directory(), **limit))
    peer.send(struct.pack(">I", 3) + option(99, bytes(8)) * 5)
    assert peer.received().count(struct.pack(">QI", 0x3E889045565A9, 99)) == 5
    with pytest.raises(ProtocolError, match="no end of them"):
        peer.send(option(99, bytes(8)))


def test_options_without_a_limit() -> None:
    peer = Peer(negotiate(Directory()))
    peer.send(struct.pack(">I", 3) + option(99) * 5000 + option(ABORT))
    assert peer.over
