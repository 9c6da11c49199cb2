"""Connection: the negotiation is driven over a real socket, into transmission or out.

What each option gets is the business of `tests/protocol/test_handshake.py` and of the conformance
rows; limits and endings are in `test_server`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from interop.certificates import Pki
from pynbd.block.chain import open_image
from pynbd.server.buffers import BufferPool
from pynbd.server.connection import Connection
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.tls import Tls
from pynbd.tls.tunnel import Tunnel
from tests.server.session import BLOCK_STATUS, READ, Client, Mode, open_files

SIZE = 1 << 20
BYTES = random.Random(13).randbytes(SIZE)
GREETING = b"NBDMAGICIHAVEOPT\0\3"
ABORT, LIST, STARTTLS, GO, STRUCTURED, SET_META, EXTENDED = 2, 3, 5, 7, 8, 10, 11


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def name(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def acknowledged(number: int) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, 1, 0)


class Talk:
    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.connection = connection
        self.sock = sock
        self.running = asyncio.get_running_loop().create_task(connection.run())

    async def say(self, data: bytes, piece: int = 1 << 20) -> None:
        loop = asyncio.get_running_loop()
        for at in range(0, len(data), piece):
            await loop.sock_sendall(self.sock, data[at : at + piece])
            await asyncio.sleep(0)

    async def hear(self, end: bytes) -> bytes:
        """Everything up to ``end``."""
        loop = asyncio.get_running_loop()
        heard = b""
        while not heard.endswith(end):
            part = await asyncio.wait_for(loop.sock_recv(self.sock, 1 << 16), 5)
            assert part, heard
            heard += part
        return heard

    async def hear_exactly(self, end: bytes) -> None:
        """Up to ``end`` and not a byte further."""
        loop = asyncio.get_running_loop()
        heard = b""
        while not heard.endswith(end):
            heard += await asyncio.wait_for(loop.sock_recv(self.sock, 1), 5)

    async def ended(self) -> None:
        loop = asyncio.get_running_loop()
        while await asyncio.wait_for(loop.sock_recv(self.sock, 1 << 16), 5):
            pass
        await asyncio.wait_for(self.running, 5)


@asynccontextmanager
async def talking(tmp_path: Path, limit: float = 10, tls: Tls | None = None) -> AsyncIterator[Talk]:
    path = tmp_path / "disk"
    path.write_bytes(BYTES)
    before = open_files()
    node = await open_image(path, format="raw")
    exports = ExportTable([Export("x", node, contexts=standard_contexts(depth=True, bitmaps=()))])
    ours, theirs = socket.socketpair()
    limits = Limits(handshake_seconds=limit)
    talk = Talk(Connection(ours, exports, BufferPool(), limits, tls=tls), theirs)
    try:
        yield talk
    finally:
        theirs.close()
        await asyncio.wait_for(talk.running, 5)
        await node.close()
    assert open_files() == before


OPENING = b"".join(
    [
        struct.pack(">I", 3),
        option(LIST),
        option(EXTENDED),
        option(SET_META, name(b"x") + struct.pack(">I", 1) + name(b"base:allocation")),
        option(GO, name(b"x") + struct.pack(">H", 0)),
    ]
)


@pytest.mark.parametrize("piece", [1 << 20, 1, 7], ids=["whole", "bytes", "sevens"])
async def test_from_the_greeting_to_transmission(tmp_path: Path, piece: int) -> None:
    """However it is cut into segments (rows H10 and H11)."""
    async with talking(tmp_path) as talk:
        assert await talk.hear(GREETING) == GREETING
        assert not talk.connection.negotiated
        await talk.say(OPENING, piece)
        heard = await talk.hear(acknowledged(GO))
        assert acknowledged(EXTENDED) in heard
        assert b"base:allocation" in heard
        client = Client(talk.sock, Mode.EXTENDED)
        assert (await client.ask(READ, 5, 10)).data(5, 10) == BYTES[5:15]
        assert (await client.ask(BLOCK_STATUS, 0, SIZE)).status == {0: [(SIZE, 0)]}
        assert talk.connection.negotiated


async def test_requests_in_the_segment_of_the_last_option(tmp_path: Path) -> None:
    """Not a byte of them is lost between negotiation and transmission."""
    async with talking(tmp_path) as talk:
        await talk.hear(GREETING)
        client = Client(talk.sock, Mode.EXTENDED)
        requests = [client.request(READ, n * 100, 100, cookie=n) for n in range(50)]
        await talk.say(OPENING + b"".join(requests))
        await talk.hear_exactly(acknowledged(GO))
        await client.all_replies()
        for n in range(50):
            assert client.replies[n].data(n * 100, 100) == BYTES[n * 100 : n * 100 + 100]


async def test_abort(tmp_path: Path) -> None:
    """Row O6."""
    async with talking(tmp_path) as talk:
        await talk.hear(GREETING)
        await talk.say(struct.pack(">I", 3) + option(ABORT))
        await talk.hear(acknowledged(ABORT))
        await talk.ended()
        assert not talk.connection.negotiated
        assert not talk.connection.stop()


@pytest.mark.parametrize(
    "said",
    [
        struct.pack(">I", 4),
        struct.pack(">I", 3) + b"NOTMAGIC" + bytes(8),
        struct.pack(">I", 3) + option(1, b"unknown"),
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 99, (32 << 20) + 1),
    ],
    ids=["flags", "magic", "name", "length"],
)
async def test_a_violation_ends_it(
    tmp_path: Path, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows H6, H12, H13 and O1: with a word for those who asked for it, and no more."""
    caplog.set_level(logging.INFO, "pynbd")
    async with talking(tmp_path) as talk:
        await talk.hear(GREETING)
        await talk.say(said)
        await talk.ended()
    (record,) = [record for record in caplog.records if record.name == "pynbd"]
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert record.getMessage().startswith("a local client disconnected: ")


