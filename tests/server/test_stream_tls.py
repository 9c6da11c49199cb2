"""Stream after `Stream.start_tls`, with the standard library's own client at the other end."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from interop.certificates import Pki
from pynbd.errors import TlsError
from pynbd.server.stream import FilePiece, Piece, ReplyEnd, Stream
from tests.block.reading import eventually

DATA = random.Random(8).randbytes(4 << 20)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def server_context(pki: Pki) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki.server / "server-cert.pem", pki.server / "server-key.pem")
    context.num_tickets = 0
    return context


def client_context(pki: Pki, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki.server / "ca-cert.pem")
    context.maximum_version = version
    return context


@asynccontextmanager
async def connected(
    pki: Pki, *, small: bool = False, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> AsyncIterator[tuple[Stream, ssl.SSLSocket]]:
    """A stream that has shaken hands with a blocking client, which threads use."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    stream = Stream(asyncio.get_running_loop(), ours)
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    wrap = client_context(pki, version).wrap_socket
    wrapping = asyncio.create_task(asyncio.to_thread(wrap, theirs, server_hostname="localhost"))
    await stream.start_tls(server_context(pki))
    peer = await wrapping
    try:
        yield stream, peer
    finally:
        stream.close()
        peer.close()


def received(peer: ssl.SSLSocket, length: int, piece: int = 1 << 16) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = peer.recv(min(piece, length - len(parts)))
        if not part:
            break
        parts += part
    return bytes(parts)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_both_ways_in_a_handshake(pki: Pki, version: ssl.TLSVersion) -> None:
    async with connected(pki, version=version) as (stream, peer):
        await asyncio.to_thread(peer.sendall, DATA[:200_000] + b"next")
        assert await stream.read_exactly(100_000) == DATA[:100_000]
        await stream.skip(100_000)
        assert await stream.read_exactly(4) == b"next"
        await stream.write(DATA[:100_000])
        assert await asyncio.to_thread(received, peer, 100_000) == DATA[:100_000]


async def test_nothing_in_clear_comes_through(pki: Pki) -> None:
    """What is there before the client's handshake begins is a broken handshake."""
    ours, theirs = socket.socketpair()
    stream = Stream(asyncio.get_running_loop(), ours)
    theirs.sendall(b"IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0")
    with pytest.raises(TlsError, match="wrong version number"):
        await stream.start_tls(server_context(pki))
    stream.close()
    theirs.close()


async def test_random_pieces(pki: Pki, file: int) -> None:
    """Also where hardly anything fits between the two, in records that leave bit by bit."""
    rng = random.Random(9)
    for _ in range(20):
        async with connected(pki, small=rng.random() < 0.7) as (stream, peer):
            expected = b""
            for _ in range(rng.randrange(1, 6)):
                end = ReplyEnd(b"END", b"BAD")
                pieces: list[Piece] = []
                for _ in range(rng.randrange(6)):
                    at, size = rng.randrange(1 << 20), rng.choice((1, 16, 4096, 100_000, 700_000))
                    expected += DATA[at : at + size]
                    data = DATA[at : at + size]
                    pieces.append(rng.choice((data, FilePiece(file, at, size, end))))
                stream.send([*pieces, end])
                view = memoryview(bytearray(DATA[: rng.choice((5, 5000, 300_000))]))
                stream.send_view(view)
                expected += b"END" + view
                view[:] = bytes(len(view))  # it is the caller's again
            piece = rng.choice((100_000, 3000))
            assert await asyncio.to_thread(received, peer, len(expected), piece) == expected
            await eventually(lambda: stream.queued == 0)


async def test_what_is_sent_late_is_told(pki: Pki) -> None:
    """It waits until the last record has left, and not only until it is encrypted."""
    async with connected(pki, small=True) as (stream, peer):
        told: list[str] = []
        stream.on_blocked = lambda: told.append("blocked")
        stream.on_drained = lambda: told.append("drained")
        stream.send([DATA[:100_000]])
        assert told == ["blocked"]
        assert stream.queued == 100_000
        assert await asyncio.to_thread(received, peer, 100_000) == DATA[:100_000]
        await eventually(lambda: "drained" in told)
        assert stream.queued == 0


