"""Stream on socket pairs: never a byte too many, nothing lost, nothing out of order."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from pynbd.server import stream as streams
from pynbd.server.stream import (
    COPY_COST,
    COPY_PIECE,
    SEND_TURN,
    TAKEN_EVERY,
    FilePiece,
    Piece,
    ReplyEnd,
    Stream,
)
from tests.block.devices import loop_device
from tests.block.reading import eventually
from tests.server.session import open_files

DATA = random.Random(8).randbytes(8 << 20)


class Events:
    """What the stream told."""

    def __init__(self, stream: Stream) -> None:
        self.told: list[str] = []
        stream.on_drained = lambda: self.told.append("drained")
        stream.on_lost = lambda: self.told.append("lost")


@asynccontextmanager
async def connected(small: bool = False) -> AsyncIterator[tuple[Stream, socket.socket]]:
    """A stream and its peer. ``small``: hardly anything fits between them."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    stream = Stream(asyncio.get_running_loop(), ours)
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    try:
        yield stream, theirs
    finally:
        stream.close()
        theirs.close()


async def received(sock: socket.socket, length: int, piece: int = 1 << 16) -> bytes:
    loop = asyncio.get_running_loop()
    parts = bytearray()
    while len(parts) < length:
        ask = min(piece, length - len(parts))
        part = await asyncio.wait_for(loop.sock_recv(sock, ask), 10)
        if not part:
            break
        parts += part
    return bytes(parts)


OTHERS = r"""
import os, socket, sys
client = socket.socket(socket.AF_UNIX)
os.seteuid(4000000001)
client.connect("\0" + sys.argv[1])
client.recv(1)
"""


@contextmanager
def somebody_else(groups: list[int]) -> Iterator[socket.socket]:
    """A connection from user 4000000001, whose primary group is 4000000002."""
    name = f"pynbd-owner-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        listener.settimeout(20)
        line = [sys.executable, "-c", OTHERS, name]
        with subprocess.Popen(line, group=4000000002, extra_groups=groups):
            yield listener.accept()[0]


@pytest.mark.skipif(
    os.geteuid() != 0 or "4294967295" not in Path("/proc/self/gid_map").read_text(),
    reason="only root of the whole machine may be anybody",
)
async def test_the_owner_of_a_local_peer() -> None:
    """Also in groups beyond the first, and with numbers that take all 32 bits."""
    groups = [4000000000, *range(100, 200)]
    with somebody_else(groups) as sock:
        stream = Stream(asyncio.get_running_loop(), sock)
        owner = stream.owner()
        stream.close()
    assert owner == (4000000001, frozenset({4000000002, *groups}))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


# The handshake -----------------------------------------------------------------------------------


async def test_read_exactly_never_reads_further() -> None:
    """What follows stays in the socket: it may be a ClientHello."""
    async with connected() as (stream, peer):
        peer.send(b"option header, and more")
        assert await stream.read_exactly(6) == b"option"
        assert await stream.read_exactly(8) == b" header,"
        assert stream._sock.recv(100) == b" and more"


async def test_read_exactly_waits_for_all() -> None:
    async with connected() as (stream, peer):
        reading = asyncio.ensure_future(stream.read_exactly(5))
        for byte in b"whole":
            peer.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await reading == b"whole"


async def test_skip_never_skips_further() -> None:
    async with connected() as (stream, peer):
        loop = asyncio.get_running_loop()
        sending = asyncio.ensure_future(loop.sock_sendall(peer, bytes(300_000) + b"next"))
        await stream.skip(300_000)
        await sending
        assert await stream.read_exactly(4) == b"next"


async def test_the_end_in_the_handshake() -> None:
    async with connected() as (stream, peer):
        peer.send(b"abc")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            await stream.read_exactly(4)
        with pytest.raises(EOFError):
            await stream.skip(1)


async def test_write_sends_all() -> None:
    async with connected(small=True) as (stream, peer):
        writing = asyncio.ensure_future(stream.write(DATA[:1_000_000]))
        assert await received(peer, 1_000_000) == DATA[:1_000_000]
        await writing


# Receiving ---------------------------------------------------------------------------------------


async def test_receive_into() -> None:
    async with connected() as (stream, peer):
        view = memoryview(bytearray(8))
        assert stream.receive_into(view) is None
        peer.send(b"0123456789")
        assert stream.receive_into(view) == 8
        assert bytes(view) == b"01234567"
        assert stream.receive_into(view) == 2
        peer.close()
        assert stream.receive_into(view) == 0


