"""The transmission phase: what a batch costs, the order of replies, the budget, the endings."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.errors import ProtocolError
from pynbd.server.buffers import BufferPool
from pynbd.server.contexts import standard_contexts
from pynbd.server.limits import Limits
from pynbd.server.stream import TAKEN_EVERY
from pynbd.server.transmission import RECEIVE_SIZE
from tests.block.reading import eventually
from tests.server.counting import Costs, peak_memory
from tests.server.session import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ESHUTDOWN,
    FLUSH,
    FUA,
    PAYLOAD_LEN,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    Mode,
    Talk,
    WatchedEngine,
    content,
    talking,
)

SIZE = 4 << 20
BYTES = random.Random(4).randbytes(SIZE)
K, M = 1 << 10, 1 << 20

every_mode = pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(BYTES)
    return path


@asynccontextmanager
async def opened(path: Path, engine: WatchedEngine) -> AsyncIterator[BlockNode]:
    node = await open_image(path, format="raw", read_only=False, engine=engine)
    engine.calls.clear()
    try:
        yield node
    finally:
        engine.release()
        await node.close()


# What a batch costs ------------------------------------------------------------------------------


@every_mode
async def test_a_batch_of_hits(path: Path, engine: WatchedEngine, costs: Costs, mode: Mode) -> None:
    """64 reads: one receive and the look for more, one disk read each, one send; no Task, no
    hop.
    """
    async with opened(path, engine) as node, talking(node, mode, wrap=costs.wrap) as talk:
        client = talk.client
        offsets = random.Random(5).sample(range(0, SIZE - 4096, 512), 64)
        batch = [client.request(READ, offset, 4096, cookie=offset) for offset in offsets]
        costs.start()
        await client.send(*batch)
        await client.all_replies()
        assert costs.socket_calls == ["recv", "send", "recv"]
        assert costs.calls("preadv", "pread") == [4096] * 64
        assert (costs.tasks, engine.hops) == (0, 0)
        for offset in offsets:
            assert client.replies[offset].data(offset, 4096) == BYTES[offset : offset + 4096]
        assert client.order == offsets


@every_mode
async def test_a_long_hit_is_sent_by_the_kernel(
    path: Path, engine: WatchedEngine, costs: Costs, mode: Mode
) -> None:
    """The bytes of the file never come into this process, but a few that show that they are
    there.
    """
    async with opened(path, engine) as node, talking(node, mode, wrap=costs.wrap) as talk:
        if not node.file.resident(0, SIZE):
            pytest.skip("cachestat needs Linux 6.5")
        costs.start()
        reply = await talk.client.ask(READ, 100, 1 << 20, cookie=1)
        assert reply.data(100, 1 << 20) == BYTES[100 : 100 + (1 << 20)]
        assert (costs.tasks, engine.hops) == (0, 0)
        assert sum(costs.calls("preadv", "pread")) < 10


async def test_a_miss_has_a_task_and_a_hop(path: Path, engine: WatchedEngine, costs: Costs) -> None:
    """A read that is too long to be copied in the loop, of a file that may not be lent. One Task
    for the request, perhaps one for its extent.
    """
    async with opened(path, engine) as node, talking(node, wrap=costs.wrap) as talk:
        node.file._cachestat = False  # nobody knows what is in the page cache
        costs.start()
        reply = await talk.client.ask(READ, 512, 300 * K)
        assert reply.data(512, 300 * K) == BYTES[512 : 512 + 300 * K]
        assert engine.hops == 1
        assert costs.tasks in (1, 2)


@every_mode
async def test_the_writes_of_a_batch_share_a_hop(
    path: Path, engine: WatchedEngine, costs: Costs, mode: Mode
) -> None:
    async with opened(path, engine) as node, talking(node, mode, wrap=costs.wrap) as talk:
        client = talk.client
        batch = [client.request(WRITE, n * 8192, payload=bytes([n]) * 4096) for n in range(1, 17)]
        costs.start()
        await client.send(*batch)
        await client.all_replies()
        assert (costs.tasks, engine.hops) == (1, 1)
        assert not any(reply.error for reply in client.replies.values())
        assert costs.socket["send"] == 1
    written = content(path)
    for n in range(1, 17):
        assert written[n * 8192 : n * 8192 + 8192] == (
            bytes([n]) * 4096 + BYTES[n * 8192 + 4096 : n * 8192 + 8192]
        )


async def test_long_writes_are_spread_over_the_pool(path: Path, engine: WatchedEngine) -> None:
    """A batch is cut into hops of 256 KiB; a payload longer than half a buffer goes alone."""
    async with opened(path, engine) as node, talking(node) as talk:
        client = talk.client
        await client.send(
            *(client.request(WRITE, n << 20, payload=bytes([n]) * (1 << 20)) for n in range(4))
        )
        await client.all_replies()
        assert engine.calls == ["_write_batch"] * 4
    assert content(path) == b"".join(bytes([n]) * (1 << 20) for n in range(4))


# Order -------------------------------------------------------------------------------------------


@every_mode
async def test_replies_leave_as_they_complete(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        node.file._cachestat = False  # nobody knows what is in the page cache
        engine.held = {"_read_unless_hole", "_sync"}
        await client.send(
            client.request(READ, 0, 300 * K, cookie=1),
            client.request(FLUSH, cookie=2),
            client.request(READ, 4096, 512, cookie=3),
            client.request(TRIM, 1 << 20, 4096, cookie=4),
        )
        assert (await client.reply(3)).data(4096, 512) == BYTES[4096:4608]
        assert not (await client.reply(4)).error
        engine.release()
        await client.all_replies()
        assert set(client.order[:2]) == {3, 4}
        assert client.replies[1].data(0, 300 * K) == BYTES[: 300 * K]


class Traffic:
    """Random requests against a shadow of the disk.

    Reads and everything that changes nothing go to one half; in the other every slot is written or
    zeroed once.
    """

    KINDS = (
        *("read", "read", "read", "long", "empty", "status", "flush", "cache"),
        *("write", "write", "zeroes", "beyond", "bad"),
    )

    def __init__(self, client: Client, rng: random.Random) -> None:
        self.client = client
        self.rng = rng
        self.shadow = bytearray(BYTES)
        self.expected: dict[int, tuple[int, int, int]] = {}
        """Of each cookie: the error, and offset and length of data that were asked for."""
        self._slots = list(range(SIZE // 2, SIZE, 16 * K))
        rng.shuffle(self._slots)

    def request(self, cookie: int) -> bytes:
        rng, client = self.rng, self.client
        kind = rng.choice(self.KINDS)
        offset, length = rng.randrange(SIZE // 2 - 70_000), rng.choice((1, 512, 4096, 65_535))
        self.expected[cookie] = (0, offset, 0)
        if kind in ("write", "zeroes") and self._slots:
            offset, length = self._slots.pop() + rng.randrange(16), rng.choice((1, 4000, 16_000))
            if kind == "zeroes":
                self.shadow[offset : offset + length] = bytes(length)
                return client.request(WRITE_ZEROES, offset, length, cookie=cookie)
            payload = rng.randbytes(length)
            self.shadow[offset : offset + length] = payload
            flags = rng.choice((0, 0, FUA))
            return client.request(WRITE, offset, payload=payload, cookie=cookie, flags=flags)
        if kind == "flush":
            return client.request(FLUSH, cookie=cookie)
        if kind == "cache":
            return client.request(CACHE, offset, length, cookie=cookie)
        if kind == "empty":
            return client.request(READ, offset, 0, cookie=cookie)
        if kind == "bad":
            self.expected[cookie] = (EINVAL, offset, 0)
            return client.request(99, offset, length, cookie=cookie)
        if kind == "beyond":
            self.expected[cookie] = (ENOSPC, offset, 0)
            return client.request(WRITE, SIZE - 99, payload=rng.randbytes(100), cookie=cookie)
        if kind == "status" and client.mode is not Mode.SIMPLE:
            return client.request(BLOCK_STATUS, offset, length, cookie=cookie)
        if kind == "long":
            length = rng.choice((65_536, 70_000))
        self.expected[cookie] = (0, offset, length)
        return client.request(READ, offset, length, cookie=cookie)

    def check(self) -> None:
        assert sorted(self.client.order) == sorted(self.expected)
        for cookie, (error, offset, length) in self.expected.items():
            reply = self.client.replies[cookie]
            assert reply.error == error, reply
            assert reply.data(offset, length) == BYTES[offset : offset + length]


@every_mode
@pytest.mark.parametrize("seed", range(3))
async def test_every_request_has_one_reply(
    path: Path, engine: WatchedEngine, mode: Mode, seed: int
) -> None:
    """All kinds of requests, pipelined, cut anywhere into segments."""
    rng = random.Random(f"{mode} {seed}")
    async with opened(path, engine) as node:
        contexts = standard_contexts(depth=True, bitmaps=())
        async with talking(node, mode, contexts=contexts) as talk:
            client = talk.client
            traffic = Traffic(client, rng)
            cookies = {0, 2**64 - 1, *(rng.getrandbits(64) for _ in range(500))}
            requests = b"".join(map(traffic.request, cookies))
            sending = asyncio.create_task(segments(client, requests, rng))
            await asyncio.wait_for(client.all_replies(), 30)
            await sending
            traffic.check()
            written = await client.ask(READ, SIZE // 2, SIZE // 2, cookie=1)
            assert written.data(SIZE // 2, SIZE // 2) == traffic.shadow[SIZE // 2 :]
    assert content(path) == traffic.shadow


async def segments(client: Client, data: bytes, rng: random.Random) -> None:
    """Send in pieces from one byte to many, with a turn of the loop between them."""
    at = 0
    while at < len(data):
        size = rng.choice((1, 3, 27, 28, 29, 500, 5_000, 100_000, 600_000))
        await client.send(data[at : at + size])
        at += size
        if rng.random() < 0.5:
            await asyncio.sleep(0)


@every_mode
async def test_one_byte_at_a_time(path: Path, engine: WatchedEngine, mode: Mode) -> None:
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        requests = [
            client.request(READ, 7, 9, cookie=1),
            client.request(WRITE, 4096, payload=b"payload", cookie=2),
            client.request(WRITE, SIZE - 1, payload=b"beyond", cookie=3),
            client.request(FLUSH, cookie=4),
        ]
        for byte in b"".join(requests):
            await client.send(bytes([byte]))
            await asyncio.sleep(0)
        await client.all_replies()
        assert client.replies[1].data(7, 9) == BYTES[7:16]
        assert [client.replies[cookie].error for cookie in (2, 3, 4)] == [0, ENOSPC, 0]


# Buffers -----------------------------------------------------------------------------------------


@every_mode
async def test_a_lent_buffer_is_not_received_into(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    """Writes wait in the pool while much more comes in."""
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        engine.held = {"_write_batch"}
        small, long = random.Random(6).randbytes(4096), random.Random(7).randbytes(200_000)
        await client.send(
            client.request(WRITE, 0, payload=small, cookie=1),
            client.request(WRITE, 1 << 20, payload=long, cookie=2),
        )
        await asyncio.sleep(0.01)
        refused = [
            client.request(WRITE, SIZE, payload=b"\xee" * 60_000, cookie=10 + n) for n in range(16)
        ]
        reads = [client.request(READ, n * 512, 512, cookie=100 + n) for n in range(2000)]
        await client.send(*refused, *reads)
        for n in range(16):
            assert (await client.reply(10 + n)).error == ENOSPC
        for n in range(2000):
            await client.reply(100 + n)
        assert 1 not in client.replies
        assert content(path) == BYTES
        engine.release()
        await client.all_replies()
    assert content(path)[:4096] == small
    assert content(path)[1 << 20 : (1 << 20) + 200_000] == long


async def test_a_cancelled_write_keeps_its_buffer(path: Path, engine: WatchedEngine) -> None:
    """The session is dropped, but the system call that reads the buffer goes on."""
    async with opened(path, engine) as node:
        async with talking(node) as talk:
            engine.held = {"_write_batch"}
            await talk.client.send(talk.client.request(WRITE, 0, payload=b"\x11" * 4096))
            await asyncio.sleep(0.02)
            talk.running.cancel()
            await asyncio.wait([talk.running])
            pool = talk.transmission._pool
            for _ in range(8):
                pool.take(RECEIVE_SIZE)[:] = b"\xee" * RECEIVE_SIZE
        engine.release()
        engine.close()
    assert content(path)[:4097] == b"\x11" * 4096 + BYTES[4096:4097]


async def test_what_comes_after_a_session_was_cancelled_is_not_served(
    path: Path, engine: WatchedEngine
) -> None:
    """A client that goes on asking would keep it alive."""
    async with opened(path, engine) as node, talking(node) as talk:
        engine.held = {"_sync"}
        await talk.client.send(talk.client.request(FLUSH))
        await eventually(lambda: bool(engine.calls))
        talk.running.cancel()
        talk.client.sock.send(talk.client.request(FLUSH))
        await asyncio.wait([talk.running], timeout=5)
        assert talk.running.cancelled()


# No memory ---------------------------------------------------------------------------------------


def no_memory(*_: object) -> bytearray:
    raise MemoryError


async def ended_for_want_of_memory(talk: Talk) -> None:
    with pytest.raises(ProtocolError, match="there is no memory for its requests"):
        await talk.ends()
    assert talk.transmission._memory.used == 0


async def test_no_memory_for_requests_that_had_to_wait(
    path: Path, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        opened(path, engine) as node,
        talking(node, limits=Limits(requests=1)) as talk,
    ):
        engine.held = {"_fallocate_errno"}
        write = talk.client.request(WRITE, 0, payload=b"x")
        await talk.client.send(talk.client.request(TRIM, 0, 4096), write)
        await eventually(lambda: not talk.stream.reading)
        monkeypatch.setattr(BufferPool, "take", no_memory)
        engine.release()
        await ended_for_want_of_memory(talk)


async def test_no_memory_for_a_reply(
    path: Path, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would tell is done, but nobody can be told."""
    async with opened(path, engine) as node, talking(node) as talk:
        engine.held = {"_write_batch"}
        await talk.client.send(talk.client.request(WRITE, 0, payload=b"x"))
        await eventually(lambda: engine.hops == 1)
        monkeypatch.setattr(type(talk.transmission._dialect), "done", no_memory)
        engine.release()
        await ended_for_want_of_memory(talk)
    assert content(path)[:1] == b"x"


