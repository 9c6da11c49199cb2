"""Rows M: LIST_META_CONTEXT and SET_META_CONTEXT."""

from __future__ import annotations

import struct

import pytest

from tests.conformance.answers import go_on, refusal
from tests.conformance.client import (
    Cmd,
    Errno,
    Flag,
    Mode,
    Option,
    Peer,
    Rep,
    meta_data,
)
from tests.conformance.malformed import Stimulus, of_row
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import (
    BITMAPS,
    CHAIN_CONTEXTS,
    CLUSTER,
    LONG_NAME,
    UNICODE,
)
from tests.conformance.stimuli_negotiation import STIMULI

LIST, SET = Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT
BASE, DEPTH, BITMAP = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"
ALL_BITMAPS = [BITMAP + name for name in BITMAPS]

list_and_set = pytest.mark.parametrize("code", [LIST, SET], ids=lambda code: code.name)
contexts_modes = pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])


def haggling(server: RunningServer, mode: Mode = Mode.STRUCTURED) -> Peer:
    peer = server.connect()
    peer.greet()
    peer.headers(mode)
    return peer


def enter(peer: Peer, export: str = "qcow2") -> dict[int, int]:
    """Go on to transmission: the status of the first byte by context id, {} if there is none."""
    flags = peer.info(Option.GO, export).flags
    reply = peer.ask(Cmd.BLOCK_STATUS, 0, 1)
    if peer.mode is Mode.EXTENDED:
        assert bool(flags & Flag.BLOCK_STATUS_PAYLOAD) == bool(reply.status)
    assert reply.error == (0 if reply.status else Errno.EINVAL)
    assert peer.ask(Cmd.READ, 0, 1).error == 0
    return {number: extents[0].flags for number, extents in reply.status.items()}


# What is there


@row("M1")
def test_list_in_simple_mode(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.greet()
        assert list(peer.meta(LIST, "qcow2")) == CHAIN_CONTEXTS
        assert enter(peer) == {}


@row("M2")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "M2"), ids=str)
def test_set_in_simple_mode(server: RunningServer, stimulus: Stimulus) -> None:
    assert refusal(server, stimulus).type == Rep.ERR_INVALID


@row("M3")
@contexts_modes
def test_list_all(server: RunningServer, mode: Mode) -> None:
    with haggling(server, mode) as peer:
        assert peer.meta(LIST, "qcow2") == dict.fromkeys(CHAIN_CONTEXTS, 0)
        assert peer.meta(LIST, "raw") == dict.fromkeys([BASE, DEPTH], 0)
        assert enter(peer) == {}


@row("M3", "M7")
@list_and_set
def test_reply_bytes(server: RunningServer, code: int) -> None:
    with haggling(server) as peer:
        context, ack = peer.option(code, meta_data("qcow2", [BASE]))
        assert (context.type, ack[1:]) == (Rep.META_CONTEXT, (Rep.ACK, b""))
        assert context.data[4:] == b"base:allocation"
        if code == LIST:
            assert context.data[:4] == bytes(4)
        go_on(peer)


@row("M4")
@contexts_modes
def test_set_nothing(server: RunningServer, mode: Mode) -> None:
    with haggling(server, mode) as peer:
        assert len(peer.meta(SET, "qcow2", [BASE])) == 1
        assert peer.meta(SET, "qcow2") == {}
        assert enter(peer) == {}


@pytest.mark.parametrize(
    "query, listed",
    [
        pytest.param("base:", [BASE], marks=row("M5", "M6"), id="base:"),
        pytest.param("qemu:", [DEPTH, *ALL_BITMAPS], marks=row("M10", "M11"), id="qemu:"),
        pytest.param(BITMAP, ALL_BITMAPS, marks=row("M12", "M13"), id=BITMAP),
    ],
)
def test_wildcards(server: RunningServer, query: str, listed: list[str]) -> None:
    """They list all that begins so, and select nothing."""
    with haggling(server) as peer:
        assert list(peer.meta(LIST, "qcow2", [query])) == listed
        assert peer.meta(SET, "qcow2", [query]) == {}
        assert enter(peer) == {}


