"""STARTTLS in the three modes, as far as no socket is needed: rows T1 to T5, T7, T8, T10, T16, T17.

"TLS support" of the NBD specification. The bytes are put together in `test_handshake`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import product

import pytest

from pynbd.errors import ProtocolError
from pynbd.protocol.handshake import ExportInfo, Session, StartTls, TlsMode, negotiate
from tests.protocol.test_handshake import (
    ABORT,
    ACK,
    DF,
    DISK,
    ERR_INVALID,
    ERR_POLICY,
    ERR_SHUTDOWN,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FILTER,
    GO,
    GREETING,
    INFO,
    LIST,
    LIST_META,
    MIB,
    OTHER,
    PEEK_EXPORT,
    PLAIN,
    SET_META,
    STARTTLS,
    STRUCTURED_REPLY,
    Directory,
    Peer,
    alive,
    ask,
    go,
    info_data,
    info_replies,
    meta_data,
    option,
    refusal,
    reply,
)

ERR_TLS_REQD = 0x80000005
MODES = list(TlsMode)
with_tls = pytest.mark.parametrize("mode", [TlsMode.FORCEDTLS, TlsMode.SELECTIVETLS])
FINDING = [INFO, GO, LIST_META, SET_META]
EVERY = [*range(3, 13), 0, 99, 0xFFFFFFFF]
"""Every option but EXPORT_NAME and ABORT, known or not."""
GOOD = {
    INFO: info_data(b"disk"),
    GO: info_data(b"disk"),
    LIST_META: meta_data(b"disk"),
    SET_META: meta_data(b"disk", b"base:allocation"),
}
HIDDEN = ExportInfo("hidden", "", MIB, DISK.flags, DISK.block_size, DISK.contexts)


class Selective(Directory):
    """``hidden`` is there through TLS only."""

    secure = False

    def find(self, name: str) -> ExportInfo | None:
        return HIDDEN if name == "hidden" and self.secure else super().find(name)

    def listing(self) -> Iterable[ExportInfo] | None:
        return [*self.exports, *[HIDDEN] * self.secure]


def connect(mode: TlsMode, directory: Directory | None = None, *, flags: int = 3) -> Peer:
    peer = Peer(negotiate(directory or Directory(), tls=mode))
    assert peer.received() == GREETING
    peer.send(struct.pack(">I", flags))
    return peer


def start_tls(peer: Peer) -> None:
    """STARTTLS, and a handshake that succeeds."""
    assert peer.received() == b""
    peer.send(option(STARTTLS))
    assert peer.received() == reply(STARTTLS, ACK)
    assert peer.step == StartTls()
    peer.shaken_hands()


@pytest.mark.parametrize("data, error", [(b"", ERR_POLICY), (b"data", ERR_INVALID)])
def test_a_server_without_tls(data: bytes, error: int) -> None:  # T1
    peer = connect(TlsMode.NOTLS)
    for _ in range(2):
        assert refusal(ask(peer, STARTTLS, data), STARTTLS) == error
    alive(peer)


@pytest.mark.parametrize("number", [each for each in EVERY if each != STARTTLS])
@pytest.mark.parametrize("data", [None, b"", b"data", bytes(200_000)])
def test_an_option_in_clear_where_tls_is_required(number: int, data: bytes | None) -> None:  # T2
    """Whatever it is, and whatever its data are: they are not even kept."""
    peer = connect(TlsMode.FORCEDTLS)
    said = GOOD.get(number, b"") if data is None else data
    for _ in range(2):
        assert refusal(ask(peer, number, said), number) == ERR_TLS_REQD
    assert peer.most_held == 16
    start_tls(peer)
    assert go(peer) == Session(DISK, DISK.flags, False, False, {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("data", [b"", b"bye", bytes(5000)], ids=len)
def test_abort_in_clear(mode: TlsMode, data: bytes) -> None:  # T3
    peer = connect(mode)
    assert ask(peer, ABORT, data) == reply(ABORT, ACK)
    assert peer.over
    assert peer.session is None


@pytest.mark.parametrize("name", [b"", b"disk", b"nosuch"])
def test_export_name_in_clear_where_tls_is_required(name: bytes) -> None:  # T4
    peer = connect(TlsMode.FORCEDTLS)
    with pytest.raises(ProtocolError, match="where TLS is required"):
        peer.send(option(EXPORT_NAME, name))
    assert peer.received() == b""


@with_tls
@pytest.mark.parametrize("data", [b"x", bytes(200_000)], ids=len)
def test_starttls_with_data(mode: TlsMode, data: bytes) -> None:  # T5
    peer = connect(mode)
    assert refusal(ask(peer, STARTTLS, data), STARTTLS) == ERR_INVALID
    start_tls(peer)
    assert refusal(ask(peer, STARTTLS, data), STARTTLS) == ERR_INVALID
    alive(peer)


@with_tls
def test_no_byte_is_asked_for_before_tls(mode: TlsMode) -> None:  # T6, T9
    """The step after the acknowledgement is `StartTls`: who drives it has read nothing else."""
    peer = connect(mode)
    peer.send(option(STARTTLS) + option(STRUCTURED_REPLY))
    assert peer.received() == reply(STARTTLS, ACK)
    assert peer.step == StartTls()
    assert bytes(peer.unread) == option(STRUCTURED_REPLY)


@with_tls
def test_starttls_in_tls(mode: TlsMode) -> None:  # T7
    peer = connect(mode)
    start_tls(peer)
    for _ in range(2):
        assert refusal(ask(peer, STARTTLS), STARTTLS) == ERR_INVALID
    ask(peer, STRUCTURED_REPLY)
    assert refusal(ask(peer, STARTTLS), STARTTLS) == ERR_INVALID
    assert go(peer).structured


@with_tls
@pytest.mark.parametrize("number", EVERY)
@pytest.mark.parametrize("data", [b"", b"data", info_data(b"nosuch"), meta_data(b"nosuch")])
def test_nothing_requires_tls_in_tls(mode: TlsMode, number: int, data: bytes) -> None:  # T8
    """The answers are those of a server that has never heard of TLS; but to STARTTLS."""
    secure, plain = connect(mode, Selective()), connect(TlsMode.NOTLS)
    start_tls(secure)
    answer = ask(secure, number, data)
    assert struct.pack(">I", ERR_TLS_REQD) not in answer[12:16]
    if number != STARTTLS:
        assert answer == ask(plain, number, data)


@with_tls
def test_export_name_and_abort_in_tls(mode: TlsMode) -> None:  # T8
    peer = connect(mode)
    start_tls(peer)
    assert ask(peer, EXPORT_NAME, b"disk") == struct.pack(">QH", 0x10000, PLAIN)
    peer = connect(mode)
    start_tls(peer)
    assert ask(peer, ABORT) == reply(ABORT, ACK)
    peer = connect(mode)
    start_tls(peer)
    with pytest.raises(ProtocolError, match="there is no export"):
        peer.send(option(EXPORT_NAME, b"nosuch"))


NEGOTIATED = [STRUCTURED_REPLY, EXTENDED_HEADERS, SET_META]


@pytest.mark.parametrize(
    "before, after",
    [
        ([each for each, wanted in zip(NEGOTIATED, first, strict=True) if wanted], second)
        for first in product([False, True], repeat=3)
        for second in ([], [STRUCTURED_REPLY], [EXTENDED_HEADERS], [STRUCTURED_REPLY, SET_META])
    ],
)
def test_what_was_negotiated_in_clear_is_forgotten(before: list[int], after: list[int]) -> None:
    """T10: the session is that of a client who has begun with STARTTLS."""
    peer, fresh = connect(TlsMode.SELECTIVETLS), connect(TlsMode.SELECTIVETLS)
    for number in before:
        ask(peer, number, GOOD.get(number, b""))
    start_tls(peer)
    start_tls(fresh)
    for number in after:
        data = GOOD.get(number, b"")
        answer = ask(peer, number, data)
        assert answer == ask(fresh, number, data)
        assert answer.endswith(reply(number, ACK))
    flags = PLAIN | (DF if after else 0)
    filtered = FILTER if after == [EXTENDED_HEADERS] else 0  # INFO offers what may yet be selected
    assert ask(peer, INFO, GOOD[INFO]) == info_replies(INFO, flags | filtered)
    assert ask(peer, GO, GOOD[GO]) == info_replies(GO, flags)
    assert peer.session == Session(
        DISK,
        DISK.flags | (DF if after else 0),
        bool(after),
        EXTENDED_HEADERS in after,
        {0: "base:allocation"} if SET_META in after else {},
    )


def test_a_starttls_that_fails_forgets_nothing() -> None:
    for mode, data in ((TlsMode.NOTLS, b""), (TlsMode.SELECTIVETLS, b"x")):
        peer = connect(mode)
        ask(peer, STRUCTURED_REPLY)
        ask(peer, SET_META, GOOD[SET_META])
        refusal(ask(peer, STARTTLS, data), STARTTLS)
        assert go(peer).contexts == {0: "base:allocation"}


@pytest.mark.parametrize("mode", MODES)
def test_starttls_without_fixed_newstyle(mode: TlsMode) -> None:  # T16
    with pytest.raises(ProtocolError, match="without NBD_FLAG_C_FIXED_NEWSTYLE"):
        connect(mode, flags=2).send(option(STARTTLS))


@pytest.mark.parametrize("number", FINDING)
@pytest.mark.parametrize("name", [b"hidden", b"nosuch"])
def test_an_export_that_is_there_through_tls_only(number: int, name: bytes) -> None:  # T17
    """In clear it gets the answer of an unknown one, byte for byte: that TLS is required where the
    specification allows to say so.
    """
    make = meta_data if number in (LIST_META, SET_META) else info_data
    peer = connect(TlsMode.SELECTIVETLS, Selective())
    ask(peer, STRUCTURED_REPLY)
    answer = ask(peer, number, make(name))
    expected = ERR_TLS_REQD if number in (INFO, GO) else ERR_UNKNOWN
    assert refusal(answer, number) == expected
    other = ask(peer, number, make(b"nobody"))
    assert answer[20:].replace(name, b"nobody") == other[20:]
    alive(peer)


@pytest.mark.parametrize("name", [b"hidden", b"nosuch"])
def test_export_name_of_one_that_is_there_through_tls_only(name: bytes) -> None:  # T17
    peer = connect(TlsMode.SELECTIVETLS, Selective())
    with pytest.raises(ProtocolError):
        peer.send(option(EXPORT_NAME, name))
    assert peer.received() == b""


def test_selective_in_clear_and_in_tls() -> None:  # T17
    directory = Selective()
    peer = connect(TlsMode.SELECTIVETLS, directory)
    in_clear = ask(peer, LIST)
    assert b"hidden" not in in_clear
    assert go(connect(TlsMode.SELECTIVETLS, directory)).export == DISK
    start_tls(peer)
    directory.secure = True
    assert b"hidden" in ask(peer, LIST)
    assert refusal(ask(peer, INFO, info_data(b"nosuch")), INFO) == ERR_UNKNOWN
    assert go(peer, b"hidden").export == HIDDEN


@pytest.mark.parametrize("number", [each for each in EVERY if each not in (INFO, GO)])
@pytest.mark.parametrize("data", [b"", b"data", info_data(b"nosuch"), meta_data(b"nosuch")])
def test_what_may_not_say_that_tls_is_required(number: int, data: bytes) -> None:  # T17
    """In SELECTIVETLS only INFO, GO and EXPORT_NAME may; in NOTLS nothing."""
    for mode in (TlsMode.SELECTIVETLS, TlsMode.NOTLS):
        answer = ask(connect(mode, Selective()), number, data)
        assert answer[12:16] != struct.pack(">I", ERR_TLS_REQD)


@pytest.mark.parametrize("number", [INFO, GO])
def test_a_server_without_tls_never_requires_it(number: int) -> None:  # T1
    peer = connect(TlsMode.NOTLS, Selective())
    assert refusal(ask(peer, number, info_data(b"hidden")), number) == ERR_UNKNOWN


@with_tls
def test_data_that_are_no_request_are_invalid_in_clear(mode: TlsMode) -> None:
    """Where they are looked at."""
    expected = ERR_TLS_REQD if mode is TlsMode.FORCEDTLS else ERR_INVALID
    assert refusal(ask(connect(mode), INFO, b"data"), INFO) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [STARTTLS, LIST, GO, 99])
def test_a_stopping_server(mode: TlsMode, number: int) -> None:
    """No handshake begins any more."""
    peer = connect(mode, Directory(stopping=True))
    error = refusal(ask(peer, number), number)
    assert error == ERR_SHUTDOWN
    assert ask(peer, ABORT) == reply(ABORT, ACK)


def test_contexts_of_one_export_and_another_session() -> None:
    """Selected in TLS: rights do not come from an order of options."""
    peer = connect(TlsMode.SELECTIVETLS)
    ask(peer, STRUCTURED_REPLY)
    ask(peer, SET_META, GOOD[SET_META])
    start_tls(peer)
    ask(peer, STRUCTURED_REPLY)
    assert go(peer, OTHER.name.encode()).contexts == {}


CONVERSATION = [
    option(PEEK_EXPORT, b"data"),
    option(STRUCTURED_REPLY),
    option(SET_META, GOOD[SET_META]),
    option(STARTTLS, b"x"),
    option(STARTTLS),
]
THROUGH = [option(STARTTLS), option(EXTENDED_HEADERS), option(GO, GOOD[GO])]


@with_tls
def test_one_byte_at_a_time(mode: TlsMode) -> None:
    whole, slow = connect(mode), connect(mode)
    for part in (CONVERSATION, THROUGH):
        whole.send(b"".join(part))
        for byte in b"".join(part):
            slow.send(bytes([byte]))
        assert slow.received() == whole.received()
        assert slow.step == whole.step
        if part is CONVERSATION:
            assert whole.step == StartTls()
            whole.shaken_hands()
            slow.shaken_hands()
    assert slow.session == whole.session
    assert slow.session
    assert slow.session.extended


@pytest.mark.parametrize(
    "number", [each for each in EVERY if each not in (3, 5, 6, 7, 8, 9, 10, 11)]
)
def test_unknown_options_where_tls_is_a_choice(number: int) -> None:
    for secure in (False, True):
        peer = connect(TlsMode.SELECTIVETLS)
        if secure:
            start_tls(peer)
        assert refusal(ask(peer, number, b"data"), number) == ERR_UNSUP
        alive(peer)
