"""Every malformed stimulus whole, one byte at a time, and cut short at every byte.

However it comes, the answer is the same, the next client is served, its place is free again, and
nothing is said on standard error (the fixture ``server`` looks).
"""

from __future__ import annotations

from itertools import chain

import pytest

from tests.conformance.client import Disconnected
from tests.conformance.malformed import Stimulus
from tests.conformance.running import RunningServer
from tests.conformance.stimuli_negotiation import STIMULI as NEGOTIATION
from tests.conformance.stimuli_transmission import STIMULI as TRANSMISSION

DETAIL = 2048
"""Bytes at the head of a stimulus that are sent, and cut, one by one. What follows in longer ones
is filler: it comes in one piece, except for its last byte, and is cut in a few places."""
LATER_CUTS = 8
CHECK_EVERY = 64
"""Cut connections before a polite client comes."""

every_stimulus = pytest.mark.parametrize("stimulus", [*NEGOTIATION, *TRANSMISSION], ids=str)


def outcome(server: RunningServer, stimulus: Stimulus, *, bytewise: bool) -> bytes:
    """All that the server says, from the greeting until it closes."""
    data = stimulus.data
    with server.connect() as peer:
        try:
            peer.send(stimulus.setup)
            if bytewise:
                peer.send_bytewise(data[:DETAIL])
                peer.send(data[DETAIL:-1])
                peer.send(data[max(DETAIL, len(data) - 1) :])
            else:
                peer.send(data)
            peer.finish()
        except Disconnected:
            pass  # it need not hear all of it
        return peer.read_to_end()


@every_stimulus
def test_whole_and_bytewise(server: RunningServer, stimulus: Stimulus) -> None:
    whole = outcome(server, stimulus, bytewise=False)
    assert whole.startswith(b"NBDMAGICIHAVEOPT")
    assert outcome(server, stimulus, bytewise=True) == whole


@every_stimulus
def test_cut_short(server: RunningServer, stimulus: Stimulus) -> None:
    setup, data = stimulus.setup, stimulus.data
    before = server.descriptors()
    step = max(len(data) // LATER_CUTS, 1)
    for cut in chain(range(min(len(data), DETAIL)), range(DETAIL, len(data), step)):
        with server.connect() as peer:
            peer.send_anyway(setup + data[:cut])
        if cut % CHECK_EVERY == 0:
            server.check()
    server.wait_for_descriptors(before)