@row("M7")
@contexts_modes
def test_base_allocation(server: RunningServer, mode: Mode) -> None:
    with haggling(server, mode) as peer:
        ids = peer.meta(SET, "qcow2", [BASE])
        assert list(ids) == [BASE]
        assert enter(peer) == {ids[BASE]: 0}


UNKNOWN = [
    pytest.param("base:foo", marks=row("M8")),
    pytest.param("base:allocation:", marks=row("M8")),
    pytest.param("qemu:dirty-bitmap", marks=row("M14")),
    pytest.param("qemu:foo", marks=row("M14")),
    pytest.param("qemu:allocation-depth:", marks=row("M14")),
    pytest.param("qemu:dirty-bitmap:nosuch", marks=row("M15")),
    pytest.param("qemu:dirty-bitmap:plai", marks=row("M15")),
    pytest.param("qemu:dirty-bitmap:plain ", marks=row("M15")),
    pytest.param("x-a:b", marks=row("M17")),
    pytest.param("BASE:ALLOCATION", marks=row("M17")),
    pytest.param("base", marks=row("M18")),
    pytest.param("", marks=row("M18")),
    pytest.param(":", marks=row("M18")),
    pytest.param("q" * 4097, marks=row("M19"), id="4097 bytes"),
    pytest.param("base:" + "q" * 99999, marks=row("M19"), id="100004 bytes"),
]


@contexts_modes
@pytest.mark.parametrize("query", UNKNOWN)
def test_unknown_query(server: RunningServer, query: str, mode: Mode) -> None:
    with haggling(server, mode) as peer:
        assert peer.meta(LIST, "qcow2", [query]) == {}
        assert peer.meta(SET, "qcow2", [query]) == {}
        # A known one beside it is honoured.
        assert list(peer.meta(LIST, "qcow2", [query, BASE])) == [BASE]
        ids = peer.meta(SET, "qcow2", [query, DEPTH])
        assert list(ids) == [DEPTH]
        assert enter(peer) == {ids[DEPTH]: 1}


@row("M9", "M30")
@list_and_set
@pytest.mark.parametrize("count", [2, 1000])
def test_duplicate_queries(server: RunningServer, code: int, count: int) -> None:
    with haggling(server) as peer:
        # `meta` asserts that no context is told twice.
        told = peer.meta(code, "qcow2", [BASE, DEPTH] * count)
        assert sorted(told) == [BASE, DEPTH]
        assert len(enter(peer)) == (2 if code == SET else 0)


@row("M16")
@pytest.mark.parametrize("name", BITMAPS, ids=lambda name: name[:10])
def test_bitmap_names(server: RunningServer, name: str) -> None:
    with haggling(server, Mode.EXTENDED) as peer:
        assert list(peer.meta(LIST, "qcow2", [BITMAP + name])) == [BITMAP + name]
        ids = peer.meta(SET, "qcow2", [BITMAP + name])
        assert list(ids) == [BITMAP + name]
        dirty_first = any(offset == 0 for offset, _ in BITMAPS[name])
        assert enter(peer) == {ids[BITMAP + name]: int(dirty_first)}


@row("M16")
@pytest.mark.parametrize("name", [LONG_NAME[:-1], LONG_NAME + "n", UNICODE[:-1], "with"])
def test_bitmap_names_are_not_prefixes(server: RunningServer, name: str) -> None:
    with haggling(server) as peer:
        assert peer.meta(SET, "qcow2", [BITMAP + name]) == {}
        assert enter(peer) == {}


# What is malformed


@row("M20", "M21", "M22", "M23")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "M20", "M21", "M22", "M23"), ids=str)
def test_malformed(server: RunningServer, stimulus: Stimulus) -> None:
    with server.flat_memory():
        assert refusal(server, stimulus).type == Rep.ERR_INVALID


@row("M31")
@pytest.mark.parametrize("stimulus", of_row(STIMULI, "M31"), ids=str)
def test_too_many_queries(server: RunningServer, stimulus: Stimulus) -> None:
    with server.flat_memory():
        assert refusal(server, stimulus).type == Rep.ERR_TOO_BIG


@row("M31")
@list_and_set
def test_as_many_queries_as_fit(server: RunningServer, code: int) -> None:
    """128 KiB of data are read and answered."""
    count = ((128 << 10) - 13) // 4
    data = struct.pack(">I5sI", 5, b"qcow2", count) + bytes(4 * count)
    with haggling(server) as peer:
        assert peer.acknowledged(code, data) == []
        go_on(peer)