async def test_reading_can_pause() -> None:
    async with connected() as (stream, peer):
        calls: list[int | None] = []
        view = memoryview(bytearray(8))
        stream.on_readable = lambda: calls.append(stream.receive_into(view))
        peer.send(b"x")
        await asyncio.sleep(0.01)
        assert not calls
        stream.resume_reading()
        stream.resume_reading()
        await asyncio.sleep(0.01)
        assert calls == [1]
        stream.pause_reading()
        stream.pause_reading()
        peer.send(b"x")
        await asyncio.sleep(0.01)
        assert calls == [1]
        assert not stream.reading


# Sending -----------------------------------------------------------------------------------------


async def test_what_fits_leaves_at_once() -> None:
    async with connected() as (stream, peer):
        events = Events(stream)
        stream.send_view(memoryview(b"view "))
        stream.send([b"bytes ", bytearray(b"bytearray "), memoryview(b"xviewx")[1:5]])
        assert stream.queued == 0
        assert peer.recv(100) == b"view bytes bytearray view"
        assert events.told == []


async def test_more_pieces_than_one_call_takes() -> None:
    """IOV_MAX is 1024."""
    async with connected() as (stream, peer):
        pieces = [bytes([n % 251]) * (n % 5) for n in range(5000)]
        stream.send(pieces)
        assert await received(peer, sum(map(len, pieces))) == b"".join(pieces)
        assert stream.queued == 0


async def test_what_does_not_fit_waits_in_order() -> None:
    async with connected(small=True) as (stream, peer):
        events = Events(stream)
        view = bytearray(DATA[:300_000])
        stream.send_view(memoryview(view))
        view[:] = bytes(len(view))  # the caller goes on using it
        stream.send([DATA[300_000:300_010], DATA[300_010:900_000]])
        stream.send_view(memoryview(DATA)[900_000:900_001])
        assert 0 < stream.queued <= 900_001
        assert await received(peer, 900_001, 10_000) == DATA[:900_001]
        assert (stream.queued, events.told) == (0, ["drained"])


async def test_files_between_buffers(file: int) -> None:
    async with connected(small=True) as (stream, peer):
        events = Events(stream)
        end = ReplyEnd(b"done", b"failed")
        stream.send(
            [
                b"head",
                FilePiece(file, 10, 1_000_000, end),
                b"middle",
                FilePiece(file, 5_000_000, 70_000, end),
                end,
                b"next",
            ]
        )
        expected = b"".join(
            [b"head", DATA[10:1_000_010], b"middle", DATA[5_000_000:5_070_000], b"donenext"]
        )
        assert await received(peer, len(expected)) == expected
        assert (stream.queued, events.told) == (0, ["drained"])


@pytest.mark.parametrize("small", [False, True])
async def test_a_file_that_is_too_short(file: int, small: bool) -> None:
    """Zeroes to the length that was promised, then the other end; the next reply is as always."""
    async with connected(small) as (stream, peer):
        end, other = ReplyEnd(b"done", b"it failed"), ReplyEnd(b"done", b"failed")
        at = len(DATA) - 1000
        stream.send(
            [
                FilePiece(file, at, 100_000, end),
                b"more",
                FilePiece(file, len(DATA) + 5, 10, end),
                end,
                FilePiece(file, 0, 10, other),
                other,
            ]
        )
        expected = DATA[at:] + bytes(99_000) + b"more" + bytes(10) + b"it failed"
        expected += DATA[:10] + b"done"
        assert await received(peer, len(expected)) == expected
        assert stream.queued == 0


@pytest.mark.parametrize("small", [False, True])
async def test_a_file_that_is_too_short_in_a_simple_reply(file: int, small: bool) -> None:
    """Nothing comes after it."""
    async with connected(small) as (stream, peer):
        events = Events(stream)
        end = ReplyEnd(b"", None)
        stream.send([b"head", FilePiece(file, len(DATA) - 100_000, 100_001, end), end, b"next"])
        expected = b"head" + DATA[-100_000:]
        assert await received(peer, len(expected)) == expected
        await asyncio.sleep(0.01)
        assert events.told[0] == "lost"
        assert stream.queued == 0
        stream.send([b"more"])
        stream.send_view(memoryview(b"more"))
        stream.close()
        assert peer.recv(100) == b""


