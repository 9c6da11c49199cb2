"""C: the framing of requests and replies, and which command takes which flag."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conformance.asking import (
    chunked,
    each_mode,
    refused,
    still_serves,
    succeeded,
    write_flags,
)
from tests.conformance.client import (
    COMPACT_REQUEST_MAGIC,
    DEADLINE,
    EXTENDED_REQUEST_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    Peer,
    filter_payload,
    request,
)
from tests.conformance.local import Held, holding
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import RAW_SCRATCH, RAW_SIZE, pattern

BASE = "base:allocation"
SCRATCH = RAW_SCRATCH[0]
SIZE = 1 << 20

# Where each flag is legal: a in all modes, c where replies have chunks, x with extended headers.
# BLOCK_STATUS needs a metadata context, and none can be had for simple replies.
FLAGS = [flag.name for flag in CmdFlag] + ["bit 6", "bit 7"]
LEGAL = {
    Cmd.READ: "a.c.....",
    Cmd.WRITE: "a....x..",
    Cmd.FLUSH: "a.......",
    Cmd.TRIM: "a.......",
    Cmd.CACHE: "a.......",
    Cmd.WRITE_ZEROES: "aa..a...",
    Cmd.BLOCK_STATUS: "c..c.x..",
}
MODES = {"a": set(Mode), "c": {Mode.STRUCTURED, Mode.EXTENDED}, "x": {Mode.EXTENDED}, ".": set()}
CELLS = list(itertools.product(LEGAL, range(8), Mode))
assert len(CELLS) == 168


@pytest.fixture
def held(tmp_path: Path, loop: str) -> Iterator[Held]:
    with holding(loop, tmp_path, SIZE) as held:
        yield held


@pytest.mark.parametrize(
    "command, bit, mode",
    CELLS,
    ids=[f"{command.name}-{FLAGS[bit]}-{mode.value}" for command, bit, mode in CELLS],
)
def test_flag_of_command(server: RunningServer, command: Cmd, bit: int, mode: Mode) -> None:
    flag = 1 << bit
    offset = SCRATCH if command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES) else 0
    length = 0 if command == Cmd.FLUSH else 4096
    payload = b""
    if command == Cmd.WRITE:
        payload = bytes(length)
    elif flag == CmdFlag.PAYLOAD_LEN and mode is Mode.EXTENDED:
        length = 12
        payload = filter_payload(4096, [0]) if command == Cmd.BLOCK_STATUS else bytes(length)
    contexts = () if mode is Mode.SIMPLE else (BASE,)
    with server.enter(mode, contexts=contexts) as peer:
        if mode in MODES[LEGAL[command][bit]]:
            succeeded(peer, command, offset, length, flags=flag, payload=payload)
            still_serves(peer)
        else:
            refused(peer, Errno.EINVAL, command, offset, length, flags=flag, payload=payload)


@row("C1")
@each_mode
@pytest.mark.parametrize("magic", [0, 0x25609514, 0x67446698, 0xFFFFFFFF], ids=hex)
def test_wrong_magic(server: RunningServer, mode: Mode, magic: int) -> None:
    with server.enter(mode) as peer:
        peer.send(request(mode, Cmd.READ, 0, 512, magic=magic))
        peer.expect_disconnect()


@row("C2")
@each_mode
def test_magic_of_the_other_header(server: RunningServer, mode: Mode) -> None:
    other = COMPACT_REQUEST_MAGIC if mode is Mode.EXTENDED else EXTENDED_REQUEST_MAGIC
    with server.enter(mode) as peer:
        peer.send(request(mode, Cmd.READ, 0, 512, magic=other))
        peer.expect_disconnect()


@row("C3")
@each_mode
@pytest.mark.parametrize("command", [8, 99, 0xFFFF])
@pytest.mark.parametrize("flags", [0, CmdFlag.FUA], ids=["plain", "FUA"])
def test_unknown_command(server: RunningServer, mode: Mode, command: int, flags: int) -> None:
    with server.enter(mode) as peer:
        refused(peer, Errno.EINVAL, command, 0, 512, flags=flags)


@row("C4")
@each_mode
def test_disc(server: RunningServer, mode: Mode) -> None:
    """Everything before it is answered, nothing after it."""
    read = request(mode, Cmd.READ, 0, 1 << 20)
    with server.enter(mode) as peer:
        peer.send(read * 8 + request(mode, Cmd.DISC) + read)
        for _ in range(8):
            assert peer.reply(0, 1 << 20).data == pattern(0, 1 << 20)
        peer.expect_disconnect()


@row("C4", "C13")
@each_mode
@pytest.mark.parametrize("how", ["DISC", "half-close"])
def test_the_disk_is_waited_for(held: Held, mode: Mode, how: str) -> None:
    with held.enter(mode) as peer:
        held.file.released.clear()
        cookies = {peer.request(Cmd.FLUSH) for _ in range(4)}
        if how == "DISC":
            peer.request(Cmd.DISC)
        else:
            peer.finish()
        peer.expect_silence()
        held.file.released.set()
        assert {peer.reply().cookie for _ in range(4)} == cookies
        peer.expect_disconnect()
    with held.enter(mode) as peer:
        still_serves(peer)


@row("C5")
@each_mode
@pytest.mark.parametrize("flags", [1 << bit for bit in range(16)] + [0xFFFF], ids=hex)
def test_disc_with_garbage(server: RunningServer, mode: Mode, flags: int) -> None:
    with server.enter(mode) as peer:
        peer.send(request(mode, Cmd.DISC, 2**64 - 1, 2**32 - 1, flags=flags))
        peer.expect_disconnect()


@row("C6")
@each_mode
@pytest.mark.parametrize("offset, length", [(512, 0), (0, 512), (RAW_SIZE, 1), (2**64 - 1, 1)])
def test_flush_with_reserved_fields(
    server: RunningServer, mode: Mode, offset: int, length: int
) -> None:
    with server.enter(mode) as peer:
        refused(peer, Errno.EINVAL, Cmd.FLUSH, offset, length)


@row("C7")
@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.CACHE, Cmd.WRITE_ZEROES, Cmd.WRITE])
def test_structured_errors_for_every_command(server: RunningServer, command: Cmd) -> None:
    with server.enter(Mode.STRUCTURED) as peer:
        payload = bytes(512) if command == Cmd.WRITE else b""
        reply = peer.ask(command, RAW_SIZE, 512, payload=payload)
        assert [chunk.type for chunk in reply.chunks] == [Chunk.ERROR]
        still_serves(peer)


@row("C8")
def test_structured_success_without_data(server: RunningServer) -> None:
    with server.enter(Mode.STRUCTURED) as peer:
        for command, offset, length in [
            (Cmd.FLUSH, 0, 0),
            (Cmd.CACHE, 0, 512),
            (Cmd.TRIM, SCRATCH, 4096),
            (Cmd.WRITE_ZEROES, SCRATCH, 4096),
        ]:
            peer.send(request(Mode.STRUCTURED, command, offset, length, cookie=7))
            assert peer.read(20) == bytes.fromhex("668e33ef 0001 0000 0000000000000007 00000000")
        peer.send(request(Mode.STRUCTURED, Cmd.WRITE, SCRATCH, 5, cookie=8, payload=b"hello"))
        assert peer.read(20) == bytes.fromhex("668e33ef 0001 0000 0000000000000008 00000000")
        still_serves(peer)


@row("C9")
def test_extended_replies_are_never_simple(server: RunningServer) -> None:
    with server.enter(Mode.EXTENDED, contexts=(BASE,)) as peer:
        for command in (*Cmd, 8):
            if command == Cmd.DISC:
                continue
            for offset in (0, SCRATCH, RAW_SIZE):
                peer.send(request(Mode.EXTENDED, command, offset, 0, cookie=offset))
                chunk = peer.read_chunk()  # which asserts the magic
                assert (chunk.cookie, chunk.offset, chunk.done) == (offset, offset, True)
        peer.send(request(Mode.EXTENDED, Cmd.FLUSH, cookie=7))
        assert peer.read(32) == bytes.fromhex(
            "6e8a278c 0001 0000 0000000000000007 0000000000000000 0000000000000000"
        )
        still_serves(peer)


@row("C10")
@chunked
@pytest.mark.parametrize("flags", [CmdFlag.REQ_ONE, CmdFlag.NO_HOLE, 0x40, 0x8000], ids=str)
def test_refused_read_is_never_simple(server: RunningServer, mode: Mode, flags: int) -> None:
    with server.enter(mode) as peer:
        refused(peer, Errno.EINVAL, Cmd.READ, 0, 512, flags=flags)
        refused(peer, Errno.EINVAL, Cmd.READ, RAW_SIZE, 512, flags=flags)


@row("C11")
@each_mode
@pytest.mark.parametrize("cookie", [0, 1, 1 << 31, 1 << 63, 2**64 - 1], ids=hex)
def test_cookie_comes_back(server: RunningServer, mode: Mode, cookie: int) -> None:
    with server.enter(mode) as peer:
        assert peer.ask(Cmd.READ, 0, 512, cookie=cookie).data == pattern(0, 512)
        assert peer.ask(Cmd.READ, 0, 1 << 20, cookie=cookie).data == pattern(0, 1 << 20)
        assert peer.ask(Cmd.READ, RAW_SIZE, 1, cookie=cookie).error == Errno.EINVAL
        assert peer.ask(Cmd.FLUSH, cookie=cookie).error == 0
        assert peer.ask(99, cookie=cookie).error == Errno.EINVAL
        still_serves(peer)


@row("C12")
@each_mode
def test_requests_in_flight(server: RunningServer, mode: Mode) -> None:
    """Every request is answered once, whatever the order, and chunks do not tear each other."""
    reads = {1000 + n: (n * 4096, 4096 << n % 8) for n in range(64)}
    with server.enter(mode) as peer:
        for cookie, (offset, length) in reads.items():
            peer.request(Cmd.READ, offset, length, cookie=cookie)
            peer.request(Cmd.FLUSH, cookie=cookie + 1000)
        missing = reads.keys() | {cookie + 1000 for cookie in reads}
        if mode is not Mode.SIMPLE:
            contents: dict[int, bytearray] = {c: bytearray(n) for c, (_, n) in reads.items()}
            while missing:
                chunk = peer.read_chunk()
                assert chunk.cookie in missing
                if chunk.type == Chunk.OFFSET_DATA:
                    at = int.from_bytes(chunk.payload[:8]) - reads[chunk.cookie][0]
                    contents[chunk.cookie][at : at + len(chunk.payload) - 8] = chunk.payload[8:]
                if chunk.done:
                    missing.remove(chunk.cookie)
            for cookie, (offset, length) in reads.items():
                assert contents[cookie] == pattern(offset, length)
        while missing:
            magic_error_cookie = peer.read(16)
            assert magic_error_cookie[:8] == bytes.fromhex("67446698 00000000")
            cookie = int.from_bytes(magic_error_cookie[8:])
            missing.remove(cookie)
            if cookie in reads:
                assert peer.read(reads[cookie][1]) == pattern(*reads[cookie])
        still_serves(peer)


@row("C12")
@each_mode
def test_a_reply_overtakes_a_slow_one(held: Held, mode: Mode) -> None:
    with held.enter(mode) as peer:
        held.file.released.clear()
        slow = peer.request(Cmd.FLUSH)
        assert peer.pread(4096, 512) == pattern(4096, 512)
        held.file.released.set()
        assert peer.reply().cookie == slow
        still_serves(peer)


@row("C12")
def test_requests_past_the_budget_wait(held: Held) -> None:
    """A client that floods is not read any further, and is served in the end."""
    flushes = b"".join(request(Mode.STRUCTURED, Cmd.FLUSH, cookie=n) for n in range(200_000))
    with held.enter(Mode.STRUCTURED) as peer:
        held.file.released.clear()
        taken = _send_until_nobody_reads(peer, flushes)
        assert taken < len(flushes)
        held.file.released.set()
        count = -(-taken // 28)
        peer.send(flushes[taken : count * 28])
        for _ in range(count):
            assert peer.reply().error == 0
        still_serves(peer)


def _send_until_nobody_reads(peer: Peer, data: bytes) -> int:
    peer.sock.settimeout(0.2)
    sent = 0
    with suppress(TimeoutError):
        while sent < len(data):
            sent += peer.sock.send(data[sent:])
    peer.sock.settimeout(DEADLINE)
    return sent


@row("C13")
@each_mode
def test_half_closed(server: RunningServer, mode: Mode) -> None:
    """A client that will send no more gets every reply to what it has sent."""
    with server.enter(mode) as peer:
        for _ in range(16):
            peer.request(Cmd.READ, 0, 1 << 20)
        peer.request(Cmd.FLUSH)
        peer.finish()
        answered = 0
        if mode is Mode.SIMPLE:
            expected = 16 * ((1 << 20) + 16) + 16
            assert len(peer.read_to_end()) == expected
        else:
            while answered < 17:
                answered += peer.read_chunk().done
            peer.expect_disconnect()


@row("C13")
def test_half_closed_in_the_middle_of_a_request(server: RunningServer) -> None:
    with server.enter(Mode.STRUCTURED) as peer:
        peer.send(request(peer.mode, Cmd.FLUSH, cookie=5))
        peer.send(request(peer.mode, Cmd.FLUSH)[:20])
        peer.finish()
        assert peer.reply().cookie == 5
        peer.expect_disconnect()


@row("C14")
@each_mode
@pytest.mark.parametrize("taken", [0, 10, 100_000])
def test_client_vanishes_in_the_middle_of_a_reply(
    server: RunningServer, mode: Mode, taken: int
) -> None:
    with server.enter(mode) as bystander:
        with server.enter(mode) as peer:
            for _ in range(16):
                peer.request(Cmd.READ, 0, 1 << 20)
            peer.read(taken)
        still_serves(bystander)


@row("C14")
@each_mode
def test_client_vanishes_while_the_disk_is_slow(held: Held, mode: Mode) -> None:
    """What it asked for is done, and nobody misses the reply."""
    with held.enter(mode) as bystander:
        with held.enter(mode) as peer:
            held.file.released.clear()
            peer.request(Cmd.WRITE, 8192, flags=write_flags(mode), payload=b"\xaa" * 4096)
            assert held.file.entered.acquire(timeout=DEADLINE)
            peer.request(Cmd.FLUSH)
            peer.wait_taken()
        held.file.released.set()
        still_serves(bystander)
        assert held.file.written.acquire(timeout=DEADLINE)
        assert bystander.ask(Cmd.FLUSH).error == 0
        assert bystander.pread(8192, 4096) == b"\xaa" * 4096


@row("C14")
@each_mode
@pytest.mark.parametrize("length", [4096, 1 << 20])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_client_vanishes_in_the_middle_of_a_payload(
    server: RunningServer, mode: Mode, length: int, part: float
) -> None:
    """What did not come whole is not written."""
    offset = SCRATCH + (8 << 20)
    sent = min(int(length * part), length - 1)
    with server.enter(mode) as bystander:
        with server.enter(mode) as peer:
            peer.send(
                request(mode, Cmd.WRITE, offset, length, flags=write_flags(mode)) + b"\xaa" * sent
            )
            peer.wait_taken()
        still_serves(bystander)
        assert bystander.pread(offset, length) == bytes(length)


@row("C7")
@row("C11")
@each_mode
def test_the_bytes_of_a_refusal(server: RunningServer, mode: Mode) -> None:
    """The header of an error, to the byte; its text is free."""
    cookie = 0x0123456789ABCDEF
    offset = RAW_SIZE
    with server.enter(mode) as peer:
        peer.send(request(mode, Cmd.READ, offset, 1, cookie=cookie))
        if mode is Mode.SIMPLE:
            assert peer.read(16) == bytes.fromhex("67446698 00000016 0123456789abcdef")
        elif mode is Mode.STRUCTURED:
            assert peer.read(16) == bytes.fromhex("668e33ef 0001 8001 0123456789abcdef")
            _is_einval(peer.read(int.from_bytes(peer.read(4))))
        else:
            assert peer.read(24) == bytes.fromhex(
                "6e8a278c 0001 8001 0123456789abcdef 0000000140000000"
            )
            _is_einval(peer.read(int.from_bytes(peer.read(8))))
        still_serves(peer)


def _is_einval(payload: bytes) -> None:
    assert payload[:4] == bytes.fromhex("00000016")
    assert int.from_bytes(payload[4:6]) == len(payload) - 6
    assert b"\0" not in payload[6:]