@row("M24")
@list_and_set
def test_unknown_export(server: RunningServer, code: int) -> None:
    with haggling(server) as peer:
        assert peer.refused(code, meta_data("nosuch", [BASE, DEPTH]))[0] == Rep.ERR_UNKNOWN
        assert enter(peer) == {}


# What becomes of a selection


@row("M25")
@contexts_modes
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(meta_data("nosuch", [BASE]), id="unknown export"),
        pytest.param(meta_data("qcow2", [BASE]) + b"\0", id="trailing byte"),
        pytest.param(meta_data("qcow2", [BASE])[:-1], id="cut short"),
        pytest.param(b"", id="no data"),
        pytest.param(bytes(1 << 20), id="too big"),
    ],
)
def test_failure_clears_the_selection(server: RunningServer, data: bytes, mode: Mode) -> None:
    with haggling(server, mode) as peer:
        assert len(peer.meta(SET, "qcow2", [BASE])) == 1
        peer.refused(SET, data)
        assert enter(peer) == {}


@row("M26")
@contexts_modes
@pytest.mark.parametrize(
    "data, succeeds",
    [
        (meta_data("qcow2"), True),
        (meta_data("raw", ["base:"]), True),
        (meta_data("nosuch"), False),
        (b"", False),
    ],
)
def test_list_keeps_the_selection(
    server: RunningServer, data: bytes, succeeds: bool, mode: Mode
) -> None:
    with haggling(server, mode) as peer:
        ids = peer.meta(SET, "qcow2", [DEPTH])
        assert (peer.option(LIST, data)[-1].type == Rep.ACK) == succeeds
        assert enter(peer) == {ids[DEPTH]: 1}


@row("M27")
@contexts_modes
def test_selection_for_another_export(server: RunningServer, mode: Mode) -> None:
    with haggling(server, mode) as peer:
        assert len(peer.meta(SET, "qcow2", [BASE])) == 1
        assert enter(peer, "ro") == {}


@row("M28")
@contexts_modes
@pytest.mark.parametrize("selected, entered", [("", "raw"), ("raw", ""), ("", "")])
def test_selection_through_the_default_name(
    server: RunningServer, selected: str, entered: str, mode: Mode
) -> None:
    """It is the export that counts, under whichever of its names."""
    with haggling(server, mode) as peer:
        ids = peer.meta(SET, selected, [BASE])
        assert enter(peer, entered) == {ids[BASE]: 0}


@row("M29")
@contexts_modes
def test_ids(server: RunningServer, mode: Mode) -> None:
    """Whatever the order of the queries, the ids differ, and each stands for what it was told."""
    wanted = [BITMAP + LONG_NAME, DEPTH, BITMAP + UNICODE, BASE, BITMAP + "plain"]
    with haggling(server, mode) as peer:
        peer.meta(SET, "qcow2", CHAIN_CONTEXTS)
        ids = peer.meta(SET, "qcow2", wanted)
        assert sorted(ids) == sorted(wanted)
        assert len(set(ids.values())) == len(wanted)
        status = dict.fromkeys(ids.values(), 0) | {ids[DEPTH]: 1, ids[BITMAP + "plain"]: 1}
        assert enter(peer) == status
        # The second cluster: zeroes, of the active layer, dirty in one of the bitmaps only.
        reply = peer.ask(Cmd.BLOCK_STATUS, CLUSTER, 1)
        assert {number: extents[0].flags for number, extents in reply.status.items()} == {
            ids[BASE]: 3,
            ids[DEPTH]: 1,
            ids[BITMAP + "plain"]: 0,
            ids[BITMAP + UNICODE]: 1,
            ids[BITMAP + LONG_NAME]: 0,
        }


@row("M32")
def test_length_of_names(server: RunningServer) -> None:
    with haggling(server) as peer:
        lengths = [len(name.encode()) for name in peer.meta(LIST, "qcow2")]
        assert max(lengths) == len(BITMAP) + 1023
        assert peer.meta(LIST, "empty") == dict.fromkeys([BASE, DEPTH], 0)
        go_on(peer)
