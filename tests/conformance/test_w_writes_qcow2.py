"""W on qcow2: what is different where guest bytes have a place of their own for each cluster.

The images read as `content` from end to end; they differ in where that is. `qemu-img check` looks
at each after its test.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.qcow2.builder import Bitmap, Compressed, Data, Image, InternalSnapshot, poke
from pynbd.block.qcow2.format import COPIED, BitmapFlags, Incompatible
from pynbd.server.server import GRACE
from tests.conformance.asking import each_mode, refused, succeeded
from tests.conformance.client import Cmd, CmdFlag, Errno, Mode, Peer
from tests.conformance.local import Held, content, held_image, holding_open
from tests.conformance.rows import row

K = 1 << 10
CLUSTER = 64 * K
SIZE = 2 << 20
CONTENT = content(SIZE)
ALLOCATED = 16 * CLUSTER
"""In the overlays what lies below this is in the top layer; the rest is in the raw base."""
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
HOLE_ZERO = 3


def clusters(end: int) -> dict[int, Data | Compressed]:
    return {at: Data(CONTENT[at : at + CLUSTER]) for at in range(0, end, CLUSTER)}


def build(kind: str, folder: Path) -> Path:
    path = folder / "disk.qcow2"
    if kind == "flat":
        Image(size=SIZE, clusters=clusters(SIZE)).write(path)
    elif kind == "shared":  # by an internal snapshot
        shared = clusters(SIZE)
        Image(size=SIZE, clusters=shared, snapshots=[InternalSnapshot("s", shared)]).write(path)
    elif kind == "compressed":
        packed = {at: Compressed(CONTENT[at : at + CLUSTER]) for at in range(0, SIZE, CLUSTER)}
        Image(size=SIZE, clusters=packed).write(path)
    else:
        (folder / "base.raw").write_bytes(CONTENT)
        Image(
            size=SIZE,
            clusters=clusters(ALLOCATED) if kind != "extended" else {},
            version=2 if kind == "version 2" else 3,
            extended_l2=kind == "extended",
            backing_file="base.raw",
            backing_format="raw",
        ).write(path)
    return path


KINDS = ["flat", "shared", "compressed", "overlay", "version 2", "extended"]
each_kind = pytest.mark.parametrize("kind", KINDS)
Hold = Callable[[str], Held]


@pytest.fixture
def hold(tmp_path: Path, loop: str) -> Iterator[Hold]:
    """``hold(kind)``: a server on such an image, until the end of the test."""
    peers.require("qemu-img")
    with ExitStack() as stack:

        def start(kind: str) -> Held:
            return stack.enter_context(holding_open(loop, build(kind, tmp_path), held_image))

        yield start
    peers.run("qemu-img", "check", tmp_path / "disk.qcow2")


def matches(peer: Peer, *changes: tuple[int, bytes]) -> None:
    """The disk reads as `CONTENT`, but for ``changes``."""
    expected = bytearray(CONTENT)
    for offset, data in changes:
        expected[offset : offset + len(data)] = data
    assert peer.pread(0, SIZE) == expected


def status(peer: Peer, offset: int, length: int) -> list[list[tuple[int, int]]]:
    """What the contexts say, in the order of their ids."""
    found = succeeded(peer, Cmd.BLOCK_STATUS, offset, length).status
    return [[tuple(extent) for extent in found[number]] for number in sorted(found)]


# Writes and stable storage --------------------------------------------------------------------

PIECES = [(100, 3), (CLUSTER - 5, 10), (20 * CLUSTER, CLUSTER), (30 * CLUSTER + 7, 70 * K)]


@row("B9")
@each_kind
@each_mode
def test_written_anywhere(hold: Hold, kind: str, mode: Mode) -> None:
    """Not a byte beside the ranges changes, wherever the cluster was."""
    with hold(kind).enter(mode) as peer:
        changes = [(offset, os.urandom(length)) for offset, length in PIECES]
        for offset, data in changes:
            succeeded(peer, Cmd.WRITE, offset, payload=data)
        matches(peer, *changes)
        succeeded(peer, Cmd.FLUSH)
        matches(peer, *changes)


@row("B2", "B3", "B4", "B7")
@pytest.mark.parametrize("offset", [SIZE - 256, SIZE, 2**63, 2**64 - 512])
def test_past_the_end(hold: Hold, offset: int) -> None:
    with hold("overlay").enter(Mode.EXTENDED) as peer:
        refused(peer, Errno.ENOSPC, Cmd.WRITE, offset, 512, payload=b"\xaa" * 512)
        refused(peer, Errno.ENOSPC, Cmd.WRITE_ZEROES, offset, 512)
        refused(peer, Errno.EINVAL, Cmd.TRIM, offset, 512)
        matches(peer)


@row("W6")
@each_kind
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM])
def test_fua(hold: Hold, kind: str, command: Cmd) -> None:
    """What leads to the data is on stable storage too: the last thing that is done is a sync, and a
    copy of the file has it all.
    """
    payload = b"\xaa" * CLUSTER if command == Cmd.WRITE else b""
    held = hold(kind)
    at = 20 * CLUSTER
    with held.enter(Mode.EXTENDED) as peer:
        succeeded(peer, command, at, CLUSTER, payload=payload, flags=CmdFlag.FUA)
        assert held.file.events[-1] == "sync"
        now = peer.pread(at, CLUSTER)
        assert stored(held.path, at) == now
    if command == Cmd.WRITE:
        assert now == payload
    elif command == Cmd.WRITE_ZEROES:
        assert now == bytes(CLUSTER)


@row("W7")
@each_kind
def test_flush(hold: Hold, kind: str) -> None:
    """One connection flushes what another one has written."""
    held = hold(kind)
    at, data = 20 * CLUSTER + 10, b"\xaa" * 4096
    with held.enter(Mode.STRUCTURED) as writer, held.enter(Mode.STRUCTURED) as other:
        succeeded(writer, Cmd.WRITE, at, payload=data)
        assert other.pread(at, len(data)) == data
        succeeded(other, Cmd.FLUSH)
        assert held.file.events[-1] == "sync"
        assert stored(held.path, at, len(data)) == data
        succeeded(writer, Cmd.FLUSH)  # the refcounts of clusters that nobody refers to any more
        events = len(held.file.events)
        succeeded(writer, Cmd.FLUSH)  # nothing is left to be written
        assert "write" not in held.file.events[events:]


def stored(path: Path, offset: int, length: int = CLUSTER) -> bytes:
    """Guest bytes that a copy of the image file holds."""
    copy, raw = path.with_name("copy.qcow2"), path.with_name("copy.raw")
    copy.write_bytes(path.read_bytes())
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", copy, raw)
    return raw.read_bytes()[offset : offset + length]


@row("W7")
@each_kind
def test_failed_flush(kind: str, tmp_path: Path, loop: str) -> None:
    """Nothing can be promised any more, and nothing is taken, to the end, which says so."""
    server = holding_open(loop, build(kind, tmp_path), held_image)
    held = server.__enter__()
    with held.enter(Mode.EXTENDED) as peer:
        succeeded(peer, Cmd.WRITE, 20 * CLUSTER, payload=b"\xaa" * 4096)
        held.file.sync_failed = True
        for _ in range(2):
            refused(peer, Errno.EIO, Cmd.FLUSH)
            refused(peer, Errno.EIO, Cmd.WRITE, 0, payload=b"\xaa" * 4096)
    with pytest.raises(OSError, match="flush"):
        server.__exit__(None, None, None)


# Zeroes ---------------------------------------------------------------------------------------


@row("W8")
@each_kind
@pytest.mark.parametrize("flags", [0, CmdFlag.NO_HOLE], ids=["may unmap", "NO_HOLE"])
@pytest.mark.parametrize(
    "offset, length",
    [
        (4 * CLUSTER, 3 * CLUSTER),
        (20 * CLUSTER, 3 * CLUSTER),
        (20 * CLUSTER + 700, 3 * CLUSTER - 1400),
        (20 * CLUSTER + 700, 5000),
    ],
)
def test_write_zeroes(hold: Hold, kind: str, flags: int, offset: int, length: int) -> None:
    """Zero clusters, which are this layer's. With NO_HOLE their space is there afterwards."""
    held = hold(kind)
    with held.enter(Mode.EXTENDED, (BASE, DEPTH)) as peer:
        succeeded(peer, Cmd.WRITE_ZEROES, offset, length, flags=flags)
        matches(peer, (offset, bytes(length)))
        first, last = -(-offset // CLUSTER) * CLUSTER, (offset + length) // CLUSTER * CLUSTER
        if first < last and kind != "version 2":
            told, depth = status(peer, first, last - first)
            assert told == [(last - first, HOLE_ZERO)]
            assert depth == [(last - first, 1)]
        succeeded(peer, Cmd.FLUSH)
        if flags:
            assert has_space(held.path, offset, length)


def has_space(path: Path, offset: int, length: int) -> bool:
    """Whether every cluster of a range has a place in the image file, of the top layer."""
    copy = path.with_name("copy.qcow2")
    copy.write_bytes(path.read_bytes())
    rows = json.loads(peers.run("qemu-img", "map", "--output=json", copy).stdout)
    inside = [
        row
        for row in rows
        if row["start"] < offset + length and offset < row["start"] + row["length"]
    ]
    return all(row["depth"] == 0 and "offset" in row for row in inside)


@row("W9")
@each_kind
@pytest.mark.parametrize("flags", [0, CmdFlag.NO_HOLE, CmdFlag.FUA], ids=str)
def test_fast_zero(hold: Hold, kind: str, flags: int) -> None:
    """Whole clusters are zeroed in their entries. Where data would have to be written it is
    ENOTSUP, and nothing was touched, not even the clusters that could have been zeroed.
    """
    held = hold(kind)
    flags |= CmdFlag.FAST_ZERO
    at = 20 * CLUSTER
    with held.enter(Mode.EXTENDED) as peer:
        refused(peer, Errno.ENOTSUP, Cmd.WRITE_ZEROES, at + 512, 2 * CLUSTER, flags=flags)
        refused(peer, Errno.ENOTSUP, Cmd.WRITE_ZEROES, at, CLUSTER + 512, flags=flags)
        matches(peer)
        assert "write" not in held.file.events
        if kind == "version 2":  # it has no zero clusters
            refused(peer, Errno.ENOTSUP, Cmd.WRITE_ZEROES, at, CLUSTER, flags=flags)
            matches(peer)
        else:
            succeeded(peer, Cmd.WRITE_ZEROES, at, CLUSTER, flags=flags)
            matches(peer, (at, bytes(CLUSTER)))


@row("W9")
def test_fast_zero_without_holes_on_the_host(hold: Hold) -> None:
    """New space is written where the host cannot allocate it."""
    held = hold("overlay")
    held.file.can_allocate = False
    at, flags = 20 * CLUSTER, CmdFlag.NO_HOLE
    with held.enter(Mode.EXTENDED) as peer:
        fast = flags | CmdFlag.FAST_ZERO
        refused(peer, Errno.ENOTSUP, Cmd.WRITE_ZEROES, at, CLUSTER, flags=fast)
        matches(peer)
        succeeded(peer, Cmd.WRITE_ZEROES, at, CLUSTER, flags=flags)
        matches(peer, (at, bytes(CLUSTER)))


# TRIM -----------------------------------------------------------------------------------------


@row("W13")
@each_kind
@pytest.mark.parametrize("at", [4 * CLUSTER, 20 * CLUSTER])
def test_trim(hold: Hold, kind: str, at: int) -> None:
    """Discarded clusters read as zeroes, and the file is shorter by them; the backing file never
    shows. Version 2 has no way to say so, and its overlay stays as it is.
    """
    held = hold(kind)
    with held.enter(Mode.EXTENDED, (BASE, DEPTH)) as peer:
        before = held.path.stat().st_blocks
        succeeded(peer, Cmd.TRIM, at, 2 * CLUSTER)
        succeeded(peer, Cmd.FLUSH)
        if kind == "version 2":
            matches(peer)
        else:
            matches(peer, (at, bytes(2 * CLUSTER)))
            assert status(peer, at, 2 * CLUSTER)[0] == [(2 * CLUSTER, HOLE_ZERO)]
        if kind == "flat":
            # A page of metadata, which was a hole, may be there now.
            assert before - held.path.stat().st_blocks >= (2 * CLUSTER - 4096) // 512
        succeeded(peer, Cmd.WRITE, at + 7, payload=b"\xaa")
        assert peer.pread(at, 9) == (CONTENT[at:] if kind == "version 2" else bytes(8))[:7] + (
            b"\xaa" + (CONTENT[at + 8 : at + 9] if kind == "version 2" else b"\0")
        )


@row("W14")
@each_kind
@pytest.mark.parametrize(
    "offset, length",
    [(20 * CLUSTER, 1024), (20 * CLUSTER + 512, CLUSTER), (4 * CLUSTER - 100, CLUSTER + 200)],
)
def test_unaligned_trim(hold: Hold, kind: str, offset: int, length: int) -> None:
    """Only whole clusters are discarded, and a part of one reads as before."""
    first, last = -(-offset // CLUSTER) * CLUSTER, (offset + length) // CLUSTER * CLUSTER
    whole = max(last - first, 0) * (kind != "version 2")
    with hold(kind).enter(Mode.EXTENDED) as peer:
        succeeded(peer, Cmd.TRIM, offset, length)
        read = peer.pread(0, SIZE)
        assert read[:offset] == CONTENT[:offset]
        assert read[offset + length :] == CONTENT[offset + length :]
        assert read[first : first + whole] == bytes(whole)
        if kind != "extended":  # where it is whole subclusters
            matches(peer, (first, bytes(whole)))


# Errors of the host ---------------------------------------------------------------------------


@row("W11")
@each_kind
@pytest.mark.parametrize(
    "number, error", [(errno.ENOSPC, Errno.ENOSPC), (errno.EIO, Errno.EIO)], ids=["space", "io"]
)
def test_errno_of_a_write(hold: Hold, kind: str, number: int, error: Errno) -> None:
    """Nothing has changed where it failed, and the next request works."""
    held = hold(kind)
    at = 20 * CLUSTER
    data = os.urandom(CLUSTER)
    with held.enter(Mode.EXTENDED) as peer:
        succeeded(peer, Cmd.WRITE, at - CLUSTER, payload=data)
        held.file.failure = OSError(number, os.strerror(number))
        refused(peer, error, Cmd.WRITE, at, payload=data)
        refused(peer, error, Cmd.WRITE, at + 512, payload=data[:512])
        held.file.failure = None
        matches(peer, (at - CLUSTER, data))
        succeeded(peer, Cmd.WRITE, at + 512, payload=data)
        succeeded(peer, Cmd.FLUSH)
        matches(peer, (at - CLUSTER, data), (at + 512, data))


# Damage ---------------------------------------------------------------------------------------


@row("W15")
@pytest.mark.parametrize("mode", [Mode.SIMPLE, Mode.STRUCTURED, Mode.EXTENDED])
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.TRIM])
def test_damage_that_a_change_meets(
    tmp_path: Path, loop: str, mode: Mode, command: Cmd, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest cluster that is mapped to the refcount table: nothing is written there."""
    path = tmp_path / "disk.qcow2"
    at = 5 * CLUSTER
    written = Image(size=SIZE, clusters=clusters(SIZE)).write(path)
    table = written.header.refcount_table_offset
    poke(path, written.entry_offset(at), (table | COPIED).to_bytes(8, "big"))
    before = path.read_bytes()[table : table + CLUSTER]
    payload = bytes(CLUSTER) if command is Cmd.WRITE else None
    length = CLUSTER if command is Cmd.TRIM else 0
    with holding_open(loop, path, held_image) as held, held.enter(mode) as peer:
        if command is Cmd.WRITE:
            refused(peer, Errno.EIO, command, at, payload=payload)
        else:  # what is given back is looked at when it is flushed
            succeeded(peer, command, at, length)
            succeeded(peer, Cmd.FLUSH)
        assert path.read_bytes()[79] & Incompatible.CORRUPT
        refused(peer, Errno.EPERM, Cmd.WRITE, CLUSTER, payload=CONTENT[:CLUSTER])
        refused(peer, Errno.EPERM, Cmd.WRITE_ZEROES, CLUSTER, CLUSTER)
        refused(peer, Errno.EPERM, Cmd.TRIM, CLUSTER, CLUSTER)
        succeeded(peer, Cmd.FLUSH)
        assert peer.pread(CLUSTER, 4 * CLUSTER) == CONTENT[CLUSTER : 5 * CLUSTER]
    assert path.read_bytes()[table : table + CLUSTER] == before
    assert f"refcount table at {table:#x}" in caplog.text


# Bitmaps --------------------------------------------------------------------------------------


@row("X17")
def test_a_bitmap_that_records(tmp_path: Path, loop: str) -> None:
    """Its context tells of every write, zero and discard at once; a disabled one stays as it
    was. When the server has ended, the image has it so.
    """
    peers.require("qemu-img")
    path = tmp_path / "disk.qcow2"
    bitmaps = [
        Bitmap("on", dirty=[(CLUSTER, CLUSTER)]),
        Bitmap("off", dirty=[(0, 2 * CLUSTER)], flags=BitmapFlags(0)),
    ]
    Image(size=SIZE, clusters=clusters(SIZE), bitmaps=bitmaps).write(path)
    contexts = ("qemu:dirty-bitmap:on", "qemu:dirty-bitmap:off")
    off = [(2 * CLUSTER, 1), (SIZE - 2 * CLUSTER, 0)]
    dirty = [1]
    with (
        holding_open(loop, path, held_image) as held,
        held.enter(Mode.EXTENDED, contexts) as peer,
        held.enter(Mode.EXTENDED) as writer,
    ):
        for number, command, length in (
            (4, Cmd.WRITE, 1),
            (8, Cmd.WRITE_ZEROES, CLUSTER),
            (12, Cmd.TRIM, CLUSTER),
        ):
            payload = b"\xaa" if command == Cmd.WRITE else b""
            succeeded(writer, command, number * CLUSTER, length, payload=payload)
            dirty.append(number)
            on, untouched = status(peer, 0, SIZE)
            assert on == runs(dirty)
            assert untouched == off
        assert peer.pread(4 * CLUSTER, 1) == b"\xaa"
    peers.run("qemu-img", "check", path)
    with holding_open(loop, path, held_image) as held, held.enter(Mode.EXTENDED, contexts) as peer:
        assert status(peer, 0, SIZE) == [runs(dirty), off]


def runs(dirty: list[int]) -> list[tuple[int, int]]:
    """The extents of a bitmap in which these clusters are dirty, no two of them neighbours."""
    found, at = [], 0
    for number in dirty:
        found += [((number - at) * CLUSTER, 0), (CLUSTER, 1)]
        at = number + 1
    return [*found, (SIZE - at * CLUSTER, 0)]


# The end --------------------------------------------------------------------------------------


@row("L1")
@each_kind
def test_the_end_finishes_the_image(kind: str, tmp_path: Path, loop: str) -> None:
    """Nobody has flushed; what was answered is there all the same."""
    peers.require("qemu-img")
    data = os.urandom(3 * CLUSTER)
    path = build(kind, tmp_path)
    with holding_open(loop, path, held_image) as held, held.enter(Mode.EXTENDED) as peer:
        succeeded(peer, Cmd.WRITE, 20 * CLUSTER + 5, payload=data)
    peers.run("qemu-img", "check", path)
    assert stored(path, 20 * CLUSTER + 5, len(data)) == data


@row("C14")
@each_kind
@pytest.mark.parametrize("command", [Cmd.WRITE, Cmd.WRITE_ZEROES, Cmd.TRIM])
def test_a_peer_that_leaves(hold: Hold, kind: str, command: Cmd) -> None:
    """What it has asked for is finished: all of it, or nothing where the server has not begun."""
    held = hold(kind)
    at, length = 20 * CLUSTER + 5, 3 * CLUSTER
    payload = b"\xaa" * length if command == Cmd.WRITE else b""
    with held.enter(Mode.STRUCTURED) as peer:
        held.file.released.clear()
        peer.request(command, at, length, payload=payload)
        if command == Cmd.WRITE:
            assert held.file.entered.acquire(timeout=2)
    held.file.released.set()
    with held.enter(Mode.STRUCTURED) as other:
        succeeded(other, Cmd.FLUSH)
        if command == Cmd.WRITE:
            wait_until(lambda: other.pread(at, length) == payload)
        else:
            end = at + length
            read = other.pread(0, SIZE)
            assert read[:at] == CONTENT[:at]
            assert read[end:] == CONTENT[end:]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@row("L1")
@pytest.mark.parametrize("kind", ["overlay", "extended"])
def test_a_write_that_takes_too_long(kind: str, tmp_path: Path, loop: str) -> None:
    """It is dropped unanswered; it is there as a whole or not at all, and the image is finished
    after the last system call.
    """
    peers.require("qemu-img")
    path = build(kind, tmp_path)
    at, data = 20 * CLUSTER + 5, b"\xaa" * CLUSTER
    with holding_open(loop, path, held_image) as held, held.enter(Mode.STRUCTURED) as peer:
        succeeded(peer, Cmd.WRITE, 0, payload=data)
        held.file.released.clear()
        peer.request(Cmd.WRITE, at, payload=data)
        held.local.call(held.local.server.stop)
        peer.sock.settimeout(GRACE + 2)
        peer.expect_disconnect()
        held.file.released.set()
    peers.run("qemu-img", "check", path)
    assert stored(path, 0) == data
    assert stored(path, at) in (CONTENT[at : at + CLUSTER], data)


@row("L1")
def test_an_end_that_fails(tmp_path: Path, loop: str) -> None:
    """Whoever runs the server is told; the image opens, as after a crash."""
    peers.require("qemu-img")
    path = build("overlay", tmp_path)
    server = holding_open(loop, path, held_image)
    held = server.__enter__()
    with held.enter(Mode.EXTENDED) as peer:
        succeeded(peer, Cmd.WRITE, 20 * CLUSTER, payload=b"\xaa" * CLUSTER)
    held.file.failure = OSError(errno.ENOSPC, "no space")
    with pytest.raises(OSError, match="no space"):
        server.__exit__(None, None, None)
    said = peers.run("qemu-img", "check", path, check=False)
    assert said.returncode in (0, 3)  # 3: leaks
