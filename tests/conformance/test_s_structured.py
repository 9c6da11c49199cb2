"""Rows S: structured replies, extended headers, and in which order they may be asked for."""

from __future__ import annotations

import pytest

from tests.conformance.answers import go_on, refusal
from tests.conformance.client import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Cmd,
    Errno,
    Flag,
    Mode,
    Option,
    Rep,
)
from tests.conformance.conftest import StartServer
from tests.conformance.malformed import Stimulus, of_row
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import CHAIN_ALLOCATION, CHAIN_SIZE, CLUSTER, pattern
from tests.conformance.stimuli_negotiation import STIMULI

STRUCTURED, EXTENDED = Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS


@row("S1", "S4", "S5")
@pytest.mark.parametrize(
    "options, magic",
    [
        pytest.param([STRUCTURED], STRUCTURED_REPLY_MAGIC, id="structured"),
        pytest.param([EXTENDED], EXTENDED_REPLY_MAGIC, id="extended"),
        pytest.param([STRUCTURED, EXTENDED], EXTENDED_REPLY_MAGIC, id="both"),
    ],
)
def test_acknowledged(server: RunningServer, options: list[int], magic: int) -> None:
    with server.connect() as peer:
        peer.greet()
        for code in options:
            assert peer.acknowledged(code) == []
        peer.info(Option.GO, "ro")
        peer.mode = Mode.EXTENDED if EXTENDED in options else Mode.STRUCTURED
        peer.request(Cmd.READ, 0, 16)
        assert int.from_bytes(peer.read(4)) == magic
        head = 20 if peer.mode is Mode.STRUCTURED else 32
        assert peer.read(head - 4 + 8 + 16)[-16:] == pattern(0, 16)


@row("S2", "S3", "S6", "S7")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "S2", "S3", "S6", "S7"), ids=str)
def test_refused(server: RunningServer, stimulus: Stimulus) -> None:
    """What was negotiated before stays: `refusal` reads with these headers afterwards."""
    assert refusal(server, stimulus).type == Rep.ERR_INVALID


@row("S8")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "S8"), ids=str)
def test_structured_after_extended(server: RunningServer, stimulus: Stimulus) -> None:
    assert refusal(server, stimulus).type == Rep.ERR_EXT_HEADER_REQD


@row("S9")
def test_contexts_survive_extended_headers(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.headers(Mode.STRUCTURED)
        ids = peer.meta(Option.SET_META_CONTEXT, "qcow2", ["base:allocation"])
        peer.headers(Mode.EXTENDED)
        assert peer.info(Option.GO, "qcow2").flags & Flag.BLOCK_STATUS_PAYLOAD
        reply = peer.ask(Cmd.BLOCK_STATUS, 0, CHAIN_SIZE)
        assert [chunk.type for chunk in reply.chunks] == [Chunk.BLOCK_STATUS_EXT]
        expected = [(clusters * CLUSTER, flags) for clusters, flags in CHAIN_ALLOCATION]
        assert reply.status == {ids["base:allocation"]: expected}
        assert peer.pread(0, 16) == b"\1" * 16


@row("S10")
def test_neither(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        assert not peer.info(Option.GO, "qcow2").flags & Flag.SEND_DF
        for command, offset, length, error in [
            (Cmd.BLOCK_STATUS, 0, CLUSTER, Errno.EINVAL),
            (Cmd.READ, CHAIN_SIZE, 1, Errno.EINVAL),
            (Cmd.FLUSH, 0, 0, 0),
            (Cmd.READ, 0, 16, 0),
        ]:
            peer.request(command, offset, length, cookie=5)
            assert int.from_bytes(peer.read(4)) == SIMPLE_REPLY_MAGIC
            assert peer.read(12) == error.to_bytes(4) + (5).to_bytes(8)
        assert peer.read(16) == b"\1" * 16


@row("S11")
def test_extended_headers_are_not_supported(start_server: StartServer) -> None:
    with start_server("--no-extended-headers").connect() as peer:
        peer.greet()
        assert peer.refused(EXTENDED)[0] == Rep.ERR_UNSUP
        peer.headers(Mode.STRUCTURED)
        assert peer.refused(EXTENDED)[0] == Rep.ERR_UNSUP
        go_on(peer)
