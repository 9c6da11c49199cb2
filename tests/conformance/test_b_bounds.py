"""B: ranges that leave the export, that are very long, and that are empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.asking import (
    chunked,
    each_mode,
    in_little_memory,
    is_refusal,
    refused,
    still_serves,
    succeeded,
    write_flags,
)
from tests.conformance.client import (
    MAX_PAYLOAD,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Info,
    Mode,
    Option,
    Peer,
    filter_payload,
)
from tests.conformance.local import held_node, serving
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import CHAIN_SIZE, ODD_SIZE, RAW_SCRATCH, RAW_SIZE, pattern

BASE = "base:allocation"
SCRATCH = RAW_SCRATCH[0] + (16 << 20)

BEYOND = [
    pytest.param(Cmd.READ, Errno.EINVAL, marks=row("B1")),
    pytest.param(Cmd.WRITE, Errno.ENOSPC, marks=row("B2")),
    pytest.param(Cmd.WRITE_ZEROES, Errno.ENOSPC, marks=row("B3")),
    pytest.param(Cmd.TRIM, Errno.EINVAL, marks=row("B4")),
    pytest.param(Cmd.CACHE, Errno.EINVAL, marks=row("B5")),
    pytest.param(Cmd.BLOCK_STATUS, Errno.EINVAL, marks=row("B6")),
]
beyond = pytest.mark.parametrize("command, error", BEYOND)


# What the header has place for.
HUGE_LENGTHS = [(mode, length) for mode in Mode for length in (MAX_PAYLOAD + 1, 2**32 - 1)]
HUGE_LENGTHS += [(Mode.EXTENDED, 1 << 63), (Mode.EXTENDED, 2**64 - 1)]
huge_lengths = pytest.mark.parametrize("mode, length", HUGE_LENGTHS)


def enter(server: RunningServer, mode: Mode, export: str = "") -> Peer:
    """With a metadata context where the mode can have one."""
    return server.enter(mode, export, () if mode is Mode.SIMPLE else (BASE,))


def payload_of(command: Cmd, length: int) -> bytes:
    return b"\xaa" * length if command == Cmd.WRITE else b""


@each_mode
@beyond
@pytest.mark.parametrize("past", [0, 1, 512, 1 << 40])
def test_beyond_the_end(
    server: RunningServer, mode: Mode, command: Cmd, error: Errno, past: int
) -> None:
    with enter(server, mode) as peer:
        payload = payload_of(command, 512)
        refused(peer, error, command, RAW_SIZE + past, 512, payload=payload)


@row("B7")
@each_mode
@beyond
def test_straddling_the_end(server: RunningServer, mode: Mode, command: Cmd, error: Errno) -> None:
    with enter(server, mode) as peer:
        payload = payload_of(command, 512)
        refused(peer, error, command, RAW_SIZE - 256, 512, payload=payload)
        assert peer.pread(RAW_SIZE - 256, 256) == pattern(RAW_SIZE - 256, 256)


@row("B8")
@each_mode
@beyond
@pytest.mark.parametrize(
    "offset, length",
    [
        (1 << 63, 512),
        (2**63 - 1, 1),
        (2**64 - 1, 1),
        (2**64 - 1, 512),
        (2**64 - 512, 512),
        (2**64 - 512, 1024),
    ],
)
def test_huge_offsets(
    server: RunningServer, mode: Mode, command: Cmd, error: Errno, offset: int, length: int
) -> None:
    with enter(server, mode) as peer:
        refused(peer, error, command, offset, length, payload=payload_of(command, length))


@row("B8")
@pytest.mark.parametrize(
    "command, error",
    [
        (Cmd.READ, Errno.EINVAL),
        (Cmd.TRIM, Errno.EINVAL),
        (Cmd.CACHE, Errno.EINVAL),
        (Cmd.WRITE_ZEROES, Errno.ENOSPC),
        (Cmd.BLOCK_STATUS, Errno.EINVAL),
    ],
)
@pytest.mark.parametrize("offset, length", [(1, 2**64 - 1), (512, 2**64 - 256), (1 << 63, 1 << 63)])
def test_the_sum_of_offset_and_length_wraps(
    server: RunningServer, command: Cmd, error: Errno, offset: int, length: int
) -> None:
    with enter(server, Mode.EXTENDED) as peer:
        refused(peer, error, command, offset, length)


@row("B9")
@each_mode
def test_last_byte_and_unaligned(server: RunningServer, mode: Mode) -> None:
    with enter(server, mode) as peer:
        assert peer.pread(RAW_SIZE - 1, 1) == pattern(RAW_SIZE - 1, 1)
        assert peer.pread(1, 3) == pattern(1, 3)
        succeeded(peer, Cmd.WRITE, SCRATCH + 1, payload=b"abc")
        assert peer.pread(SCRATCH, 5) == b"\0abc\0"
        succeeded(peer, Cmd.WRITE_ZEROES, SCRATCH + 1, 3)
        assert peer.pread(SCRATCH, 5) == bytes(5)
        still_serves(peer)


@row("B9")
@each_mode
def test_last_byte_of_an_odd_size(server: RunningServer, mode: Mode) -> None:
    with enter(server, mode, "odd") as peer:
        assert peer.pread(0, ODD_SIZE) == pattern(0, ODD_SIZE)
        last = ODD_SIZE - 1
        succeeded(peer, Cmd.WRITE, last, payload=b"!")
        assert peer.pread(last - 1, 2) == pattern(last - 1, 1) + b"!"
        succeeded(peer, Cmd.WRITE, last, payload=pattern(last, 1))
        refused(peer, Errno.ENOSPC, Cmd.WRITE, last, payload=b"!!")
        refused(peer, Errno.EINVAL, Cmd.READ, ODD_SIZE, 1)
        refused(peer, Errno.EINVAL, Cmd.READ, 0, 1024)
        assert peer.pread(last, 1) == pattern(last, 1)
        if mode is not Mode.SIMPLE:
            status = succeeded(peer, Cmd.BLOCK_STATUS, 0, ODD_SIZE).status
            assert sum(extent.length for extent in status[0]) == ODD_SIZE


@row("B10")
@each_mode
def test_one_byte_is_the_minimum(server: RunningServer, mode: Mode) -> None:
    """A client that asks for the constraints is told 1, and nothing is below that."""
    with server.connect() as peer:
        peer.greet()
        peer.headers(mode)
        info = peer.info(Option.GO, "", [Info.BLOCK_SIZE])
        assert info.infos[Info.BLOCK_SIZE][:6] == bytes.fromhex("0003 00000001")
        assert peer.pread(1, 1) == pattern(1, 1)
        succeeded(peer, Cmd.WRITE, SCRATCH + 17, payload=b"x")
        assert peer.pread(SCRATCH + 16, 3) == b"\0x\0"
        succeeded(peer, Cmd.WRITE_ZEROES, SCRATCH + 17, 1)
        assert peer.pread(SCRATCH + 16, 3) == bytes(3)
        still_serves(peer)


@row("B11")
@each_mode
@pytest.mark.parametrize("flags", [0, CmdFlag.FUA, CmdFlag.DF], ids=["plain", "FUA", "DF"])
@pytest.mark.parametrize("offset", [0, 1000, RAW_SIZE])
def test_empty_read(server: RunningServer, mode: Mode, flags: int, offset: int) -> None:
    with enter(server, mode) as peer:
        if mode is Mode.SIMPLE and flags == CmdFlag.DF:
            refused(peer, Errno.EINVAL, Cmd.READ, offset, 0, flags=flags)
            return
        reply = succeeded(peer, Cmd.READ, offset, 0, flags=flags)
        assert [chunk.type for chunk in reply.chunks] == [Chunk.NONE] * (mode is not Mode.SIMPLE)
        still_serves(peer)


@row("B12")
@each_mode
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE])
@pytest.mark.parametrize("flags", [0, CmdFlag.FUA], ids=["plain", "FUA"])
@pytest.mark.parametrize("offset", [0, 1000, RAW_SIZE])
def test_empty_requests_succeed(
    server: RunningServer, mode: Mode, command: Cmd, flags: int, offset: int
) -> None:
    with enter(server, mode) as peer:
        succeeded(peer, command, offset, 0, flags=flags)
        still_serves(peer)


@row("B13")
@chunked
@pytest.mark.parametrize("offset", [0, 1000, RAW_SIZE])
@pytest.mark.parametrize("flags", [0, CmdFlag.REQ_ONE], ids=["all", "REQ_ONE"])
def test_empty_block_status(server: RunningServer, mode: Mode, offset: int, flags: int) -> None:
    with enter(server, mode) as peer:
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, offset, 0, flags=flags)


@row("B14")
@each_mode
@pytest.mark.parametrize(
    "command",
    [Cmd.READ, Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.CACHE, Cmd.BLOCK_STATUS],
)
@pytest.mark.parametrize("offset", [RAW_SIZE + 1, 2**64 - 1])
def test_empty_request_past_the_end(
    server: RunningServer, mode: Mode, command: Cmd, offset: int
) -> None:
    with enter(server, mode) as peer:
        refused(peer, Errno.EINVAL, command, offset, 0, flags=write_flags_of(command, mode))


def write_flags_of(command: Cmd, mode: Mode) -> int:
    return write_flags(mode) if command == Cmd.WRITE else 0


@row("B15")
@each_mode
@pytest.mark.parametrize("flags", [0, CmdFlag.DF], ids=["plain", "DF"])
def test_read_longer_than_the_maximum_payload(
    server: RunningServer, mode: Mode, flags: int
) -> None:
    with enter(server, mode) as peer:
        refused(peer, Errno.EINVAL, Cmd.READ, 0, MAX_PAYLOAD + 1, flags=flags)


@row("B16")
@huge_lengths
def test_huge_read(server: RunningServer, mode: Mode, length: int) -> None:
    """Refused, and nothing of that size is allocated."""
    with enter(server, mode) as peer, in_little_memory(server):
        refused(peer, Errno.EINVAL, Cmd.READ, 0, length)


@row("B17")
@each_mode
def test_write_of_the_maximum_payload(server: RunningServer, mode: Mode) -> None:
    data = pattern(0, 1 << 20) * 32
    assert len(data) == MAX_PAYLOAD
    with enter(server, mode) as peer:
        succeeded(peer, Cmd.WRITE, SCRATCH, payload=data)
        assert peer.pread(SCRATCH, MAX_PAYLOAD) == data
        refused(peer, Errno.ENOSPC, Cmd.WRITE, RAW_SIZE - 4096, payload=data)
        assert peer.pread(RAW_SIZE - 4096, 4096) == pattern(RAW_SIZE - 4096, 4096)
        succeeded(peer, Cmd.TRIM, SCRATCH, MAX_PAYLOAD)
        succeeded(peer, Cmd.WRITE_ZEROES, SCRATCH, MAX_PAYLOAD)
        assert not any(peer.pread(SCRATCH, 4096))


@row("B18")
@huge_lengths
def test_write_longer_than_the_maximum_payload(
    server: RunningServer, mode: Mode, length: int
) -> None:
    """Disconnected at once, with no payload waited for and none allocated."""
    with enter(server, mode) as peer, in_little_memory(server):
        peer.request(Cmd.WRITE, SCRATCH, length, flags=write_flags(mode))
        peer.expect_disconnect()


@row("B19")
@each_mode
@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_trim_and_zero_more_than_a_payload(server: RunningServer, mode: Mode, command: Cmd) -> None:
    offset, length = SCRATCH + (64 << 20), 100 << 20
    with enter(server, mode) as peer:
        succeeded(peer, Cmd.WRITE, offset + length - 512, payload=b"\xaa" * 512)
        succeeded(peer, Cmd.WRITE, offset - 512, payload=b"\xbb" * 512)
        succeeded(peer, command, offset, length)
        if command == Cmd.WRITE_ZEROES:
            assert peer.pread(offset + length - 512, 512) == bytes(512)
        assert peer.pread(offset - 512, 512) == b"\xbb" * 512
        still_serves(peer)


@row("B19")
@pytest.mark.parametrize("command", [Cmd.TRIM, Cmd.WRITE_ZEROES])
def test_trim_and_zero_more_than_32_bits(tmp_path: Path, loop: str, command: Cmd) -> None:
    """5 GiB in one extended request: neither cut to 32 bits nor refused."""
    size = 6 << 30
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(size)
        file.write(pattern(0, 4096))
        file.seek(5 << 30)
        file.write(b"\xaa" * 8192)
    place = str(tmp_path / "socket")
    with serving(loop, place, {"": held_node(image, [])}), Peer(place) as peer:
        peer.negotiate(Mode.EXTENDED)
        succeeded(peer, command, 4096, 5 << 30)
        assert peer.pread((5 << 30) + 4096, 4096) == b"\xaa" * 4096
        if command == Cmd.WRITE_ZEROES:
            assert peer.pread(5 << 30, 4096) == bytes(4096)
        still_serves(peer)


@row("B20")
@each_mode
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 1 << 30, 2**32 - 1])
def test_cache_more_than_a_payload(server: RunningServer, mode: Mode, length: int) -> None:
    with enter(server, mode) as peer:
        succeeded(peer, Cmd.CACHE, 0, length)
        still_serves(peer)


@row("B20")
def test_cache_the_whole_export(server: RunningServer) -> None:
    with enter(server, Mode.EXTENDED) as peer:
        succeeded(peer, Cmd.CACHE, 0, RAW_SIZE)
        still_serves(peer)
    with enter(server, Mode.EXTENDED, "qcow2") as peer:
        succeeded(peer, Cmd.CACHE, 0, CHAIN_SIZE)


@row("B21")
@chunked
def test_status_of_nearly_32_bits(server: RunningServer, mode: Mode) -> None:
    """The longest compact request: its extents fit 32 bits each, and end where they should."""
    length = 2**32 - 1
    with enter(server, mode) as peer:
        (extents,) = succeeded(peer, Cmd.BLOCK_STATUS, 0, length).status.values()
        assert sum(extent.length for extent in extents) <= length
        assert all(0 < extent.length <= length for extent in extents)
        assert extents[0].flags == 0
        assert extents[0].length >= 1 << 20  # the data at the head of ``raw``
        still_serves(peer)


@row("B6")
@pytest.mark.parametrize("length", [RAW_SIZE + 1, 2**64 - 1])
def test_filtered_status_beyond_the_end(server: RunningServer, length: int) -> None:
    with enter(server, Mode.EXTENDED) as peer:
        refused(
            peer,
            Errno.EINVAL,
            Cmd.BLOCK_STATUS,
            0,
            payload=filter_payload(length, [0]),
            flags=CmdFlag.PAYLOAD_LEN,
        )


@each_mode
@beyond
def test_empty_export(server: RunningServer, mode: Mode, command: Cmd, error: Errno) -> None:
    """Every byte is beyond the end of it."""
    with enter(server, mode, "empty") as peer:
        payload = payload_of(command, 1)
        flags = write_flags_of(command, mode)
        reply = peer.ask(command, 0, 1, payload=payload, flags=flags)
        is_refusal(mode, reply, error, 0)
        succeeded(peer, Cmd.READ, 0, 0)
        succeeded(peer, Cmd.FLUSH)
