"""The client's STARTTLS: what it accepts in clear is the acknowledgement, and nothing else.

"TLS support" and "NBD_OPT_STARTTLS" of the NBD specification.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from pynbd.errors import OptionError, ProtocolError
from pynbd.protocol.handshake import Read, StartTls, Step, TlsMode, Write, negotiate
from pynbd.protocol.handshake_client import enter, survey
from tests.protocol.test_handshake import DISK, Directory
from tests.protocol.test_handshake_client import (
    ACK,
    ASK,
    EXTENDED_HEADERS,
    GO,
    GONE,
    GREETING,
    INFO,
    LIST,
    REP_INFO,
    SERVER,
    STARTTLS,
    converse,
    info_export,
    name,
    option,
    reply,
)

STARTED = reply(STARTTLS, ACK)
ERRORS = [
    (0x80000001, "NBD_REP_ERR_UNSUP"),
    (0x80000002, "NBD_REP_ERR_POLICY"),
    (0x80000003, "NBD_REP_ERR_INVALID"),
    (0x80000004, "NBD_REP_ERR_PLATFORM"),
    (0x80000005, "NBD_REP_ERR_TLS_REQD"),
    (0x80000007, "NBD_REP_ERR_SHUTDOWN"),
    (0x80001234, "0x80001234"),
]
KINDS: list[Callable[[], Any]] = [
    lambda: enter("disk", ["base:allocation"], tls=True),
    lambda: survey(tls=True),
]
both = pytest.mark.parametrize("steps", KINDS, ids=["enter", "survey"])


def test_tls_comes_first() -> None:
    """Nothing is negotiated in clear: it would have to be forgotten."""
    through = reply(EXTENDED_HEADERS, ACK) + GONE
    session, clear, secure = converse(enter("disk", tls=True), GREETING + STARTED, through)
    assert clear == b"\0\0\0\3" + option(STARTTLS)
    assert secure == option(EXTENDED_HEADERS) + option(GO, ASK)
    assert session.extended


def test_a_listing_through_tls() -> None:
    through = reply(EXTENDED_HEADERS, ACK) + reply(LIST, SERVER, name(b"a")) + reply(LIST, ACK)
    through += reply(INFO, REP_INFO, info_export()) + reply(INFO, ACK)
    through += reply(9, 0x80000001)
    exports, clear, _ = converse(survey(tls=True), GREETING + STARTED, through)
    assert clear == b"\0\0\0\3" + option(STARTTLS)
    assert [export.name for export in exports] == ["a"]


@both
@pytest.mark.parametrize("error, text", ERRORS)
def test_a_server_that_refuses(steps: Callable[[], Any], error: int, text: str) -> None:
    """Whoever wants TLS gets it, or nothing: no attempt is made without."""
    with pytest.raises(OptionError, match=f"NBD_OPT_STARTTLS: {text}: no.TLS"):
        converse(steps(), GREETING + reply(STARTTLS, error, b"no\nTLS"))


@both
@pytest.mark.parametrize(
    "said, text",
    [
        (reply(STARTTLS, ACK, b"x"), "NBD_REP_ACK to NBD_OPT_STARTTLS with data"),
        (reply(STARTTLS, REP_INFO, info_export()), "NBD_REP_INFO as a reply to NBD_OPT_STARTTLS"),
        (reply(STARTTLS, SERVER, name(b"a")), "NBD_REP_SERVER as a reply to NBD_OPT_STARTTLS"),
        (reply(GO, ACK), "a reply to NBD_OPT_GO where NBD_OPT_STARTTLS was asked"),
        (reply(EXTENDED_HEADERS, ACK) + STARTED, "where NBD_OPT_STARTTLS was asked"),
        (b"\x16\3\3\0\x7a" + bytes(15), "wrong magic number"),
        (b"\x15\3\3\0\2\2\x28" + bytes(13), "wrong magic number"),
    ],
)
def test_a_breach(steps: Callable[[], Any], said: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        converse(steps(), GREETING + said)


@both
@pytest.mark.parametrize("injected", [GONE, reply(EXTENDED_HEADERS, ACK), b"\0", bytes(4096)])
def test_what_a_server_injects_is_not_read(steps: Callable[[], Any], injected: bytes) -> None:
    """The step after the acknowledgement is `StartTls`, whatever else has come."""
    negotiation = steps()
    said, step, asked = GREETING + STARTED + injected, next(negotiation), 0
    while not isinstance(step, StartTls):
        data = None
        if isinstance(step, Read):
            data = said[asked : asked + step.size]
            asked += step.size
        step = negotiation.send(data)
    assert asked == len(GREETING + STARTED)


@both
def test_a_server_without_fixed_newstyle(steps: Callable[[], Any]) -> None:
    """It knows no STARTTLS: nothing is asked of it."""
    with pytest.raises(OptionError, match=r"the server is too old for (TLS|NBD_OPT_LIST)"):
        converse(steps(), GREETING[:-2] + b"\0\0")
    with pytest.raises(OptionError, match=r"the server is too old for (TLS|NBD_OPT_LIST)"):
        converse(steps(), GREETING[:-2] + b"\0\2")


@both
def test_an_oldstyle_server(steps: Callable[[], Any]) -> None:
    with pytest.raises(ProtocolError, match="oldstyle"):
        converse(steps(), b"NBDMAGIC" + struct.pack(">QH", 0x420281861253, 0))


def test_a_server_that_requires_tls_of_a_client_without() -> None:
    with pytest.raises(OptionError, match="NBD_REP_ERR_TLS_REQD"):
        converse(enter("disk"), GREETING + reply(EXTENDED_HEADERS, 0x80000005, b"TLS, please"))


@pytest.mark.parametrize("mode", [TlsMode.FORCEDTLS, TlsMode.SELECTIVETLS])
def test_both_sides_agree(mode: TlsMode) -> None:
    """They begin TLS at the same moment, with nothing on its way."""
    server, client = negotiate(Directory(), tls=mode), enter("disk", ["base:"], tls=True)
    towards: dict[Any, bytes] = {server: b"", client: b""}
    steps: dict[Any, Step] = {server: next(server), client: next(client)}
    ended: dict[Any, Any] = {}
    hands = 0
    while len(ended) < 2:
        if all(isinstance(step, StartTls) for step in steps.values()):
            assert not any(towards.values())
            hands += 1
            steps = {side: side.send(None) for side in (server, client)}
        for side, other in ((server, client), (client, server)):
            while side not in ended and not isinstance(step := steps[side], StartTls):
                answer = None
                if isinstance(step, Write):
                    towards[other] += step.data
                elif not isinstance(step, Read) or len(towards[side]) < step.size:
                    break
                else:
                    answer, towards[side] = towards[side][: step.size], towards[side][step.size :]
                try:
                    steps[side] = side.send(answer)
                except StopIteration as end:
                    ended[side] = end.value
    assert hands == 1
    assert ended[client].contexts == ended[server].contexts == {0: DISK.contexts[0]}
