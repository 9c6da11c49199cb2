"""Rows H: the greeting, and how options are framed."""

from __future__ import annotations

from tests.conformance.rows import row
from tests.conformance.running import RunningServer


@row("H1")
def test_greeting(server: RunningServer) -> None:
    with server.connect() as peer:
        assert peer.read(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        peer.expect_silence()
