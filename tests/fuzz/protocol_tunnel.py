"""What a client sends where TLS is expected: instead of its handshake, in it, after it (RFC 8446;
RFC 5246), to a `Tunnel` of a server.

The first byte of an input says when, and how many of the client's own bytes come before; the rest
is sent. Once the handshake is over it is what is in one record, of any kind, or a record itself.

Allowed: `TlsError` and `EOFError`, before the handshake is over; `OSError` after it, the end of the
connection. What comes out is what records brought, and never more than was sent.
"""

from __future__ import annotations

import asyncio
import atexit
import shutil
import socket
import ssl
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from interop.certificates import Pki
from pynbd.errors import TlsError
from pynbd.tls.tunnel import Tunnel
from tests.tls.records import ALERT, APPLICATION_DATA, HANDSHAKE, KEY_UPDATE, Records

ALLOWED = (TlsError, EOFError, OSError)
MAX_LEN = 4096
SMOKE = 120
DICTIONARY = (b"\x16\3\1", b"\x16\3\3", b"\x15\3\3\0\2", b"\x17\3\3", b"\x14\3\3\0\1\1", KEY_UPDATE)
_INSTEAD, _WITHIN, _RECORD, _AFTER = range(4)
_KINDS = (APPLICATION_DATA, HANDSHAKE, ALERT, 20, 99)
"""Of records; 20 is change_cipher_spec, and nothing is 99."""


@cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext, Path]:
    folder = Path(mkdtemp(prefix="pynbd-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    pki = Pki.make(folder / "pki")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pki.server / "server-cert.pem", pki.server / "server-key.pem")
    server.num_tickets = 0
    client = ssl.create_default_context(cafile=pki.server / "ca-cert.pem")
    client.keylog_filename = str(folder / "keys")
    return server, client, folder


class _Client:
    """One in memory, whose bytes go where the test wants."""

    def __init__(self) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = _contexts()[1].wrap_bio(
            self._incoming, self._outgoing, server_hostname="localhost"
        )
        self.ready = False

    def says(self, heard: bytes = b"") -> bytes:
        self._incoming.write(heard)
        try:
            self.tls.do_handshake()
            self.ready = True
        except ssl.SSLWantReadError:
            pass
        return self._outgoing.read()


def seeds() -> Iterable[bytes]:
    hello = _Client().says()
    yield bytes([_INSTEAD]) + hello
    yield bytes([_INSTEAD]) + b"IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0"
    yield bytes([_INSTEAD]) + b"\x16\3\1\0\5\1\0\0\1\0" + bytes(40)
    for before in (0, 1, 5, 100):
        yield bytes([_WITHIN | before << 2 & 0xFC]) + hello[before:]
    yield bytes([_WITHIN]) + b"\x15\3\3\0\2\2\x28"
    for number in range(len(_KINDS)):
        yield bytes([_RECORD | number << 2]) + b"data"
    yield bytes([_RECORD | 1 << 2]) + KEY_UPDATE
    yield bytes([_RECORD | 2 << 2]) + b"\1\0"
    yield bytes([_AFTER]) + b"\x17\3\3\0\x20" + bytes(32)
    yield bytes([_AFTER]) + b"\x14\3\3\0\1\1"


def one_input(data: bytes) -> None:
    asyncio.run(_meet(data[0] if data else 0, data[1:]))


async def _meet(settings: int, said: bytes) -> None:
    moment, number = settings & 3, settings >> 2
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        tunnel = Tunnel(ours, _contexts()[0], server_side=True)
        client = _Client()
        if moment in (_INSTEAD, _WITHIN):
            theirs.send(client.says()[:number] + said if moment == _WITHIN else said)
            theirs.shutdown(socket.SHUT_WR)
            await tunnel.handshake()
            raise AssertionError("a client that has never answered is in")
        theirs.send(client.says())
        shaking = asyncio.create_task(tunnel.handshake())
        while not client.ready:
            theirs.send(client.says(await asyncio.get_running_loop().sock_recv(theirs, 1 << 16)))
        await shaking
        keys = _contexts()[2] / "keys"
        records = Records.of(client.tls, keys)
        keys.write_bytes(b"")  # they are not kept
        theirs.send(records(b"before"))
        theirs.send(records(said, _KINDS[number % len(_KINDS)]) if moment == _RECORD else said)
        theirs.shutdown(socket.SHUT_WR)
        await _drain(tunnel, len(b"before" + said))


async def _drain(tunnel: Tunnel, most: int) -> None:
    """All that comes out, until the end."""
    view, got = memoryview(bytearray(1 << 16)), b""
    for _ in range(100):
        try:
            count = tunnel.recv_into(view)
        except BlockingIOError:
            continue
        got += view[:count]
        assert len(got) <= most
        if not count:
            assert got.startswith(b"before")
            return
    raise AssertionError("there is no end of it")
