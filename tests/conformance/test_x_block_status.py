"""X: the replies to BLOCK_STATUS."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from tests.conformance.asking import chunked, each_mode, refused, still_serves, succeeded
from tests.conformance.client import Chunk, Cmd, CmdFlag, Errno, Extent, Mode, Option, Peer
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import (
    BITMAPS,
    BROKEN_ENTRY,
    BROKEN_NOT,
    BROKEN_SIZE,
    CHAIN_ALLOCATION,
    CHAIN_CONTEXTS,
    CHAIN_DEPTH,
    CHAIN_SIZE,
    CLUSTER,
    FRAGMENT,
    FRAGMENTS,
    ODD_SIZE,
    RAW_SIZE,
    pattern,
)

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
ZERO = 2
RANGES = [
    (0, CHAIN_SIZE),
    (0, 1),
    (256, 100_000),
    (CLUSTER - 1, 2),
    (CHAIN_SIZE - 1, 1),
    (3 * CLUSTER, 2 * CLUSTER),
    (3 * CLUSTER + 5, 9 * CLUSTER - 7),
    (11 * CLUSTER, 5 * CLUSTER),
]
ranges = pytest.mark.parametrize("offset, length", RANGES)


def _whole_map(context: str) -> list[Extent]:
    """What a context says of all of ``qcow2``, from its drawing."""
    if context in (BASE, DEPTH):
        clusters = CHAIN_ALLOCATION if context == BASE else CHAIN_DEPTH
        return [Extent(count * CLUSTER, status) for count, status in clusters]
    dirty = BITMAPS[context.removeprefix("qemu:dirty-bitmap:")]
    bits = [
        int(any(start <= at < start + length for start, length in dirty))
        for at in range(0, CHAIN_SIZE, CLUSTER)
    ]
    return [Extent(len(list(run)) * CLUSTER, bit) for bit, run in itertools.groupby(bits)]


def expected(context: str, offset: int, length: int) -> list[Extent]:
    """What a context says of a range of ``qcow2``."""
    found = []
    start = 0
    for size, status in _whole_map(context):
        first, last = max(start, offset), min(start + size, offset + length)
        if first < last:
            found.append(Extent(last - first, status))
        start += size
    return found


def chain_is_served(peer: Peer, ids: dict[str, int]) -> None:
    """The connection to ``qcow2`` is in step."""
    status = succeeded(peer, Cmd.BLOCK_STATUS, 0, CLUSTER).status
    assert status == {number: expected(name, 0, CLUSTER) for name, number in ids.items()}


# Who gets an answer ---------------------------------------------------------------------------


@row("X1")
@each_mode
def test_without_contexts(server: RunningServer, mode: Mode) -> None:
    with server.enter(mode) as peer:
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, 0, 4096)
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, 0, 4096, flags=CmdFlag.REQ_ONE)


@row("X1")
@chunked
def test_contexts_of_another_export(server: RunningServer, mode: Mode) -> None:
    with server.connect() as peer:
        peer.greet()
        peer.headers(mode)
        assert peer.meta(Option.SET_META_CONTEXT, "qcow2", [BASE])
        peer.info(Option.GO, "ro")
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, 0, 4096)


@row("X2", "X3")
@chunked
@pytest.mark.parametrize("count", range(1, len(CHAIN_CONTEXTS) + 1))
def test_one_chunk_for_each_context(server: RunningServer, mode: Mode, count: int) -> None:
    kind = Chunk.BLOCK_STATUS_EXT if mode is Mode.EXTENDED else Chunk.BLOCK_STATUS
    contexts = CHAIN_CONTEXTS[-count:]
    with server.connect() as peer:
        ids = peer.negotiate(mode, "qcow2", contexts)
        reply = succeeded(peer, Cmd.BLOCK_STATUS, 0, CHAIN_SIZE)
        assert [chunk.type for chunk in reply.chunks] == [kind] * count
        assert [chunk.flags for chunk in reply.chunks] == [0] * (count - 1) + [1]
        told = [int.from_bytes(chunk.payload[:4]) for chunk in reply.chunks]
        assert sorted(told) == sorted(ids.values())
        for name, number in ids.items():
            assert reply.status[number] == expected(name, 0, CHAIN_SIZE)
        chain_is_served(peer, ids)


@row("X3")
def test_the_bytes_of_a_structured_reply(server: RunningServer) -> None:
    with server.connect() as peer:
        ids = peer.negotiate(Mode.STRUCTURED, "qcow2", [BASE])
        peer.request(Cmd.BLOCK_STATUS, 0, 2 * CLUSTER, cookie=7)
        assert peer.read(40) == bytes.fromhex(
            "668e33ef 0001 0005 0000000000000007 00000014"
            f"{ids[BASE]:08x} 00010000 00000000 00010000 00000003"
        )
        chain_is_served(peer, ids)


@row("X3")
def test_the_bytes_of_an_extended_reply(server: RunningServer) -> None:
    with server.connect() as peer:
        ids = peer.negotiate(Mode.EXTENDED, "qcow2", [BASE])
        peer.request(Cmd.BLOCK_STATUS, 0, 2 * CLUSTER, cookie=7)
        assert peer.read(72) == bytes.fromhex(
            "6e8a278c 0001 0006 0000000000000007 0000000000000000 0000000000000028"
            f"{ids[BASE]:08x} 00000002"
            "0000000000010000 0000000000000000 0000000000010000 0000000000000003"
        )
        chain_is_served(peer, ids)


# What the extents are -------------------------------------------------------------------------


@row("X4", "X5", "X7", "X10")
@chunked
@ranges
def test_extents(server: RunningServer, mode: Mode, offset: int, length: int) -> None:
    """Contiguous, merged, clipped at both ends, and no further than was asked for."""
    with server.connect() as peer:
        ids = peer.negotiate(mode, "qcow2", CHAIN_CONTEXTS)
        status = succeeded(peer, Cmd.BLOCK_STATUS, offset, length).status
        assert status == {n: expected(name, offset, length) for name, n in ids.items()}
        for extents in status.values():
            are_lawful(extents, length)
        chain_is_served(peer, ids)


def are_lawful(extents: Sequence[Extent], length: int) -> None:
    """What holds for the extents of every reply about ``length`` bytes."""
    assert extents
    assert all(extent.length > 0 for extent in extents)
    assert sum(extent.length for extent in extents) <= length
    assert all(left.flags != right.flags for left, right in itertools.pairwise(extents))


@row("X6", "X10")
@chunked
@ranges
def test_only_the_first_extent(server: RunningServer, mode: Mode, offset: int, length: int) -> None:
    """One descriptor for each context, which reaches to its first change."""
    with server.connect() as peer:
        ids = peer.negotiate(mode, "qcow2", CHAIN_CONTEXTS)
        flags = CmdFlag.REQ_ONE
        status = succeeded(peer, Cmd.BLOCK_STATUS, offset, length, flags=flags).status
        assert status == {n: expected(name, offset, length)[:1] for name, n in ids.items()}
        chain_is_served(peer, ids)


@row("X9")
@chunked
def test_contexts_end_at_different_places(server: RunningServer, mode: Mode) -> None:
    with server.connect() as peer:
        ids = peer.negotiate(mode, "qcow2", [BASE, DEPTH, "qemu:dirty-bitmap:plain"])
        flags = CmdFlag.REQ_ONE
        status = succeeded(peer, Cmd.BLOCK_STATUS, 0, CHAIN_SIZE, flags=flags).status
        assert status[ids[BASE]] == [(CLUSTER, 0)]
        assert status[ids[DEPTH]] == [(3 * CLUSTER, 1)]
        assert status[ids["qemu:dirty-bitmap:plain"]] == [(CLUSTER, 1)]
        chain_is_served(peer, ids)


@row("X8")
def test_number_of_descriptors(server: RunningServer) -> None:
    """Bounded, and the rest can be asked for; the contexts are bounded each for itself."""
    size = FRAGMENTS * FRAGMENT
    with server.connect() as peer:
        ids = peer.negotiate(Mode.EXTENDED, "fragments", [BASE, DEPTH])
        offset = rounds = 0
        while offset < size:
            status = succeeded(peer, Cmd.BLOCK_STATUS, offset, size - offset).status
            base, depth = status[ids[BASE]], status[ids[DEPTH]]
            for extents in (base, depth):
                are_lawful(extents, size - offset)
                assert len(extents) <= 1 << 17
            assert base[:2] == [(FRAGMENT, 2), (FRAGMENT, 3)]  # holes in the image file
            assert depth[:2] == [(FRAGMENT, 1), (FRAGMENT, 0)]
            offset += sum(extent.length for extent in base)
            rounds += 1
        assert offset == size
        assert 2 <= rounds <= FRAGMENTS / 1000


@row("X8")
def test_number_of_descriptors_in_a_compact_reply(server: RunningServer) -> None:
    with server.connect() as peer:
        peer.negotiate(Mode.STRUCTURED, "fragments", [BASE])
        (extents,) = succeeded(peer, Cmd.BLOCK_STATUS, 0, 2**32 - 1).status.values()
        are_lawful(extents, 2**32 - 1)
        assert len(extents) <= 1 << 17
        assert extents[:2] == [(FRAGMENT, 2), (FRAGMENT, 3)]  # holes in the image file
        assert succeeded(peer, Cmd.READ, FRAGMENT, 512).data == bytes(512)


@row("X11")
@chunked
def test_status_flags(server: RunningServer, mode: Mode) -> None:
    """Only what a context defines: two bits, a depth, one bit."""
    with server.connect() as peer:
        ids = peer.negotiate(mode, "qcow2", CHAIN_CONTEXTS)
        status = succeeded(peer, Cmd.BLOCK_STATUS, 0, CHAIN_SIZE).status
        for name, number in ids.items():
            limit = 3 if name in (BASE, DEPTH) else 1
            assert all(extent.flags <= limit for extent in status[number])
        chain_is_served(peer, ids)


@row("X12", "X13")
@chunked
def test_the_end_of_the_export(server: RunningServer, mode: Mode) -> None:
    """The last extent ends with the export, aligned or not."""
    with server.enter(mode, "odd", (BASE, DEPTH)) as peer:
        for offset in (0, 1, 512, ODD_SIZE - 1):
            length = ODD_SIZE - offset
            for extents in succeeded(peer, Cmd.BLOCK_STATUS, offset, length).status.values():
                assert sum(extent.length for extent in extents) == length
        still_serves(peer)
    with server.enter(mode, "raw", (BASE, DEPTH)) as peer:
        status = succeeded(peer, Cmd.BLOCK_STATUS, RAW_SIZE - 8192, 8192).status
        assert status == {0: [(4096, 3), (4096, 0)], 1: [(8192, 1)]}
        still_serves(peer)


@row("X14")
@chunked
@pytest.mark.parametrize("offset", [2**32 - 2, 2**32 - 1, 2**32])
@pytest.mark.parametrize("length", [1, 2, 4096])
@pytest.mark.parametrize("flags", [0, CmdFlag.REQ_ONE], ids=["all", "REQ_ONE"])
def test_around_4_gib(
    server: RunningServer, mode: Mode, offset: int, length: int, flags: int
) -> None:
    with server.enter(mode, contexts=(BASE, DEPTH)) as peer:
        status = succeeded(peer, Cmd.BLOCK_STATUS, offset, length, flags=flags).status
        assert status == {0: [(length, 3)], 1: [(length, 1)]}
        refused(peer, Errno.EINVAL, Cmd.BLOCK_STATUS, offset, 0, flags=flags)


@row("X14")
@pytest.mark.parametrize("length", [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 1])
def test_lengths_around_4_gib(server: RunningServer, length: int) -> None:
    for mode in (Mode.STRUCTURED, Mode.EXTENDED):
        if length >= 2**32 and mode is Mode.STRUCTURED:
            continue
        with server.enter(mode, contexts=(DEPTH,)) as peer:
            for offset in (0, 256):
                status = succeeded(peer, Cmd.BLOCK_STATUS, offset, length).status
                ((extent,),) = status.values()
                assert extent.flags == 1
                assert 0 < extent.length <= length
            still_serves(peer)


@row("X15")
@chunked
@pytest.mark.parametrize("contexts", [(BASE,), (BASE, DEPTH)], ids=["one", "two"])
@pytest.mark.parametrize("flags", [0, CmdFlag.REQ_ONE], ids=["all", "REQ_ONE"])
@pytest.mark.parametrize(
    "offset, length",
    [(BROKEN_ENTRY, CLUSTER), (BROKEN_ENTRY + 9, 1), (BROKEN_ENTRY, 3 * CLUSTER)],
)
def test_damaged_metadata(
    server: RunningServer,
    mode: Mode,
    contexts: Sequence[str],
    flags: int,
    offset: int,
    length: int,
) -> None:
    """One error for the whole request, however many contexts there are."""
    with server.enter(mode, "broken", contexts) as peer:
        reply = peer.ask(Cmd.BLOCK_STATUS, offset, length, flags=flags)
        assert reply.error == Errno.EIO
        (chunk,) = reply.chunks
        assert chunk.done
        status = succeeded(peer, Cmd.BLOCK_STATUS, BROKEN_NOT, BROKEN_SIZE - BROKEN_NOT).status
        assert status[0] == [(CLUSTER, 0), (BROKEN_SIZE - BROKEN_NOT - CLUSTER, 3)]
        assert peer.pread(BROKEN_NOT, 512) == pattern(BROKEN_NOT, 512)


@row("X16")
@chunked
@pytest.mark.parametrize("export, size", [("qcow2", CHAIN_SIZE), ("raw", 4 << 20), ("ro", 1 << 20)])
def test_what_is_zero_reads_as_zeroes(
    server: RunningServer, mode: Mode, export: str, size: int
) -> None:
    with server.enter(mode, export, (BASE,)) as peer:
        offset = 0
        while offset < size:
            for extent in succeeded(peer, Cmd.BLOCK_STATUS, offset, size - offset).status[0]:
                if extent.flags & ZERO:
                    assert peer.pread(offset, extent.length) == bytes(extent.length)
                offset += extent.length
        assert offset == size