@pytest.mark.parametrize("small", [False, True])
async def test_a_file_that_cannot_be_read(file: int, tmp_path: Path, small: bool) -> None:
    """A disk that fails is told with the reply, and the connection goes on."""
    whole = 2 << 20
    path = tmp_path / "disk"
    path.write_bytes(DATA[:whole])
    with loop_device(path) as device:
        disk = os.open(device, os.O_RDONLY)
        os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.truncate(path, whole // 2)
        async with connected(small) as (stream, peer):
            events = Events(stream)
            end, other = ReplyEnd(b"done", b"it failed"), ReplyEnd(b"done", b"failed")
            stream.send(
                [
                    FilePiece(disk, 4096, whole - 4096, end),
                    b"more",
                    end,
                    FilePiece(file, 0, 10, other),
                    other,
                ]
            )
            expected = DATA[4096 : whole // 2] + bytes(whole // 2) + b"moreit failed"
            expected += DATA[:10] + b"done"
            assert await received(peer, len(expected)) == expected
            assert stream.queued == 0
            assert "lost" not in events.told
        os.close(disk)


async def test_a_file_that_cannot_be_sent(tmp_path: Path) -> None:
    """The kernel sends no directory: EINVAL."""
    directory = os.open(tmp_path, os.O_RDONLY)
    async with connected() as (stream, peer):
        end = ReplyEnd(b"done", b"it failed")
        stream.send([FilePiece(directory, 0, 100, end), end])
        assert await received(peer, 109) == bytes(100) + b"it failed"
    async with connected() as (stream, peer):
        events = Events(stream)
        end = ReplyEnd(b"", None)
        stream.send([b"head", FilePiece(directory, 0, 100, end), end, b"next"])
        assert events.told == ["lost"]
        stream.close()
        assert await received(peer, 100) == b"head"
    os.close(directory)


async def test_an_end_without_words(file: int) -> None:
    """In simple replies the data is the end."""
    async with connected() as (stream, peer):
        end = ReplyEnd(b"", None)
        stream.send([b"head", FilePiece(file, 0, 10, end), end])
        stream.send([end, b"next", end])
        assert await received(peer, 18) == b"head" + DATA[:10] + b"next"
        assert stream.queued == 0


async def test_random_pieces(file: int) -> None:
    rng = random.Random(9)
    for _ in range(20):
        async with connected(small=rng.random() < 0.7) as (stream, peer):
            expected = b""
            for _ in range(rng.randrange(1, 6)):
                end = ReplyEnd(b"END", b"BAD")
                pieces: list[Piece] = []
                for _ in range(rng.randrange(6)):
                    at, size = rng.randrange(1 << 20), rng.choice((1, 16, 4096, 100_000))
                    expected += DATA[at : at + size]
                    data = DATA[at : at + size]
                    pieces.append(rng.choice((data, FilePiece(file, at, size, end))))
                if rng.random() < 0.2:
                    expected += DATA[5:205]
                    stream.send([*pieces, DATA[5:205], end])
                else:
                    stream.send([*pieces, end])
                expected += b"END"
            assert await received(peer, len(expected), rng.choice((100_000, 3000))) == expected
            assert stream.queued == 0


# The peer goes -----------------------------------------------------------------------------------


async def test_a_peer_that_has_gone() -> None:
    async with connected() as (stream, peer):
        events = Events(stream)
        peer.close()
        stream.send([b"x"])
        assert events.told == ["lost"]
        stream.send([b"x"])
        assert stream.queued == 0


async def test_a_peer_that_has_gone_before_a_file(file: int) -> None:
    """The file is not to blame."""
    async with connected() as (stream, peer):
        events = Events(stream)
        peer.close()
        end = ReplyEnd(b"done", b"failed")
        stream.send([FilePiece(file, 0, 100, end), end])
        assert events.told == ["lost"]
        assert not end.broken


class NoBytes:
    """In place of `bytes`: there is no memory for any."""

    def __new__(cls, *_: object) -> NoBytes:
        raise MemoryError


async def test_no_memory_for_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that was cut short is followed by nothing."""
    async with connected(small=True) as (stream, peer):
        events = Events(stream)
        monkeypatch.setattr(streams, "bytes", NoBytes, raising=False)
        stream.send_view(memoryview(DATA))
        assert events.told == ["lost"]
        monkeypatch.undo()
        stream.send([b"more"])
        stream.close()
        assert DATA.startswith(await received(peer, len(DATA)))


@pytest.mark.parametrize("at_once", [True, False])
async def test_no_memory_for_the_rest_of_a_file(
    file: int, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """Whether it was sent at once or had to wait: the peer is lost, and nothing goes on for it."""
    async with connected() as (stream, peer):
        events = Events(stream)
        if not at_once:
            stream.send([DATA])
            assert stream.queued
        monkeypatch.setattr(streams, "bytes", NoBytes, raising=False)
        end = ReplyEnd(b"done", b"failed")
        stream.send([FilePiece(file, len(DATA), 100, end), end])  # there is no more of it
        if not at_once:
            assert await received(peer, len(DATA)) == DATA
            await eventually(lambda: stream._lost)
        assert events.told == ["lost"]
        assert not stream._writing


async def test_a_peer_that_goes_while_something_waits() -> None:
    async with connected(small=True) as (stream, peer):
        events = Events(stream)
        stream.send([DATA])
        assert stream.queued
        peer.close()
        await asyncio.sleep(0.01)
        assert events.told[0] == "lost"
        assert stream.queued == 0


async def test_closing() -> None:
    before = open_files()
    async with connected(small=True) as (stream, peer):
        stream.send([DATA])
        stream.resume_reading()
        stream.close()
        stream.close()
        stream.resume_reading()
        stream.send([b"x"])
        assert (stream.queued, stream.reading) == (0, False)
        await asyncio.sleep(0.01)
        peer.close()
    assert open_files() == before


async def test_tcp_sends_without_delay() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        Stream(asyncio.get_running_loop(), server)
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not server.getblocking()
        client.close()
        server.close()


def reads(file: int, calls: list[tuple[int, int]]) -> Callable[[memoryview, int], int]:
    def read(view: memoryview, offset: int) -> int:
        calls.append((len(view), offset))
        return os.preadv(file, [view], offset)

    return read


async def test_what_is_lent_is_released_when_the_peer_has_taken_it(file: int) -> None:
    async with connected() as (stream, peer):
        released: list[str] = []
        calls: list[tuple[int, int]] = []
        for name, length in (("one", 100_000), ("two", 200_000)):
            end = ReplyEnd(b"done", b"failed")
            end.release = partial(released.append, name)
            stream.send([b"head", FilePiece(file, 0, length, end, reads(file, calls)), end])
        assert stream.queued == 0
        await asyncio.sleep(3 * TAKEN_EVERY)
        assert released == []
        assert await received(peer, 100_008) == b"head" + DATA[:100_000] + b"done"
        assert await received(peer, 100_004) == b"head" + DATA[:100_000]
        await eventually(lambda: released == ["one"])
        assert await received(peer, 100_004) == DATA[100_000:200_000] + b"done"
        await eventually(lambda: released == ["one", "two"])
        assert calls == []


@pytest.mark.parametrize("waits", [True, False])
async def test_what_is_lent_is_released_when_the_peer_is_lost(file: int, waits: bool) -> None:
    async with connected(small=waits) as (stream, _):
        told = Events(stream).told
        released: list[None] = []
        end = ReplyEnd(b"done", b"failed")
        end.release = partial(released.append, None)
        stream.send([FilePiece(file, 0, 100_000, end, os.preadv), end])  # type: ignore[arg-type]
        assert bool(stream.queued) == waits
        stream.close()
        assert released == [None]
        end.release = partial(released.append, None)
        stream.send([end])  # too late
        assert released == [None, None]
        await asyncio.sleep(2 * TAKEN_EVERY)
        assert told == []


async def test_over_tcp_what_may_not_be_lent_is_copied(file: int) -> None:
    """TCP tells what was acknowledged, which the peer may not have taken yet."""
    length = 3 * SEND_TURN // COPY_COST + 1000
    listener = socket.create_server(("127.0.0.1", 0))
    peer = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    peer.setblocking(False)
    stream = Stream(asyncio.get_running_loop(), ours)
    try:
        released: list[None] = []
        calls: list[tuple[int, int]] = []
        end = ReplyEnd(b"done", b"failed")
        end.release = partial(released.append, None)
        stream.send([b"head", FilePiece(file, 10, length, end, reads(file, calls)), end, b"next"])
        # One turn's worth, however much the socket takes.
        assert sum(count for count, _ in calls) <= SEND_TURN // COPY_COST + COPY_PIECE
        assert released == []
        expected = b"head" + DATA[10 : 10 + length] + b"donenext"
        assert await received(peer, len(expected)) == expected
        assert released == [None]
        assert max(count for count, _ in calls) <= COPY_PIECE
    finally:
        stream.close()
        peer.close()


@pytest.mark.parametrize("kind", ["one buffer", "buffers", "file"])
async def test_one_turn_sends_so_much_however_fast_the_peer_is(file: int, kind: str) -> None:
    """A peer that takes everything at once would otherwise have the loop for itself."""
    ours, theirs = socket.socketpair()
    stream = Stream(asyncio.get_running_loop(), ours)
    turns: list[int] = []
    taken = bytearray()

    def take() -> None:
        while len(taken) < len(DATA):
            taken.extend(theirs.recv(1 << 20))

    taking = threading.Thread(target=take)
    taking.start()
    try:
        if kind == "file":
            end = ReplyEnd(b"", None)
            stream.send([FilePiece(file, 0, len(DATA), end), end])
        else:
            step = len(DATA) if kind == "one buffer" else 10_000
            stream.send([DATA[at : at + step] for at in range(0, len(DATA), step)])
        while stream.queued:
            turns.append(stream.queued)
            await asyncio.sleep(0)
        turns.append(0)
        assert len(DATA) - turns[0] <= SEND_TURN
        assert all(before - after <= SEND_TURN for before, after in pairwise(turns))
    finally:
        taking.join(20)
        stream.close()
        theirs.close()
    assert taken == DATA
