"""Rows O: EXPORT_NAME, ABORT, LIST, INFO and GO."""

from __future__ import annotations

import signal
import struct
import time

import pytest

from tests.conformance.answers import check_error, dropped, go_on, refusal
from tests.conformance.client import (
    DEADLINE,
    Cmd,
    Info,
    Mode,
    Option,
    Rep,
    client_flags,
    info_data,
    meta_data,
    option,
)
from tests.conformance.conftest import StartServer
from tests.conformance.malformed import Stimulus, of_row
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import (
    CLUSTER,
    DESCRIPTION,
    ODD_SIZE,
    RAW_SIZE,
    UNICODE,
    pattern,
)
from tests.conformance.stimuli_negotiation import STIMULI

PLAIN = ["raw", "ro", "qcow2", "empty", "odd", "single", "broken", "fragments", UNICODE]
EXPORTS = dict.fromkeys(PLAIN, "") | {"described": DESCRIPTION}

info_and_go = pytest.mark.parametrize("code", [Option.INFO, Option.GO], ids=lambda code: code.name)


# EXPORT_NAME


@row("O1")
@pytest.mark.parametrize("name", ["nosuch", "RAW", "raw ", "n" * 4096])
def test_export_name_unknown(server: RunningServer, name: str) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.send(option(Option.EXPORT_NAME, name.encode()))
        peer.expect_disconnect()


@row("O2", "O3", "O4")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "O2", "O3", "O4"), ids=str)
def test_export_name_that_ends_the_session(server: RunningServer, stimulus: Stimulus) -> None:
    dropped(server, stimulus)


@row("O5")
def test_export_name_with_structured_replies(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.STRUCTURED)
        ids = peer.meta(Option.SET_META_CONTEXT, "qcow2", ["qemu:allocation-depth"])
        peer.send(option(Option.EXPORT_NAME, b"qcow2"))
        assert peer.read(10) == struct.pack(">QH", 16 * CLUSTER, 0x50F | 0x80)
        status = peer.ask(Cmd.BLOCK_STATUS, 0, 4 * CLUSTER).status
        assert status == {ids["qemu:allocation-depth"]: [(3 * CLUSTER, 1), (CLUSTER, 2)]}
        reply = peer.ask(Cmd.READ, 0, 16, flags=4)  # NBD_CMD_FLAG_DF
        assert (reply.error, reply.data) == (0, b"\1" * 16)


# ABORT


@row("O6", "O7")
@pytest.mark.parametrize("data", [b"", b"data", bytes(1 << 20)], ids=len)
def test_abort(server: RunningServer, data: bytes) -> None:
    with server.connect() as peer:
        peer.greet()
        assert peer.acknowledged(Option.ABORT, data) == []
        peer.expect_disconnect()


@row("O8")
def test_abort_and_gone(server: RunningServer) -> None:
    before = server.descriptors()
    for _ in range(20):
        with server.connect() as peer:
            peer.greet()
            peer.send(option(Option.ABORT))
    server.wait_for_descriptors(before)


# LIST


@row("O9", "O11")
def test_list(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        assert peer.listing() == EXPORTS
        assert peer.listing() == EXPORTS
        go_on(peer)


@row("O9")
def test_list_bytes(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        replies = peer.option(Option.LIST)
        assert {reply.type for reply in replies[:-1]} == {Rep.SERVER}
        assert replies[-1] == (Option.LIST, Rep.ACK, b"")
        payloads = [reply.data for reply in replies]
        assert b"\0\0\0\3raw" in payloads
        assert b"\0\0\0\x09described" + DESCRIPTION.encode() in payloads
        go_on(peer)


@row("O10")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "O10"), ids=str)
def test_list_with_data(server: RunningServer, stimulus: Stimulus) -> None:
    assert refusal(server, stimulus).type == Rep.ERR_INVALID


@row("O12", "O31")
def test_no_exports(start_server: StartServer) -> None:
    with start_server("--no-exports").connect() as peer:
        peer.greet()
        assert peer.listing() == {}
        for code in (Option.INFO, Option.GO):
            assert peer.refused(code, info_data(""))[0] == Rep.ERR_UNKNOWN
        assert peer.acknowledged(Option.ABORT) == []


