"""What a malformed option gets: an error and the next option, or a disconnect and the next client.

The fixture ``server`` brings the next client, after each test.
"""

from __future__ import annotations

from tests.conformance.client import Mode, Option, OptionReply, Peer, Rep, option
from tests.conformance.malformed import Stimulus
from tests.conformance.running import RunningServer
from tests.conformance.server import pattern

MAX_STRING = 4096


def refusal(server: RunningServer, stimulus: Stimulus) -> OptionReply:
    """The error reply to a stimulus. The options before it succeed, and so does the next one."""
    with server.connect() as peer:
        assert peer.read_greeting() == 3
        peer.send(stimulus.setup + stimulus.data)
        if option(Option.STRUCTURED_REPLY) in stimulus.setup:
            peer.mode = Mode.STRUCTURED
        if option(Option.EXTENDED_HEADERS) in stimulus.setup:
            peer.mode = Mode.EXTENDED
        reply = peer.read_option_reply()
        while reply.type == Rep.ACK:
            reply = peer.read_option_reply()
        check_error(reply)
        go_on(peer)
    return reply


def check_error(reply: OptionReply) -> None:
    """Row H19: what holds for the text of every error."""
    assert reply.type & 1 << 31, reply
    text = reply.data.decode()
    assert text
    assert "\0" not in text
    assert len(reply.data) <= MAX_STRING


def go_on(peer: Peer, export: str = "ro") -> None:
    """The connection lives: it comes to transmission with the headers that it has, and reads."""
    peer.info(Option.GO, export)
    assert peer.pread(512, 32) == pattern(512, 32)


def dropped(server: RunningServer, stimulus: Stimulus) -> None:
    """The server says nothing to the stimulus, and closes."""
    with server.connect() as peer:
        assert peer.read_greeting() == 3
        peer.send(stimulus.setup)
        for _ in range(stimulus.setup.count(b"IHAVEOPT")):
            assert peer.read_option_reply().type == Rep.ACK
        peer.send_anyway(stimulus.data)
        peer.expect_disconnect()
