"""Rows H: the greeting, and how options are framed."""

from __future__ import annotations

import struct
import time
from contextlib import suppress

import pytest

from tests.conformance.answers import check_error, dropped, go_on, refusal
from tests.conformance.client import (
    Cmd,
    Disconnected,
    Mode,
    Option,
    OptionReply,
    Rep,
    client_flags,
    info_data,
    meta_data,
    opening,
    option,
    request,
)
from tests.conformance.conftest import StartServer
from tests.conformance.malformed import Stimulus, of_row
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import RAW_SIZE, RO_SIZE, pattern
from tests.conformance.stimuli_negotiation import STIMULI

RO_REPLY = struct.pack(">QH", RO_SIZE, 0x50F)
"""What EXPORT_NAME gets for ``ro``: its size and flags."""

every_mode = pytest.mark.parametrize("mode", Mode)


@row("H1")
def test_greeting(server: RunningServer) -> None:
    with server.connect() as peer:
        assert peer.read(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        peer.expect_silence()
        peer.send(client_flags())
        go_on(peer)


@pytest.mark.parametrize(
    "flags, reply",
    [
        pytest.param(0, RO_REPLY + bytes(124), marks=row("H2")),
        pytest.param(1, RO_REPLY + bytes(124), marks=row("H3")),
        pytest.param(2, RO_REPLY, marks=row("H4")),
        pytest.param(3, RO_REPLY, marks=row("H4")),
    ],
)
def test_padding_of_export_name(server: RunningServer, flags: int, reply: bytes) -> None:
    with server.connect() as peer:
        peer.greet(flags)
        peer.send(option(Option.EXPORT_NAME, b"ro"))
        assert peer.read(len(reply)) == reply
        assert peer.pread(64, 16) == pattern(64, 16)


@row("H5", "H6")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "H5", "H6"), ids=str)
def test_client_flags_that_end_the_session(server: RunningServer, stimulus: Stimulus) -> None:
    dropped(server, stimulus)


@row("H7")
def test_no_zeroes_is_never_masked(server: RunningServer) -> None:
    """There is no way to mask it, and so a client may always set it."""
    with server.connect() as peer:
        assert peer.read_greeting() & 2
        peer.send(client_flags(3))
        go_on(peer)


@row("H8")
@pytest.mark.parametrize("script", [b"", client_flags(), client_flags()[:2]])
def test_port_scan(server: RunningServer, script: bytes) -> None:
    before = server.descriptors()
    for _ in range(20):
        with server.connect() as peer:
            peer.read_greeting()
            peer.send(script)
        with server.connect() as peer:
            peer.send_anyway(script)  # without a look at the greeting
    server.wait_for_descriptors(before)


@row("H9")
def test_handshake_deadline(start_server: StartServer) -> None:
    server = start_server("--handshake-limit", "0.4")
    with server.connect() as idle, server.connect() as busy, server.enter() as negotiated:
        started = time.monotonic()
        idle.greet()
        busy.greet()
        with suppress(Disconnected):
            while time.monotonic() - started < 2:
                busy.option(Option.LIST)  # who keeps talking has no more time than who idles
        idle.expect_disconnect()
        assert 0.2 < time.monotonic() - started < 2
        assert negotiated.pread(0, 16) == pattern(0, 16)
    server.check()


@row("H10")
@every_mode
def test_one_byte_at_a_time(server: RunningServer, mode: Mode) -> None:
    with server.connect() as peer:
        peer.read_greeting()
        peer.send_bytewise(opening(mode, "ro"))
        if mode is not Mode.SIMPLE:
            assert peer.read_option_reply().type == Rep.ACK
        assert peer.read_option_replies(Option.GO)[-1].type == Rep.ACK
        peer.mode = mode
        peer.send_bytewise(request(mode, Cmd.READ, 8, 16, cookie=77))
        reply = peer.reply(8, 16)
        assert (reply.cookie, reply.error, reply.data) == (77, 0, pattern(8, 16))