async def test_a_file_that_ends_early(pki: Pki, file: int) -> None:
    async with connected(pki) as (stream, peer):
        end = ReplyEnd(b"done", b"failed")
        stream.send([b"head", FilePiece(file, len(DATA) - 100_000, 100_001, end), end, b"next"])
        whole = b"head" + DATA[-100_000:] + b"\0failednext"
        assert await asyncio.to_thread(received, peer, len(whole)) == whole


async def test_what_the_tunnel_has_already_is_received(pki: Pki) -> None:
    """The socket is empty, and nothing tells of what was decrypted with the end of a handshake."""
    async with connected(pki) as (stream, peer):
        await asyncio.to_thread(peer.sendall, b"option" + DATA[:5000])
        assert await stream.read_exactly(6) == b"option"
        room, got = memoryview(bytearray(10_000)), 0

        def on_readable() -> None:
            nonlocal got
            got += stream.receive_into(room[got:]) or 0

        stream.on_readable = on_readable
        stream.resume_reading()
        await eventually(lambda: got == 5000)
        assert room[:got] == DATA[:5000]
        assert stream.receive_into(room) is None


async def test_who_goes_on_reading_is_called_for_what_is_left(pki: Pki) -> None:
    """Also where reading was not paused: one that had taken all it had room for, and its turn."""
    async with connected(pki) as (stream, peer):
        await asyncio.to_thread(peer.sendall, DATA[:5000])
        room, got = memoryview(bytearray(5000)), 0

        def on_readable() -> None:
            nonlocal got
            got += stream.receive_into(room[got : got + 1000]) or 0
            asyncio.get_running_loop().call_soon(stream.resume_reading)

        stream.on_readable = on_readable
        stream.resume_reading()
        await eventually(lambda: got == 5000)
        assert room == DATA[:5000]
        stream.pause_reading()


async def test_requests_of_any_segmentation(pki: Pki) -> None:
    rng = random.Random(3)
    async with connected(pki) as (stream, peer):
        parts: list[bytes] = []

        def on_readable() -> None:
            room = memoryview(bytearray(rng.choice((1, 100, 20_000, 300_000))))
            for _ in range(rng.randrange(1, 4)):
                count = stream.receive_into(room)
                if count is None:
                    return
                parts.append(bytes(room[:count]))
            stream.pause_reading()
            asyncio.get_running_loop().call_soon(stream.resume_reading)

        def send() -> None:
            at = 0
            while at < 1 << 20:
                size = rng.choice((1, 28, 4096, 16384, 100_000))
                peer.sendall(DATA[at : at + size])
                at += size

        stream.on_readable = on_readable
        stream.resume_reading()
        await asyncio.to_thread(send)
        await eventually(lambda: sum(map(len, parts)) >= 1 << 20)
        stream.pause_reading()
        assert b"".join(parts) == DATA[: sum(map(len, parts))]


async def test_close_notify_is_sent_and_understood(pki: Pki) -> None:
    async with connected(pki) as (stream, peer):
        stream.close()
        assert await asyncio.to_thread(peer.recv, 10) == b""  # without one it is an SSLEOFError
    async with connected(pki) as (stream, peer):
        raw = await asyncio.to_thread(_say_goodbye, peer)
        await eventually(lambda: stream.receive_into(memoryview(bytearray(10))) == 0)
        stream.close()
        assert raw.recv(100)  # the server's own, although the client's was there first
        raw.close()


def _say_goodbye(peer: ssl.SSLSocket) -> socket.socket:
    """Send close_notify, and wait for nothing."""
    peer.setblocking(False)
    with pytest.raises(ssl.SSLWantReadError):
        peer.unwrap()
    peer.setblocking(True)
    return socket.socket(fileno=peer.detach())


async def test_a_peer_that_goes_without_a_word(pki: Pki) -> None:
    """Row T19."""
    async with connected(pki) as (stream, peer):
        socket.socket(fileno=peer.detach()).close()
        assert stream.receive_into(memoryview(bytearray(10))) == 0


async def test_a_record_that_was_tampered_with(pki: Pki) -> None:
    async with connected(pki) as (stream, peer):
        raw = socket.socket(fileno=peer.detach())
        raw.sendall(b"\x17\3\3\0\x20" + bytes(32))
        with pytest.raises(OSError, match=r"TLS: .*(bad record mac|record layer)") as caught:
            stream.receive_into(memoryview(bytearray(10)))  # OpenSSL 3.0; 3.5
        assert caught.value.errno == errno.EPROTO
        stream.close()
        raw.close()
