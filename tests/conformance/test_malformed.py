"""Every malformed stimulus whole, one byte at a time, and cut short at every byte.

However it comes, the answer is the same, the next client is served, its place is free again, and
nothing is said on standard error (the fixture ``server`` looks).
"""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.conformance.client import Disconnected, Peer
from tests.conformance.malformed import Stimulus
from tests.conformance.running import RunningServer
from tests.conformance.stimuli_negotiation import STIMULI as NEGOTIATION
from tests.conformance.stimuli_transmission import STIMULI as TRANSMISSION

LONG = 8192
"""A stimulus of more bytes is mostly filler: only its first `HEAD` bytes, and the last one, are
sent and cut one by one. The filler comes in one piece, and is cut in `PLACES` places."""
HEAD = 256
PLACES = 8
CHECK_EVERY = 64
"""Cuts before a polite client comes."""

every_stimulus = pytest.mark.parametrize("stimulus", [*NEGOTIATION, *TRANSMISSION], ids=str)


def head_of(data: bytes) -> int:
    """How many bytes of ``data`` are sent, and cut, one by one."""
    return HEAD if len(data) > LONG else len(data)


def cuts(data: bytes) -> list[int]:
    """Where ``data`` is cut: how many bytes are left of it."""
    filler = range(head_of(data), len(data), len(data) // PLACES or 1)
    return [*range(head_of(data)), *filler, len(data) - 1]


def outcome(peer: Peer, stimulus: Stimulus, *, cut: int | None = None) -> bytes:
    """All that the server says, from the greeting until it closes, to the first ``cut`` bytes."""
    with suppress(Disconnected):  # it need not hear all of it
        peer.send(stimulus.setup)
        peer.send(stimulus.data[:cut])
        peer.finish()
    return peer.read_to_end()


def outcome_bytewise(peer: Peer, stimulus: Stimulus) -> bytes:
    data = stimulus.data
    head, last = head_of(data), max(head_of(data), len(data) - 1)
    with suppress(Disconnected):
        peer.send(stimulus.setup)
        peer.send_bytewise(data[:head])
        peer.send(data[head:last])
        peer.send_bytewise(data[last:])
        peer.finish()
    return peer.read_to_end()


@every_stimulus
def test_whole_and_bytewise(server: RunningServer, stimulus: Stimulus) -> None:
    with server.connect() as peer, server.connect() as other:
        whole = outcome(peer, stimulus)
        assert whole.startswith(b"NBDMAGICIHAVEOPT")
        assert outcome_bytewise(other, stimulus) == whole


@every_stimulus
def test_cut_short(server: RunningServer, stimulus: Stimulus) -> None:
    """By a client that listens until the server closes, and by one that is gone at once."""
    before = server.descriptors()
    with server.connect() as peer:
        whole = outcome(peer, stimulus)
    for number, cut in enumerate(cuts(stimulus.data)):
        with server.connect() as peer:
            assert whole.startswith(outcome(peer, stimulus, cut=cut))
        with server.connect() as peer:
            peer.send_anyway(stimulus.setup + stimulus.data[:cut])
            peer.wait_taken()
        if number % CHECK_EVERY == 0:
            server.check()
    server.wait_for_descriptors(before)
