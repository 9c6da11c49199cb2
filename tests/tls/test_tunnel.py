"""Tunnel, with a client that writes its records by hand. What it carries in the hands of a stream,
tests/server/test_stream_tls.py has.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
import ssl
import struct
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from interop.certificates import Pki
from pynbd.errors import TlsError
from pynbd.tls.tunnel import Tunnel
from tests.tls.records import (
    ALERT,
    CLOSE_NOTIFY,
    HANDSHAKE,
    KEY_UPDATE,
    KEY_UPDATE_ASKED,
    LONGEST,
    Records,
)

PIECE = 5 + (16 << 10) + 2048
"""Bytes of the longest record: in TLS 1.2, in theory. So much may be received in vain."""


class Met(NamedTuple):
    tunnel: Tunnel
    ours: socket.socket
    theirs: socket.socket
    records: Records

    @property
    def waiting(self) -> int:
        """Bytes that the tunnel has not received."""
        return int(struct.unpack("i", fcntl.ioctl(self.ours, termios.FIONREAD, bytes(4)))[0])


@asynccontextmanager
async def met(pki: Pki, folder: Path) -> AsyncIterator[Met]:
    """A tunnel that has shaken hands with a client in TLS 1.3."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pki.server / "server-cert.pem", pki.server / "server-key.pem")
    server.num_tickets = 0
    client = ssl.create_default_context(cafile=pki.server / "ca-cert.pem")
    client.keylog_filename = str(folder / "keys")
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    ours.setblocking(False)
    theirs.settimeout(20)
    tunnel = Tunnel(ours, server, server_side=True)
    wrapping = asyncio.create_task(
        asyncio.to_thread(client.wrap_socket, theirs, server_hostname="localhost")
    )
    await tunnel.handshake()
    peer = await wrapping
    records = Records.of(peer, folder / "keys")
    with ours, socket.socket(fileno=peer.detach()) as raw:
        yield Met(tunnel, ours, raw, records)


def ask_for_a_key(peer: Met, times: int) -> None:
    """Records that want nothing but an answer, and the tunnel receives them."""
    view = memoryview(bytearray(1))
    while times > 0:
        asked = (peer.records(KEY_UPDATE_ASKED, HANDSHAKE) for _ in range(min(times, 1000)))
        peer.theirs.sendall(b"".join(asked))
        while peer.waiting:
            with suppress(BlockingIOError):
                peer.tunnel.recv_into(view)
        times -= 1000


async def test_records_of_any_kind(pki: Pki, tmp_path: Path) -> None:
    async with met(pki, tmp_path) as (tunnel, _, theirs, records):
        view = memoryview(bytearray(1 << 20))
        theirs.sendall(records(b"one"))
        assert bytes(view[: tunnel.recv_into(view)]) == b"one"
        theirs.sendall(records(b"") + records(b"t") + records(b"") + records(b"wo"))
        assert bytes(view[: tunnel.recv_into(view)]) == b"two"
        theirs.sendall(records(KEY_UPDATE, HANDSHAKE) + records(b"three"))
        assert bytes(view[: tunnel.recv_into(view)]) == b"three"
        theirs.sendall(records(bytes(1000)) + records(CLOSE_NOTIFY, ALERT) + records(b"more"))
        assert tunnel.recv_into(view) == 1000
        assert tunnel.recv_into(view) == 0


async def test_a_record_that_is_too_long(pki: Pki, tmp_path: Path) -> None:
    async with met(pki, tmp_path) as (tunnel, _, theirs, records):
        theirs.sendall(records(bytes(LONGEST + 1)))
        with pytest.raises(TlsError, match=r"(?i)data.length.too.long|record.layer"):
            await tunnel.recv(10)


async def test_records_that_bring_nothing_are_received_bit_by_bit(pki: Pki, tmp_path: Path) -> None:
    """Each of these takes as long as the decryption of kilobytes: a quarter of a megabyte of them
    would hold the loop for half a second, and a client that goes on for ever.
    """
    async with met(pki, tmp_path) as peer:
        view = memoryview(bytearray(1 << 20))
        peer.theirs.sendall(b"".join(peer.records(KEY_UPDATE, HANDSHAKE) for _ in range(4000)))
        taken = []
        while before := peer.waiting:
            with pytest.raises(BlockingIOError):
                peer.tunnel.recv_into(view)
            taken.append(before - peer.waiting)
        assert 0 < max(taken) <= 4096
        assert max(taken[8:]) == 1024  # 37 records


async def test_short_records_are_received_bit_by_bit(pki: Pki, tmp_path: Path) -> None:
    async with met(pki, tmp_path) as peer:
        view = memoryview(bytearray(1 << 20))
        peer.theirs.sendall(b"".join(peer.records(b"x") for _ in range(20_000)))
        got = 0
        while got < 20_000:
            before = peer.waiting
            got += peer.tunnel.recv_into(view)
            assert before - peer.waiting <= PIECE


async def test_long_records_are_received_together(pki: Pki, tmp_path: Path) -> None:
    """Wherever what was received ends in the middle of one."""
    async with met(pki, tmp_path) as peer:
        view = memoryview(bytearray(1 << 20))
        peer.theirs.sendall(b"".join(peer.records(bytes(LONGEST)) for _ in range(100)))
        got, taken = 0, []
        while got < 100 * LONGEST:
            before = peer.waiting
            with suppress(BlockingIOError):
                got += peer.tunnel.recv_into(view)
            taken.append(before - peer.waiting)
        assert min(taken[12:-1]) == max(taken) > 3 * LONGEST


async def test_others_have_their_turn_between_short_records(pki: Pki, tmp_path: Path) -> None:
    """Also in the handshake, where one receives after the other."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with met(pki, tmp_path) as peer:
        data = b"".join(peer.records(KEY_UPDATE, HANDSHAKE) for _ in range(4000))
        peer.theirs.sendall(data + peer.records(b"end"))
        counting = asyncio.create_task(others())
        assert await peer.tunnel.recv(10) == b"end"
        counting.cancel()
        assert turns >= len(data) // PIECE


async def test_new_keys_that_were_asked_for_do_not_gather(pki: Pki, tmp_path: Path) -> None:
    """They leave, though nothing else is on its way. (OpenSSL keeps the last one for what is next:
    the answer has to be there before that, and not sooner.)
    """
    async with met(pki, tmp_path) as peer:
        peer.theirs.settimeout(20)
        for count in range(10):
            ask_for_a_key(peer, 1)
            if count:
                header = peer.theirs.recv(5, socket.MSG_WAITALL)
                assert header[:3] == b"\x17\3\3"
                peer.theirs.recv(int.from_bytes(header[3:]), socket.MSG_WAITALL)


async def test_who_asks_for_new_keys_and_takes_none_is_given_up(pki: Pki, tmp_path: Path) -> None:
    """In transmission, where the answers wait for the socket."""
    async with met(pki, tmp_path) as peer:
        peer.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with pytest.raises(OSError, match="takes none") as caught:
            ask_for_a_key(peer, 100_000)
        assert caught.value.errno == errno.EPROTO


async def test_who_negotiates_new_keys_and_nothing_else_is_given_up(
    pki: Pki, tmp_path: Path
) -> None:
    """Between two options, where the answers wait for the next reply."""
    async with met(pki, tmp_path) as peer:
        asked = b"".join(peer.records(KEY_UPDATE_ASKED, HANDSHAKE) for _ in range(30_000))
        sending = asyncio.create_task(asyncio.to_thread(peer.theirs.sendall, asked))
        with pytest.raises(TlsError, match="takes none"):
            await peer.tunnel.recv(10)
        await sending