# The budget --------------------------------------------------------------------------------------


async def test_a_budget_of_requests(path: Path, engine: WatchedEngine) -> None:
    async with (
        opened(path, engine) as node,
        talking(node, limits=Limits(requests=5)) as talk,
    ):
        client = talk.client
        engine.held = {"_fallocate_errno"}
        await client.send(*(client.request(TRIM, n * 4096, 4096) for n in range(40)))
        await asyncio.sleep(0.05)
        assert engine.hops == 5
        assert not talk.stream.reading
        engine.release()
        await client.all_replies()
        assert engine.hops == 40
        assert talk.stream.reading


async def test_a_budget_of_bytes(path: Path, engine: WatchedEngine) -> None:
    async with (
        opened(path, engine) as node,
        talking(node, limits=Limits(received_bytes=1 << 20)) as talk,
    ):
        client = talk.client
        engine.held = {"_write_batch"}
        writes = [client.request(WRITE, 0, payload=bytes(300 * K)) for _ in range(20)]
        sending = asyncio.create_task(client.send(*writes))
        await eventually(lambda: not talk.stream.reading)
        assert engine.hops == 4
        engine.release()
        await client.all_replies()
        await sending
        assert engine.hops == 20


@every_mode
@pytest.mark.parametrize("length", [4 * K, 60 * K, 1 << 20], ids=["4k", "60k", "1m"])
@pytest.mark.parametrize("lends_pages", [True, False], ids=["lent", "copied"])
async def test_a_peer_that_takes_no_replies(
    path: Path, engine: WatchedEngine, mode: Mode, length: int, lends_pages: bool
) -> None:
    """What waits for it is bounded, however many requests one receive brought."""
    limits = Limits(received_bytes=4 << 20, queued_bytes=4 << 20)
    async with (
        opened(path, engine) as node,
        talking(node, mode, limits=limits) as talk,
    ):
        node.file.lends_pages = lends_pages
        client, most = talk.client, 0
        count = (32 << 20) // length
        requests = b"".join(
            client.request(READ, n * 4096 % (SIZE // 2), length) for n in range(count)
        )
        sending = asyncio.create_task(client.send(requests))
        for _ in range(30):
            await asyncio.sleep(0.002)
            most = max(most, talk.stream.queued)
        assert not talk.stream.reading
        # What is ready, what comes from the pool, and one request past each.
        assert most <= 9 * M + 2 * length
        await client.all_replies()
        await sending
        assert len(client.replies) == count
        assert all(not reply.error for reply in client.replies.values())


# Endings -----------------------------------------------------------------------------------------


@every_mode
async def test_disc_waits_for_requests_in_flight(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        node.file.lends_pages = False
        engine.held = {"_read_unless_hole", "_write_batch"}
        await client.send(
            client.request(READ, 0, 300 * K, cookie=1),
            client.request(WRITE, 2 << 20, payload=b"last", cookie=2),
            client.request(DISC),
            client.request(READ, 0, 512, cookie=3),
        )
        await asyncio.sleep(0.02)
        assert not talk.running.done()
        engine.release()
        assert (await client.reply(1)).data(0, 300 * K) == BYTES[: 300 * K]
        assert not (await client.reply(2)).error
        await talk.ends()
        await client.closed()
    assert content(path)[2 << 20 : (2 << 20) + 4] == b"last"


@every_mode
async def test_a_half_closed_connection_is_answered(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        node.file.lends_pages = False
        await client.send(
            client.request(FLUSH, cookie=1),
            client.request(READ, 0, 512, cookie=2),
            *(client.request(READ, 0, SIZE, cookie=3 + n) for n in range(4)),
            client.request(WRITE, 0, payload=b"cut short", cookie=99)[:-1],
        )
        client.sock.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.05)  # far more than the socket holds
        for cookie in range(1, 7):
            assert not (await client.reply(cookie)).error
        assert client.replies[6].data(0, SIZE) == BYTES
        await talk.ends()
        await client.closed()
    assert content(path) == BYTES


@every_mode
@pytest.mark.parametrize("lends_pages", [True, False], ids=["lent", "copied"])
async def test_a_peer_that_vanishes_in_a_reply(
    path: Path, engine: WatchedEngine, mode: Mode, lends_pages: bool
) -> None:
    async with opened(path, engine) as node:
        node.file.lends_pages = lends_pages
        async with talking(node, mode) as talk:
            client = talk.client
            await client.send(*(client.request(READ, 0, SIZE) for _ in range(8)))
            await asyncio.get_running_loop().sock_recv(client.sock, 1000)
            client.sock.close()
            await talk.ends()
        async with talking(node, mode) as talk:  # the next client is served
            assert (await talk.client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]


@pytest.mark.parametrize("cut", [10, 28, 1000, 200_000])
async def test_a_peer_that_vanishes_in_a_payload(
    path: Path, engine: WatchedEngine, cut: int
) -> None:
    async with opened(path, engine) as node:
        async with talking(node) as talk:
            request = talk.client.request(WRITE, 0, payload=bytes(300_000))
            await talk.client.send(request[:cut])
            await asyncio.sleep(0)
            talk.client.sock.close()
            await talk.ends()
        assert engine.hops == 0
    assert content(path) == BYTES


@pytest.mark.parametrize("lent", [False, True])
async def test_who_vanishes_in_a_payload_leaves_nothing(tmp_path: Path, lent: bool) -> None:
    """Its memory is free at once, without help of the collector, and is not counted any more; also
    where the reply to a read before was lent, and never taken.
    """
    path = tmp_path / "image.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "32M")
    begun = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 32 * M) + bytes(20 * M)
    peaks: list[int] = []
    async with await open_image(path, read_only=False) as node:
        assert await node.pwrite_batch([(0, BYTES[: 64 * K])]) == [None]
        gc.collect()
        gc.disable()
        try:
            with peak_memory(peaks):
                for _ in range(6):
                    async with talking(node) as talk:
                        if lent:
                            await talk.client.send(talk.client.request(READ, 0, 64 * K))
                            await eventually(lambda: talk.stream.lent)
                        await talk.client.send(begun)
                        await eventually(lambda: talk.transmission._filled == len(begun) - 28)
                    await asyncio.sleep(3 * TAKEN_EVERY)
                    assert talk.transmission._memory.used == 0
        finally:
            gc.enable()
    assert peaks[0] < 2 * 32 * M


async def test_a_peer_that_vanishes_before_its_write_is_done(
    path: Path, engine: WatchedEngine
) -> None:
    """The session is not over while the system call is under way: its buffer is still read."""
    async with opened(path, engine) as node, talking(node) as talk:
        engine.held = {"_write_batch"}
        await talk.client.send(talk.client.request(WRITE, 0, payload=b"written"))
        await asyncio.sleep(0.02)
        talk.client.sock.close()
        await asyncio.sleep(0.02)
        assert not talk.running.done()
        engine.release()
        await talk.ends()
    assert content(path)[:7] == b"written"


@pytest.mark.parametrize("last_words", [b"", b"\1\2\3\4" + bytes(24)], ids=["none", "magic"])
async def test_a_peer_that_is_lost_while_a_write_is_under_way(
    path: Path, engine: WatchedEngine, last_words: bytes
) -> None:
    """Nothing can be sent any more, and still the session waits for the system call."""
    async with opened(path, engine) as node, talking(node) as talk:
        engine.held = {"_write_batch"}
        await talk.client.send(talk.client.request(WRITE, 0, payload=b"written"))
        await asyncio.sleep(0.02)
        talk.client.sock.send(talk.client.request(READ, 0, 512) + last_words)
        talk.client.sock.close()  # the reply to this read cannot be sent
        await asyncio.sleep(0.02)
        assert not talk.running.done()
        engine.release()
        with pytest.raises(ProtocolError) if last_words else nullcontext():
            await talk.ends()
    assert content(path)[:7] == b"written"


@every_mode
async def test_a_wrong_magic_ends_the_session(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    """What came before it is answered, what comes after it is not read."""
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        bad = b"\1\2\3\4" + bytes(40)
        await client.send(client.request(READ, 0, 512), bad, client.request(FLUSH))
        assert (await client.reply(1)).data(0, 512) == BYTES[:512]
        with pytest.raises(ProtocolError, match="magic 0x1020304"):
            await talk.ends()


async def test_a_payload_beyond_all_measure_ends_the_session(
    path: Path, engine: WatchedEngine
) -> None:
    async with opened(path, engine) as node, talking(node) as talk:
        head = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, (32 << 20) + 1)
        await talk.client.send(head)
        with pytest.raises(ProtocolError, match="more payload than 33554432"):
            await talk.ends()


@every_mode
async def test_stop_answers_what_is_under_way(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    async with opened(path, engine) as node, talking(node, mode) as talk:
        client = talk.client
        engine.held = {"_write_batch"}
        await client.send(client.request(WRITE, 0, payload=b"first", cookie=1))
        await asyncio.sleep(0.02)
        talk.transmission.stop()
        await client.send(
            client.request(READ, 0, 512, cookie=2),
            client.request(WRITE, 0, payload=b"second", cookie=3),
            client.request(FLUSH, cookie=4),
        )
        for cookie in (2, 3, 4):
            assert (await client.reply(cookie)).error == ESHUTDOWN
        assert not talk.running.done()
        engine.release()
        assert not (await client.reply(1)).error
        await talk.ends()
    assert content(path)[:6] == b"first" + BYTES[5:6]


async def test_stop_with_nothing_under_way(path: Path, engine: WatchedEngine) -> None:
    async with opened(path, engine) as node, talking(node) as talk:
        await talk.client.ask(READ, 0, 512)
        talk.transmission.stop()
        await talk.ends()


async def test_stop_in_the_middle_of_a_payload(path: Path, engine: WatchedEngine) -> None:
    async with opened(path, engine) as node, talking(node) as talk:
        client = talk.client
        engine.held = {"_sync"}
        write = client.request(WRITE, 0, payload=bytes(300_000), cookie=1)
        await client.send(client.request(FLUSH, cookie=2), write[:1000])
        await asyncio.sleep(0.02)
        talk.transmission.stop()
        await client.send(write[1000:])
        assert (await client.reply(1)).error == ESHUTDOWN
        engine.release()
        assert not (await client.reply(2)).error
        await talk.ends()
    assert content(path) == BYTES


# A file that becomes shorter ---------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("length", [4096, 100_000, 2 << 20], ids=["4k", "100k", "2m"])
async def test_a_truncated_file(path: Path, engine: WatchedEngine, mode: Mode, length: int) -> None:
    """EIO, and the connection lives on."""
    async with opened(path, engine) as node, talking(node, mode) as talk:
        os.truncate(path, 2 << 20)
        offset = (2 << 20) - 2048
        reply = await talk.client.ask(READ, offset, length, flags=0)
        assert reply.error == EIO
        assert (await talk.client.ask(READ, 0, 512)).data(0, 512) == BYTES[:512]


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED], ids=lambda mode: mode.value)
async def test_a_file_truncated_while_it_is_sent(
    path: Path, engine: WatchedEngine, mode: Mode
) -> None:
    """The chunk under way is filled with zeroes, then the reply ends with an error; R6."""
    async with opened(path, engine) as node, talking(node, mode) as talk:
        if not node.file.resident(0, SIZE):
            pytest.skip("cachestat needs Linux 6.5")
        client = talk.client
        await client.send(
            *(client.request(READ, 0, SIZE, cookie=n) for n in range(16)),
            client.request(READ, 0, 512, cookie=100),
        )
        await asyncio.sleep(0.02)  # most of it waits for us
        os.truncate(path, 1 << 20)
        await client.all_replies()
        last = client.replies[15]
        assert (last.error, last.message) == (EIO, "the file could not be read")
        assert last.data(0, SIZE) == BYTES[: 1 << 20] + bytes(SIZE - (1 << 20))
        assert client.replies[100].data(0, 512) == BYTES[:512]


async def test_a_file_truncated_in_a_simple_reply(path: Path, engine: WatchedEngine) -> None:
    """Nothing may follow the bytes that are missing: a client would take them for data; R7."""
    async with opened(path, engine) as node, talking(node) as talk:
        if not node.file.resident(0, SIZE):
            pytest.skip("cachestat needs Linux 6.5")
        client = talk.client
        engine.held = {"_sync"}
        await client.send(
            client.request(FLUSH, cookie=1),
            *(client.request(READ, 0, SIZE, cookie=2 + n) for n in range(4)),
        )
        await asyncio.sleep(0.02)
        os.truncate(path, 1 << 20)
        received = bytearray()
        loop = asyncio.get_running_loop()
        reads = 4 * (16 + SIZE)
        while len(received) < reads:
            try:
                received += await asyncio.wait_for(loop.sock_recv(client.sock, 1 << 20), 0.3)
            except TimeoutError:
                break
        engine.release()
        await talk.ends()
        while more := await loop.sock_recv(client.sock, 1 << 20):
            received += more
        assert 0 < len(received) < reads
        # The reply that is cut short is the last of all. (Pages that were lent to the socket lost
        # their bytes with the file.)
        rest = received[len(received) // (16 + SIZE) * (16 + SIZE) :]
        assert rest[16 : 16 + M] == BYTES[: min(M, len(rest) - 16)]
        assert b"\x67\x44\x66\x98" not in rest[4:]


# Filters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, BLOCK_STATUS, WRITE_ZEROES, CACHE, 77])
@pytest.mark.parametrize("length", [0, 4, 100, 200_000])
async def test_payloads_that_nothing_takes(
    path: Path, engine: WatchedEngine, command: int, length: int
) -> None:
    """Rows P5, P16 and P18: skipped, refused, and the next request is served."""
    async with opened(path, engine) as node:
        contexts = standard_contexts(depth=False, bitmaps=())
        async with talking(node, Mode.EXTENDED, contexts=contexts) as talk:
            client = talk.client
            reply = await client.ask(command, 0, 0, flags=PAYLOAD_LEN, payload=b"\xff" * length)
            assert reply.error == EINVAL
            assert (await client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]


async def test_df_asks_for_one_chunk(path: Path, engine: WatchedEngine) -> None:
    async with opened(path, engine) as node, talking(node, Mode.STRUCTURED) as talk:
        await node.write_zeroes(1 << 20, 1 << 20, may_unmap=True, fast=False)
        sparse = await talk.client.ask(READ, 0, SIZE)
        whole = await talk.client.ask(READ, 0, SIZE, flags=DF)
        expected = BYTES[: 1 << 20] + bytes(1 << 20) + BYTES[2 << 20 :]
        assert sparse.data(0, SIZE) == whole.data(0, SIZE) == expected
        assert len(whole.pieces) == 1


@pytest.mark.parametrize("taken", [False, True])
async def test_a_reply_that_nobody_takes_keeps_its_clusters(tmp_path: Path, taken: bool) -> None:
    """They are given back and wanted by many, and others get them only when the peer has its
    bytes.
    """
    path = tmp_path / "image.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    async with await open_image(path, read_only=False) as node:
        data = random.Random(7).randbytes(256 * K)
        assert await node.pwrite_batch([(0, data)]) == [None]
        async with talking(node, Mode.STRUCTURED) as talk:
            client = talk.client
            await client.send(client.request(READ, 0, 256 * K, cookie=1))
            await eventually(lambda: talk.stream.lent)
            assert node.pins is not None
            age = node.pins.end_age()
            if taken:
                assert (await client.reply(1)).data(0, 256 * K) == data
                await eventually(lambda: node.pins is not None and node.pins.gone(age))
            else:
                await node.discard(0, 256 * K)
                await node.flush()
                for number in range(1, 5):
                    assert await node.pwrite_batch([(number * M, bytes(256 * K))]) == [None]
                    await node.flush()
                assert not node.pins.gone(age)
                assert (await client.reply(1)).data(0, 256 * K) == data


async def test_who_leaves_before_he_takes_a_reply_keeps_its_clusters(tmp_path: Path) -> None:
    """DISC is behind the read: the session ends when the peer has its bytes, no sooner."""
    path = tmp_path / "image.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    async with await open_image(path, read_only=False) as node:
        data = random.Random(8).randbytes(256 * K)
        assert await node.pwrite_batch([(0, data)]) == [None]
        async with talking(node, Mode.STRUCTURED) as talk:
            client = talk.client
            await client.send(client.request(READ, 0, 256 * K, cookie=1), client.request(DISC))
            await eventually(lambda: not talk.stream.reading)
            assert node.pins is not None
            age = node.pins.end_age()
            await node.discard(0, 256 * K)
            for number in range(1, 5):
                await node.flush()
                assert await node.pwrite_batch([(number * M, bytes(256 * K))]) == [None]
            assert not node.pins.gone(age)
            assert (await client.reply(1)).data(0, 256 * K) == data
            await client.closed()
            await talk.ends()
