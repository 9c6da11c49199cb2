"""What goes through TLS in transmission: in any records, in any number, in any sizes."""

from __future__ import annotations

from tests.conformance.client import Cmd, Mode, request
from tests.conformance.server import pattern
from tests.conformance.tls import TlsServers


def test_more_small_requests_than_are_received_at_once(tls: TlsServers, transport: str) -> None:
    """None of them waits in the tunnel, of which the socket tells nothing."""
    with tls.with_().entered(transport) as peer:
        count = 40_000
        peer.send(b"".join(request(Mode.SIMPLE, Cmd.READ, 0, 1, cookie=n) for n in range(count)))
        for _ in range(count):
            assert peer.reply(0, 1).data == pattern(0, 1)
        peer.disconnect()