@row("O13")
def test_list_is_not_allowed(start_server: StartServer) -> None:
    with start_server("--unlisted").connect() as peer:
        peer.greet()
        assert peer.refused(Option.LIST)[0] == Rep.ERR_POLICY
        go_on(peer)


# INFO and GO that fail


@row("O14", "O15", "O16", "O17", "O20", "O22", "O23")
@pytest.mark.parametrize(
    "stimulus", of_row(STIMULI, "O14", "O15", "O16", "O17", "O20", "O22", "O23"), ids=str
)
def test_malformed_info(server: RunningServer, stimulus: Stimulus) -> None:
    with server.flat_memory():
        assert refusal(server, stimulus).type == Rep.ERR_INVALID


@row("O21")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "O21"), ids=str)
def test_name_not_utf8(server: RunningServer, stimulus: Stimulus) -> None:
    assert refusal(server, stimulus).type == Rep.ERR_UNKNOWN


@row("O18", "O19", "O30")
@info_and_go
@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000, 3000, 4096])
def test_unknown_export(server: RunningServer, code: int, length: int) -> None:
    with server.connect() as peer:
        peer.greet()
        (reply,) = peer.option(code, info_data("n" * length, [1, 2, 3]))
        assert reply.type == Rep.ERR_UNKNOWN
        check_error(reply)
        go_on(peer)


@row("O33")
@info_and_go
def test_failure_then_another_export(server: RunningServer, code: int) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.EXTENDED)
        assert peer.refused(code, info_data("nosuch"))[0] == Rep.ERR_UNKNOWN
        assert peer.info(Option.INFO, "odd").size == ODD_SIZE
        assert peer.refused(code, info_data("nosuch"))[0] == Rep.ERR_UNKNOWN
        go_on(peer)


@row("O35")
@info_and_go
def test_failure_after_extended_headers(server: RunningServer, code: int) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.EXTENDED)
        for data, reply in [
            (info_data("nosuch"), Rep.ERR_UNKNOWN),
            (info_data("raw\0"), Rep.ERR_INVALID),
            (b"", Rep.ERR_INVALID),
        ]:
            assert peer.refused(code, data)[0] == reply
        go_on(peer)


# INFO and GO that succeed


@row("O24")
@info_and_go
def test_unknown_and_duplicate_requests(server: RunningServer, code: int) -> None:
    with server.connect() as peer:
        peer.greet()
        # `info` asserts that nothing is told twice.
        told = peer.info(code, "ro", [77, Info.NAME, Info.NAME, 0xFFFF, Info.EXPORT, Info.NAME, 3])
        assert set(told.infos) == {Info.EXPORT, Info.NAME, Info.BLOCK_SIZE}
        if code == Option.INFO:
            peer.info(Option.GO, "ro")
        assert peer.pread(0, 16) == pattern(0, 16)


