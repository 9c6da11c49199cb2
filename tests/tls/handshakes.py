"""TLS between two contexts in memory, and nothing else."""

from __future__ import annotations

import ssl
from typing import NamedTuple

TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


class Ends(NamedTuple):
    client: ssl.SSLObject
    server: ssl.SSLObject


def shake(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    hostname: str | None = "localhost",
    *,
    session: ssl.SSLSession | None = None,
) -> Ends:
    """A handshake, and a message each way. ``session``: what the client wants to resume. Raises the
    `ssl.SSLError` of the end that fails first; in TLS 1.3 a server may refuse a client that has
    finished already.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = Ends(
        client.wrap_bio(to_client, to_server, server_hostname=hostname, session=session),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    waiting = list(ends)
    for _ in range(8):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    assert not waiting
    for one, other in (ends, reversed(ends)):
        one.write(b"a message")
        assert other.read(100) == b"a message"
    return ends


def only(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """The context, for one version of TLS."""
    context.minimum_version = context.maximum_version = version
    return context
