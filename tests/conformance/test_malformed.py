"""Every malformed stimulus whole, one byte at a time, and cut short at every byte.

However it comes, the answer is the same, the next client is served, its place is free again, and
nothing is said on standard error (the fixture ``server`` looks).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.conformance.client import Disconnected, Peer
from tests.conformance.malformed import Stimulus
from tests.conformance.running import RunningServer
from tests.conformance.stimuli_negotiation import STIMULI as NEGOTIATION
from tests.conformance.stimuli_transmission import STIMULI as TRANSMISSION

LONG = 1024
"""A stimulus of more bytes is mostly filler: only its first `HEAD` bytes, and the last one, are
sent and cut one by one. The filler comes in one piece, and is cut in `PLACES` places."""
HEAD = 256
PLACES = 8
BATCH = 64
"""Cuts that are sent at once; then a polite client comes."""
LEAVING = 4
"""One cut of so many is also sent by a client that does not listen."""

ROWS = """
H5 H6 H12 H13 H14
O2 O3 O4 O7 O10 O14 O15 O16 O17 O20 O21 O22 O23
S2 S3 S6 S7 S8
M2 M18 M19 M20 M21 M22 M23 M31
C1 C2 C3 C5 C6
B1 B2 B3 B4 B5 B6 B7 B8 B13 B14 B15 B16 B18
P2 P3 P4 P5 P6 P7 P8 P9 P10 P13 P14 P15 P16 P17 P18 P20 P21
"""
"""The rows whose stimuli are malformed, or ask for what cannot be."""

every_stimulus = pytest.mark.parametrize("stimulus", [*NEGOTIATION, *TRANSMISSION], ids=str)


def test_no_row_is_left_out() -> None:
    assert set(ROWS.split()) - {stimulus.row for stimulus in [*NEGOTIATION, *TRANSMISSION]} == set()


def head_of(data: bytes) -> int:
    """How many bytes of ``data`` are sent, and cut, one by one."""
    return HEAD if len(data) > LONG else len(data)


def cuts(data: bytes) -> list[int]:
    """Where ``data`` is cut: how many bytes are left of it."""
    filler = range(head_of(data), len(data), len(data) // PLACES or 1)
    return [*range(head_of(data)), *filler, len(data) - 1]


def batched(cuts: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(cuts), BATCH):
        yield cuts[start : start + BATCH]


@contextmanager
def peers_for(server: RunningServer, batch: list[int]) -> Iterator[list[Peer]]:
    with ExitStack() as connections:
        yield [connections.enter_context(server.connect()) for _ in batch]


def send_cut(peer: Peer, stimulus: Stimulus, cut: int | None = None) -> None:
    """Send the first ``cut`` bytes of a stimulus and no more; without ``cut`` all of it."""
    with suppress(Disconnected):  # the server need not hear all of it
        peer.send(stimulus.setup)
        peer.send(stimulus.data[:cut])
        peer.finish()


def send_bytewise(peer: Peer, stimulus: Stimulus) -> None:
    data = stimulus.data
    head, last = head_of(data), max(head_of(data), len(data) - 1)
    with suppress(Disconnected):
        peer.send(stimulus.setup)
        peer.send_bytewise(data[:head])
        peer.send(data[head:last])
        peer.send_bytewise(data[last:])
        peer.finish()


def whole_answer(server: RunningServer, stimulus: Stimulus) -> bytes:
    """All that the server says, from the greeting until it closes."""
    with server.connect() as peer:
        send_cut(peer, stimulus)
        answer = peer.read_to_end()
    assert answer.startswith(b"NBDMAGICIHAVEOPT")
    return answer


@every_stimulus
def test_bytewise(server: RunningServer, stimulus: Stimulus) -> None:
    with server.connect() as peer:
        send_bytewise(peer, stimulus)
        assert peer.read_to_end() == whole_answer(server, stimulus)


@every_stimulus
def test_cut_short(server: RunningServer, stimulus: Stimulus) -> None:
    """By clients that listen until the server closes, and by some that are gone at once."""
    before = server.descriptors()
    whole = whole_answer(server, stimulus)
    for batch in batched(cuts(stimulus.data)):
        with peers_for(server, batch) as peers:
            for peer, cut in zip(peers, batch, strict=True):
                send_cut(peer, stimulus, cut)
            for peer in peers:
                assert whole.startswith(peer.read_to_end())
        leaving = batch[::LEAVING]
        with peers_for(server, leaving) as peers:
            for peer, cut in zip(peers, leaving, strict=True):
                peer.send_anyway(stimulus.setup + stimulus.data[:cut])
            for peer in peers:
                peer.wait_taken()
        server.check()
    server.wait_for_descriptors(before)
