"""W: who may write, when it is on stable storage, how zeroes are made, and what an error is called.

What a disk does is looked at from the inside: `HeldFile` is a real file that notes what is done to
it, and fails when it is told to.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.asking import (
    each_mode,
    is_refusal,
    refused,
    still_serves,
    succeeded,
    write_flags,
)
from tests.conformance.client import Cmd, CmdFlag, Errno, Flag, Mode, Option, Peer
from tests.conformance.local import Held, content, holding
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import (
    BROKEN_ENTRY,
    BROKEN_NOT,
    BROKEN_STREAM,
    CLUSTER,
    RAW_SCRATCH,
    RO_SIZE,
    pattern,
)

BASE = "base:allocation"
SCRATCH = RAW_SCRATCH[0] + (256 << 20)
SIZE = 4 << 20
CONTENT = content(SIZE)


@pytest.fixture
def held(tmp_path: Path, loop: str) -> Iterator[Held]:
    with holding(loop, tmp_path, SIZE) as held:
        yield held


# Permission -----------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(Cmd.WRITE, marks=row("W1")),
        pytest.param(Cmd.TRIM, marks=row("W2")),
        pytest.param(Cmd.WRITE_ZEROES, marks=row("W3")),
    ],
)
@pytest.mark.parametrize("export", ["ro", "qcow2"])
def test_read_only_export(server: RunningServer, mode: Mode, command: Cmd, export: str) -> None:
    payload = b"\xaa" * 512 if command == Cmd.WRITE else b""
    with server.enter(mode, export) as peer:
        before = peer.pread(0, 512)
        reply = peer.ask(command, 0, 512, payload=payload, flags=flags_of(command, mode))
        is_refusal(mode, reply, Errno.EPERM, 0)
        assert peer.pread(0, 512) == before


@row("W4")
@each_mode
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES])
@pytest.mark.parametrize("offset", [RO_SIZE - 256, RO_SIZE, 2**64 - 1])
def test_read_only_comes_before_the_bounds(
    server: RunningServer, mode: Mode, command: Cmd, offset: int
) -> None:
    payload = b"\xaa" * 512 if command == Cmd.WRITE else b""
    with server.enter(mode, "ro") as peer:
        refused(peer, Errno.EPERM, command, offset, 512, payload=payload)


@row("W5")
@each_mode
def test_flush_and_cache_on_a_read_only_export(server: RunningServer, mode: Mode) -> None:
    with server.enter(mode, "ro") as peer:
        succeeded(peer, Cmd.FLUSH)
        succeeded(peer, Cmd.FLUSH, flags=CmdFlag.FUA)
        succeeded(peer, Cmd.CACHE, 0, RO_SIZE)
        still_serves(peer)


def flags_of(command: Cmd, mode: Mode) -> int:
    return write_flags(mode) if command == Cmd.WRITE else 0


# Durability -----------------------------------------------------------------------------------


@row("W6")
@each_mode
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM])
def test_fua(held: Held, mode: Mode, command: Cmd) -> None:
    """It is on stable storage before it is acknowledged; without FUA nobody waits for that."""
    payload = b"\xaa" * 4096 if command == Cmd.WRITE else b""
    with held.enter(mode) as peer:
        succeeded(peer, command, 8192, 4096, payload=payload)
        assert "sync" not in held.file.events
        succeeded(peer, command, 8192, 4096, payload=payload, flags=CmdFlag.FUA)
        assert held.file.events[-1] == "sync"
        still_serves(peer)


@row("W6")
@each_mode
def test_fua_is_not_acknowledged_before_the_disk(held: Held, mode: Mode) -> None:
    with held.enter(mode) as peer:
        held.file.released.clear()
        flags = CmdFlag.FUA | write_flags(mode)
        cookie = peer.request(Cmd.WRITE, 8192, flags=flags, payload=b"\xaa" * 4096)
        peer.expect_silence()
        held.file.released.set()
        reply = peer.reply()
        assert (reply.cookie, reply.error) == (cookie, 0)
        assert held.file.events == ["write", "sync"]
        still_serves(peer)


@row("W7")
@each_mode
def test_flush(held: Held, mode: Mode) -> None:
    """What one connection has written another one flushes, as CAN_MULTI_CONN promises."""
    with held.enter(mode) as writer, held.enter(mode) as other:
        succeeded(writer, Cmd.WRITE, 8192, payload=b"\xaa" * 4096)
        assert held.file.events == ["write"]
        succeeded(other, Cmd.FLUSH)
        assert held.file.events == ["write", "sync"]
        assert other.pread(8192, 4096) == b"\xaa" * 4096
        still_serves(writer)
        still_serves(other)
    with Peer(held.local.socket) as peer:
        peer.greet()
        assert peer.info(Option.INFO).flags & Flag.CAN_MULTI_CONN


@row("W7")
def test_failed_flush(held: Held) -> None:
    """After a failed flush nothing can promise durability any more."""
    with held.enter(Mode.STRUCTURED) as peer:
        held.file.sync_failed = True
        refused(peer, Errno.EIO, Cmd.FLUSH)
        refused(peer, Errno.EIO, Cmd.WRITE, 8192, payload=b"\xaa" * 4096)
        refused(peer, Errno.EIO, Cmd.WRITE_ZEROES, 8192, 4096)
        refused(peer, Errno.EIO, Cmd.FLUSH)


# Zeroes ---------------------------------------------------------------------------------------


@row("W8")
@each_mode
@pytest.mark.parametrize("flags", [0, CmdFlag.NO_HOLE], ids=["may unmap", "NO_HOLE"])
@pytest.mark.parametrize("can_allocate", [True, False], ids=["fallocate", "written"])
def test_write_zeroes(held: Held, mode: Mode, flags: int, can_allocate: bool) -> None:
    held.file.can_allocate = can_allocate
    offset, length = (1 << 20) + 100, (1 << 20) + 1000
    with held.enter(mode) as peer:
        blocks = held.path.stat().st_blocks
        succeeded(peer, Cmd.WRITE_ZEROES, offset, length, flags=flags)
        expected = bytearray(CONTENT)
        expected[offset : offset + length] = bytes(length)
        assert peer.pread(0, SIZE) == expected
        if flags == CmdFlag.NO_HOLE:
            assert held.path.stat().st_blocks >= blocks
        still_serves(peer)


@row("W8")
def test_zeroes_become_a_hole(server: RunningServer) -> None:
    """On a file system that has holes, base:allocation tells of them."""
    offset, length = SCRATCH, 1 << 20
    with server.enter(Mode.STRUCTURED, contexts=(BASE,)) as peer:
        succeeded(peer, Cmd.WRITE, offset, payload=b"\xaa" * length)
        (data,) = succeeded(peer, Cmd.BLOCK_STATUS, offset, length).status[0]
        assert data == (length, 0)
        succeeded(peer, Cmd.WRITE_ZEROES, offset, length)
        (hole,) = succeeded(peer, Cmd.BLOCK_STATUS, offset, length).status[0]
        assert hole == (length, 3)
        assert peer.pread(offset, length) == bytes(length)


@row("W9")
@each_mode
@pytest.mark.parametrize("flags", [0, CmdFlag.NO_HOLE, CmdFlag.FUA], ids=str)
def test_fast_zero(held: Held, mode: Mode, flags: int) -> None:
    """Where zeroes would have to be written it is ENOTSUP, and nothing was touched."""
    flags |= CmdFlag.FAST_ZERO
    with held.enter(mode) as peer:
        held.file.can_allocate = False
        refused(peer, Errno.ENOTSUP, Cmd.WRITE_ZEROES, 4096, 4096, flags=flags)
        assert peer.pread(0, SIZE) == CONTENT
        held.file.can_allocate = True
        succeeded(peer, Cmd.WRITE_ZEROES, 4096, 4096, flags=flags)
        assert peer.pread(4096, 4096) == bytes(4096)
        still_serves(peer)


# Errors ---------------------------------------------------------------------------------------

ERRORS = {
    errno.EPERM: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.EIO: Errno.EIO,
    errno.ENOMEM: Errno.ENOMEM,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
    errno.ESHUTDOWN: Errno.ESHUTDOWN,
    errno.EINVAL: Errno.EINVAL,
    errno.ENXIO: Errno.EINVAL,
    errno.EBADF: Errno.EINVAL,
    errno.EOVERFLOW: Errno.EINVAL,  # its place is beside DF and requests that are too long
}
each_errno = pytest.mark.parametrize(
    "number, error", ERRORS.items(), ids=[errno.errorcode[number] for number in ERRORS]
)


@row("W11")
@each_mode
@each_errno
def test_errno_of_a_write(held: Held, mode: Mode, number: int, error: Errno) -> None:
    held.file.failure = OSError(number, os.strerror(number))
    with held.enter(mode) as peer:
        refused(peer, error, Cmd.WRITE, 8192, payload=b"\xaa" * 4096)
        refused(peer, error, Cmd.WRITE_ZEROES, 8192, 4096)
        refused(peer, error, Cmd.TRIM, 8192, 4096)
        held.file.failure = None
        succeeded(peer, Cmd.WRITE, 8192, payload=b"\xaa" * 4096)
        assert peer.pread(8192, 4096) == b"\xaa" * 4096


@row("W10")
@each_mode
def test_enotsup_is_for_fast_zero_only(held: Held, mode: Mode) -> None:
    """A disk may say what it likes."""
    held.file.failure = OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    with held.enter(mode) as peer:
        refused(peer, Errno.EINVAL, Cmd.WRITE, 8192, payload=b"\xaa" * 4096)
        refused(peer, Errno.EINVAL, Cmd.WRITE_ZEROES, 8192, 4096)
        refused(peer, Errno.EINVAL, Cmd.TRIM, 8192, 4096)
        refused(peer, Errno.ENOTSUP, Cmd.WRITE_ZEROES, 8192, 4096, flags=CmdFlag.FAST_ZERO)


@row("W12")
@each_mode
@pytest.mark.parametrize("damaged", [BROKEN_STREAM, BROKEN_ENTRY], ids=["stream", "entry"])
@pytest.mark.parametrize("flags", [0, CmdFlag.DF], ids=["plain", "DF"])
@pytest.mark.parametrize("length", [512, CLUSTER])
def test_io_error(server: RunningServer, mode: Mode, damaged: int, flags: int, length: int) -> None:
    if mode is Mode.SIMPLE:
        flags = 0
    with server.enter(mode, "broken") as peer:
        for _ in range(2):
            cookie = peer.request(Cmd.READ, damaged, length, flags=flags)
            reply = peer.reply()
            assert (reply.cookie, reply.error) == (cookie, Errno.EIO)
            assert peer.pread(BROKEN_NOT, CLUSTER) == pattern(BROKEN_NOT, CLUSTER)


# TRIM -----------------------------------------------------------------------------------------


@row("W13")
@each_mode
def test_trim(held: Held, mode: Mode) -> None:
    """The range is given back; what is around it stays."""
    offset, length = 1 << 20, 1 << 20
    with held.enter(mode) as peer:
        succeeded(peer, Cmd.TRIM, offset, length)
        assert peer.pread(0, offset) == CONTENT[:offset]
        assert peer.pread(offset + length, 4096) == CONTENT[offset + length :][:4096]
        assert peer.pread(offset, length) in (bytes(length), CONTENT[offset:][:length])
        succeeded(peer, Cmd.WRITE, offset, payload=b"\xaa" * 4096)
        assert peer.pread(offset, 4096) == b"\xaa" * 4096
        still_serves(peer)


@row("W13")
@each_mode
def test_trim_is_only_a_hint(held: Held, mode: Mode) -> None:
    """A file system that cannot punch holes is no error."""
    held.file.can_allocate = False
    with held.enter(mode) as peer:
        succeeded(peer, Cmd.TRIM, 1 << 20, 1 << 20)
        assert peer.pread(0, SIZE) == CONTENT


@row("W14")
@each_mode
@pytest.mark.parametrize("offset, length", [(4097, 1), (100, 512), (1000, 70_000), (8191, 4098)])
def test_unaligned_trim(held: Held, mode: Mode, offset: int, length: int) -> None:
    """Not a byte outside the range is touched."""
    with held.enter(mode) as peer:
        succeeded(peer, Cmd.TRIM, offset, length)
        assert peer.pread(0, offset) == CONTENT[:offset]
        end = offset + length
        assert peer.pread(end, SIZE - end) == CONTENT[end:]