@row("H11")
@every_mode
def test_pipelined_options(server: RunningServer, mode: Mode) -> None:
    """Everything in one segment, up to the first request."""
    codes = [Option.LIST, 99, Option.INFO, Option.LIST_META_CONTEXT]
    data = [b"", b"", info_data("odd"), meta_data("qcow2")]
    script = client_flags() + b"".join(map(option, codes, data))
    script += opening(mode, "ro").removeprefix(client_flags())
    with server.connect() as peer:
        peer.read_greeting()
        peer.send(script + request(mode, Cmd.READ, 8, 16, cookie=77))
        answers = [peer.read_option_replies(code)[-1].type for code in codes]
        assert answers == [Rep.ACK, Rep.ERR_UNSUP, Rep.ACK, Rep.ACK]
        if mode is not Mode.SIMPLE:
            assert peer.read_option_reply().type == Rep.ACK
        assert peer.read_option_replies(Option.GO)[-1].type == Rep.ACK
        peer.mode = mode
        assert peer.reply(8, 16).data == pattern(8, 16)
        assert peer.pread(0, 16) == pattern(0, 16)


@row("H12", "H13")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "H12", "H13"), ids=str)
def test_framing_that_ends_the_session(server: RunningServer, stimulus: Stimulus) -> None:
    with server.flat_memory():
        dropped(server, stimulus)


@row("H14")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "H14"), ids=str)
def test_long_unknown_option(server: RunningServer, stimulus: Stimulus) -> None:
    with server.flat_memory():
        assert refusal(server, stimulus).type == Rep.ERR_UNSUP


@row("H15", "H16")
@pytest.mark.parametrize("code", [99, 0, Option.PEEK_EXPORT, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", bytes(10)], ids=["no data", "data"])
def test_unknown_option(server: RunningServer, code: int, data: bytes) -> None:
    with server.connect() as peer:
        peer.greet()
        reply, _ = peer.refused(code, data)
        assert reply == Rep.ERR_UNSUP
        go_on(peer)


@row("H17")
@pytest.mark.parametrize("code", [99, 0xFFFFFFFF, Option.LIST, Option.STRUCTURED_REPLY])
def test_option_reply_header(server: RunningServer, code: int) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.send(option(code))
        while True:
            magic = peer.read(8)
            assert magic == bytes.fromhex("0003e889045565a9")
            echoed, kind, length = struct.unpack(">III", peer.read(12))
            assert echoed == code
            data = peer.read(length)
            if kind != Rep.SERVER:
                break
        assert (kind == Rep.ACK) == (data == b"")
        # Exactly that long: what comes next is the next reply.
        peer.send(option(Option.ABORT))
        assert peer.read_option_reply() == (Option.ABORT, Rep.ACK, b"")


@row("H18")
def test_any_number_of_options(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        for _ in range(200):
            assert peer.refused(99)[0] == Rep.ERR_UNSUP
            assert peer.info(Option.INFO, "raw").size == RAW_SIZE
        go_on(peer)


@row("H19")
@pytest.mark.parametrize(
    "name", ["x" * 4096, "ü" * 2048, "\x1b[2J\n" * 30, "\ufffd\U0001f600" * 99]
)
def test_error_text(server: RunningServer, name: str) -> None:
    with server.connect() as peer:
        peer.greet()
        for code in (Option.INFO, Option.GO):
            (reply,) = peer.option(code, info_data(name))
            check_error(reply)
            assert name[:81] not in reply.data.decode(), "it quotes too much of the name"
            assert reply.data.decode().isprintable()
        go_on(peer)


@row("H19")
def test_every_refusal_has_a_text(server: RunningServer) -> None:
    """The rows O, S and M hold their refusals to it as well: `refusal` looks."""
    with server.connect() as peer:
        peer.greet()
        for code in range(3, 20):
            peer.send(option(code, b"\xff\0" * 8))
            check_error(OptionReply(*peer.read_option_reply()))
        go_on(peer)