@row("O25")
def test_info_changes_nothing(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        told = peer.info(Option.INFO, "odd")
        assert told.infos[Info.EXPORT] == struct.pack(">HQH", 0, ODD_SIZE, 0xD6D)
        assert len(told.infos[Info.EXPORT]) == 12
        assert peer.listing() == EXPORTS
        peer.headers(Mode.STRUCTURED)
        assert peer.info(Option.INFO, "raw").size == RAW_SIZE
        go_on(peer)


@row("O26")
@pytest.mark.parametrize("asked, name", [("raw", "raw"), ("", "raw"), (UNICODE, UNICODE)])
def test_canonical_name(server: RunningServer, asked: str, name: str) -> None:
    with server.connect() as peer:
        peer.greet()
        assert (
            peer.info(Option.INFO, asked, [Info.NAME]).infos[Info.NAME] == b"\0\1" + name.encode()
        )
        assert Info.NAME not in peer.info(Option.GO, asked).infos
        assert peer.ask(Cmd.READ, 0, 16).error == 0


@row("O27")
@pytest.mark.parametrize("requests", [[], [Info.DESCRIPTION]])
def test_description(server: RunningServer, requests: list[int]) -> None:
    with server.connect() as peer:
        peer.greet()
        assert Info.DESCRIPTION not in peer.info(Option.INFO, "ro", requests).infos
        told = peer.info(Option.GO, "described", requests)
        assert told.infos[Info.DESCRIPTION] == b"\0\2" + DESCRIPTION.encode()
        assert peer.pread(0, 16) == pattern(0, 16)


@row("O28", "O29")
@info_and_go
@pytest.mark.parametrize("requests", [[], [Info.BLOCK_SIZE]], ids=["unasked", "asked"])
@pytest.mark.parametrize("export", ["raw", "qcow2", "odd", "empty"])
def test_block_size(server: RunningServer, code: int, requests: list[int], export: str) -> None:
    """The minimum is 1 byte everywhere, so that nobody has to ask for it before GO."""
    with server.connect() as peer:
        peer.greet()
        told = peer.info(code, export, requests)
        assert told.infos[Info.BLOCK_SIZE] == struct.pack(">HIII", 3, 1, 4096, 32 << 20)
        if code == Option.INFO:
            peer.info(Option.GO, export)
        last_byte = max(told.size - 1, 0), min(told.size, 1)
        assert peer.ask(Cmd.READ, *last_byte).error == 0


@row("O31")
@info_and_go
def test_empty_name(server: RunningServer, code: int) -> None:
    """It is the default export: the first one."""
    with server.connect() as peer:
        peer.greet()
        assert peer.info(code, "").size == RAW_SIZE
        if code == Option.INFO:
            peer.info(Option.GO, "")
        assert peer.pread(8, 16) == pattern(8, 16)


@row("O32")
@pytest.mark.parametrize("flags", [1, 3])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("export", ["described", UNICODE, "qcow2", "empty"])
def test_go_repeats_info(server: RunningServer, flags: int, mode: Mode, export: str) -> None:
    """Save for flag bit 12 in extended mode without contexts (rows F9 and F10)."""
    with server.connect() as peer:
        peer.greet(flags)
        peer.headers(mode)
        if mode is not Mode.SIMPLE:
            peer.meta(Option.SET_META_CONTEXT, export, ["base:allocation"])
        data = info_data(export, [3, 1, 2])
        info, go = (peer.option(code, data) for code in (Option.INFO, Option.GO))
        assert [reply[1:] for reply in info] == [reply[1:] for reply in go]
        # No padding: the next bytes are a reply.
        assert peer.ask(Cmd.FLUSH, cookie=9)[:2] == (9, 0)


@row("O34")
def test_negotiation_opens_nothing(server: RunningServer) -> None:
    """Images are opened once, when the server starts; a client costs its socket."""
    before = server.descriptors()
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.EXTENDED)
        for export in EXPORTS:
            peer.info(Option.INFO, export)
            peer.meta(Option.LIST_META_CONTEXT, export)
        assert server.descriptors() == before + 1
        go_on(peer)


@row("O36")
def test_server_that_is_stopping(start_server: StartServer) -> None:
    server = start_server()
    with server.connect() as peer, server.connect() as old_fashioned:
        peer.greet()
        old_fashioned.greet()
        server.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + DEADLINE
        while peer.option(Option.LIST)[-1].type == Rep.ACK:
            assert time.monotonic() < deadline
        for code, data in [
            (Option.LIST, b""),
            (Option.INFO, info_data("")),
            (Option.GO, info_data("")),
            (Option.STRUCTURED_REPLY, b""),
            (Option.EXTENDED_HEADERS, b""),
            (Option.LIST_META_CONTEXT, meta_data("")),
            (Option.STARTTLS, b""),
            (99, b"data"),
        ]:
            assert peer.refused(code, data)[0] == Rep.ERR_SHUTDOWN
        assert peer.acknowledged(Option.ABORT) == []
        peer.expect_disconnect()
        old_fashioned.send(option(Option.EXPORT_NAME, b"raw"))
        old_fashioned.expect_disconnect()
    server.process.send_signal(signal.SIGUSR2)
    with server.connect() as peer:
        peer.read_greeting()
        peer.send(client_flags())
        while peer.option(Option.LIST)[-1].type != Rep.ACK:
            assert time.monotonic() < deadline
        go_on(peer)


@row("O36")
def test_server_that_ends_while_clients_negotiate(start_server: StartServer) -> None:
    """It waits for none of them: they are disconnected without an answer."""
    server = start_server()
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.STRUCTURED)
        server.stop()
        peer.expect_disconnect()