async def test_a_long_option_is_skipped(tmp_path: Path) -> None:
    """Row H14: 32 MiB of an unknown option, and the next one is served."""
    async with talking(tmp_path) as talk:
        await talk.hear(GREETING)
        await talk.say(struct.pack(">I", 3) + option(99, bytes(32 << 20)) + option(STRUCTURED))
        heard = await talk.hear(acknowledged(STRUCTURED))
        assert heard.startswith(struct.pack(">QII", 0x3E889045565A9, 99, 0x80000001))


async def test_the_deadline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pynbd")
    async with talking(tmp_path, 0.1) as talk:
        await talk.hear(GREETING)
        await talk.ended()
    (record,) = caplog.records
    assert record.getMessage() == "a local client disconnected: no negotiation within 0.1 s"


@asynccontextmanager
async def starting_tls(tmp_path: Path) -> AsyncIterator[tuple[Talk, Tunnel]]:
    """A client whose STARTTLS is acknowledged, and its tunnel before the handshake."""
    pki = Pki.make(tmp_path / "pki")
    async with talking(tmp_path, tls=Tls(certificates=pki.server)) as talk:
        await talk.hear(GREETING)
        await talk.say(struct.pack(">I", 3) + option(STARTTLS))
        await talk.hear(acknowledged(STARTTLS))
        trusting = ssl.create_default_context(cafile=pki.anonymous / "ca-cert.pem")
        yield (
            talk,
            Tunnel(talk.sock, trusting, server_side=False, server_hostname="localhost"),
        )


@pytest.mark.parametrize("shakes", [False, True])
async def test_a_client_that_goes_when_it_has_seen_the_certificate(
    shakes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GnuTLS sends no alert by itself; some look at the certificate when the handshake is over."""
    caplog.set_level(logging.INFO, "pynbd")
    async with starting_tls(tmp_path) as (talk, tunnel):
        if shakes:
            await tunnel.handshake()
        talk.sock.shutdown(socket.SHUT_WR)
        await talk.ended()
    (record,) = [record for record in caplog.records if record.name == "pynbd"]
    assert record.getMessage() == (
        "a local client disconnected: TLS: it has left; it may not trust this server"
    )


@pytest.mark.parametrize("served", [False, True])
async def test_a_record_that_was_tampered_with(
    served: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pynbd")
    async with starting_tls(tmp_path) as (talk, tunnel):
        await tunnel.handshake()
        if served:
            await tunnel.sendall(option(GO, name(b"x") + struct.pack(">H", 0)))
            heard = b""
            while not heard.endswith(acknowledged(GO)):
                heard += await tunnel.recv(1 << 16)
        await talk.say(b"\x17\3\3\0\x20" + bytes(32))
        await talk.ended()
    (record,) = [record for record in caplog.records if record.name == "pynbd"]
    words = "decryption failed or bad record mac|record layer failure"  # OpenSSL 3.0; 3.5
    assert re.fullmatch(f"a local client disconnected: TLS: .*({words})", record.getMessage())


class FailingSocket(socket.socket):
    """Sends, but to receive fails as it does when a network breaks down."""

    failure: OSError

    def recv(self, length: int, flags: int = 0) -> bytes:
        raise self.failure


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETDOWN, errno.ETIMEDOUT])
async def test_a_network_that_breaks_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """It is like a client that goes, and ETIMEDOUT is not the deadline."""
    caplog.set_level(logging.INFO, "pynbd")
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.send(bytes(4))
        failing = FailingSocket(fileno=ours.detach())
        failing.failure = OSError(number, os.strerror(number))
        await Connection(failing, ExportTable([]), BufferPool(), Limits()).run()
        assert failing.fileno() == -1
        assert theirs.recv(18) == GREETING
    assert not caplog.records


async def test_a_violation_in_transmission(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Row C1."""
    caplog.set_level(logging.INFO, "pynbd")
    async with talking(tmp_path) as talk:
        await talk.hear(GREETING)
        await talk.say(OPENING)
        await talk.hear(acknowledged(GO))
        await talk.say(b"\xff" * 32)
        await talk.ended()
    (record,) = [record for record in caplog.records if record.name == "pynbd"]
    assert record.getMessage() == "a local client disconnected: a request with magic 0xffffffff"
