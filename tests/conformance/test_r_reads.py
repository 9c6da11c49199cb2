"""R: how the content of a READ is cut into chunks, and what becomes of it when the disk fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conformance.asking import MAX_ERROR_TEXT, chunked, each_mode, still_serves, succeeded
from tests.conformance.client import (
    MAX_PAYLOAD,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    ReplyChunk,
)
from tests.conformance.local import Held, content, holding
from tests.conformance.rows import row
from tests.conformance.running import RunningServer
from tests.conformance.server import (
    BROKEN_STREAM,
    CHAIN_CONTENTS,
    CHAIN_SIZE,
    CLUSTER,
    RAW_SIZE,
    RO_DATA,
    RO_SIZE,
    pattern,
)

RANGES = [
    (0, CHAIN_SIZE),
    (0, 1),
    (CHAIN_SIZE - 1, 1),
    (CLUSTER - 1, 2),
    (1, CLUSTER),
    (CLUSTER, CLUSTER),  # a hole and nothing else
    (3, CHAIN_SIZE - 7),
    (5 * CLUSTER - 100, 2 * CLUSTER + 5000),
    (7 * CLUSTER + 1, 5 * CLUSTER - 2),
]
ranges = pytest.mark.parametrize("offset, length", RANGES)
CONTENT_TYPES = (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE)
SIZE = 1 << 20
CONTENT = content(SIZE)


def pieces(chunks: Sequence[ReplyChunk]) -> list[tuple[int, int]]:
    """(offset, length) of each content chunk, ascending."""
    found = []
    for chunk in chunks:
        if chunk.type == Chunk.OFFSET_DATA:
            found.append((int.from_bytes(chunk.payload[:8]), len(chunk.payload) - 8))
        elif chunk.type == Chunk.OFFSET_HOLE:
            found.append((int.from_bytes(chunk.payload[:8]), int.from_bytes(chunk.payload[8:])))
    return sorted(found)


@row("R1")
@chunked
@ranges
@pytest.mark.parametrize("flags", [0, CmdFlag.DF, CmdFlag.FUA], ids=["plain", "DF", "FUA"])
def test_chunks_cover_the_range_once(
    server: RunningServer, mode: Mode, offset: int, length: int, flags: int
) -> None:
    with server.enter(mode, "qcow2") as peer:
        reply = succeeded(peer, Cmd.READ, offset, length, flags=flags)
        assert reply.data == CHAIN_CONTENTS[offset : offset + length]
        at = offset
        for start, size in pieces(reply.chunks):
            assert start == at
            assert size > 0
            at += size
        assert at == offset + length
        assert peer.pread(0, CLUSTER) == CHAIN_CONTENTS[:CLUSTER]


@row("R1")
@ranges
def test_simple_reply_has_the_same_content(server: RunningServer, offset: int, length: int) -> None:
    with server.enter(Mode.SIMPLE, "qcow2") as peer:
        assert peer.pread(offset, length) == CHAIN_CONTENTS[offset : offset + length]
        assert peer.pread(0, CLUSTER) == CHAIN_CONTENTS[:CLUSTER]


@row("R2")
@chunked
def test_data_and_holes(server: RunningServer, mode: Mode) -> None:
    """A hole comes as 12 bytes, whatever its size, wherever nothing is allocated."""
    with server.enter(mode, "qcow2") as peer:
        chunks = succeeded(peer, Cmd.READ, 0, CHAIN_SIZE).chunks
        holes = [chunk.payload for chunk in chunks if chunk.type == Chunk.OFFSET_HOLE]
        assert all(len(payload) == 12 for payload in holes)
        # The zero cluster of the top layer stands alone between two data clusters.
        assert CLUSTER.to_bytes(8) + CLUSTER.to_bytes(4) in holes
        data = [chunk.payload for chunk in chunks if chunk.type == Chunk.OFFSET_DATA]
        assert all(len(payload) > 8 for payload in data)
        assert data[0] == bytes(8) + CHAIN_CONTENTS[:CLUSTER]
        assert peer.pread(0, CLUSTER) == CHAIN_CONTENTS[:CLUSTER]


@row("R3")
@chunked
@ranges
@pytest.mark.parametrize("flags", [0, CmdFlag.DF], ids=["plain", "DF"])
def test_one_chunk_is_the_last(
    server: RunningServer, mode: Mode, offset: int, length: int, flags: int
) -> None:
    with server.enter(mode, "qcow2") as peer:
        chunks = succeeded(peer, Cmd.READ, offset, length, flags=flags).chunks
        assert [chunk.flags for chunk in chunks] == [0] * (len(chunks) - 1) + [1]
        for chunk in chunks:
            if chunk.type == Chunk.NONE:
                assert chunk.done
                assert chunk.payload == b""
        assert peer.pread(0, CLUSTER) == CHAIN_CONTENTS[:CLUSTER]  # and nothing came after it


@row("R5")
@chunked
@pytest.mark.parametrize(
    "offset, length", [*RANGES, (0, 65536), (CLUSTER - 512, 65536), (7 * CLUSTER, 65536)]
)
def test_dont_fragment(server: RunningServer, mode: Mode, offset: int, length: int) -> None:
    with server.enter(mode, "qcow2") as peer:
        reply = succeeded(peer, Cmd.READ, offset, length, flags=CmdFlag.DF)
        (content,) = [chunk for chunk in reply.chunks if chunk.type != Chunk.NONE]
        assert content.type == Chunk.OFFSET_DATA
        assert content.payload == offset.to_bytes(8) + CHAIN_CONTENTS[offset : offset + length]
        assert peer.pread(0, CLUSTER) == CHAIN_CONTENTS[:CLUSTER]


@row("R5", "R10")
@chunked
@pytest.mark.parametrize("flags", [0, CmdFlag.DF], ids=["plain", "DF"])
def test_the_longest_read(server: RunningServer, mode: Mode, flags: int) -> None:
    """No chunk carries more than the maximum payload, and the offset before it."""
    with server.enter(mode) as peer:
        reply = succeeded(peer, Cmd.READ, RAW_SIZE - MAX_PAYLOAD, MAX_PAYLOAD, flags=flags)
        assert reply.data[-4096:] == pattern(RAW_SIZE - 4096, 4096)
        assert not any(reply.data[:-4096])
        assert all(len(chunk.payload) <= MAX_PAYLOAD + 8 for chunk in reply.chunks)
        contents = [chunk for chunk in reply.chunks if chunk.type in CONTENT_TYPES]
        assert flags == 0 or len(contents) == 1
        still_serves(peer)


@row("R9")
@chunked
@pytest.mark.parametrize("offset", [0, 1, RO_SIZE])
def test_empty_read_has_no_content(server: RunningServer, mode: Mode, offset: int) -> None:
    with server.enter(mode, "ro") as peer:
        (chunk,) = succeeded(peer, Cmd.READ, offset, 0).chunks
        assert (chunk.flags, chunk.type, chunk.payload) == (1, Chunk.NONE, b"")
        still_serves(peer)


@row("R11")
def test_hole_of_an_extended_reply(server: RunningServer) -> None:
    """Its length has 32 bits, as in a structured one."""
    with server.enter(Mode.EXTENDED, "ro") as peer:
        chunks = succeeded(peer, Cmd.READ, RO_DATA, RO_SIZE - RO_DATA).chunks
        (hole,) = [chunk for chunk in chunks if chunk.type in CONTENT_TYPES]
        assert hole.type == Chunk.OFFSET_HOLE
        assert hole.offset == RO_DATA
        assert hole.payload == RO_DATA.to_bytes(8) + (RO_SIZE - RO_DATA).to_bytes(4)
        still_serves(peer)


# A disk that fails ----------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path, loop: str) -> Iterator[Held]:
    with holding(loop, tmp_path, SIZE) as held:
        yield held


@row("R4", "R6")
@chunked
@pytest.mark.parametrize("flags", [0, CmdFlag.DF], ids=["plain", "DF"])
@pytest.mark.parametrize("left", [0, 1, 70_000, 262_143])
def test_file_ends_in_the_middle_of_a_chunk(held: Held, mode: Mode, flags: int, left: int) -> None:
    """The chunk that was begun is completed with zeroes; the error comes after it, and DONE with
    it.
    """
    offset, length = 256 << 10, 256 << 10
    with held.enter(mode) as peer:
        held.file.claims_resident = True  # the server looks, and only then it is truncated
        os.truncate(held.path, offset + left)
        cookie = peer.request(Cmd.READ, offset, length, flags=flags)
        content, error = peer.read_chunk(), peer.read_chunk()
        assert (content.cookie, error.cookie) == (cookie, cookie)
        assert (content.flags, content.type) == (0, Chunk.OFFSET_DATA)
        assert len(content.payload) == 8 + length
        assert content.payload[8 : 8 + left] == CONTENT[offset : offset + left]
        assert not any(content.payload[8 + left :])
        assert (error.flags, error.type) == (1, Chunk.ERROR)
        assert int.from_bytes(error.payload[:4]) == Errno.EIO
        held.file.claims_resident = False
        still_serves(peer)


@row("R6")
@chunked
@pytest.mark.parametrize("length", [512, 256 << 10])
def test_data_that_cannot_be_read(held: Held, mode: Mode, length: int) -> None:
    """What is known to fail before anything was sent is one error chunk."""
    with held.enter(mode) as peer:
        os.truncate(held.path, 4096)
        for offset in (4096, 256 << 10):
            cookie = peer.request(Cmd.READ, offset, length)
            reply = peer.reply()
            assert (reply.cookie, reply.error) == (cookie, Errno.EIO)
            assert [chunk.type for chunk in reply.chunks] == [Chunk.ERROR]
        still_serves(peer)


@row("R7")
def test_simple_reply_that_fails_after_its_header(held: Held) -> None:
    """There is no way left to say it: the connection ends before the data are complete."""
    length = 256 << 10
    with held.enter(Mode.SIMPLE) as peer:
        held.file.claims_resident = True
        os.truncate(held.path, 70_000)
        peer.request(Cmd.READ, 0, length)
        answer = peer.read_to_end()
        assert answer[:8] == bytes.fromhex("67446698 00000000")
        assert len(answer) < 16 + length
        assert answer[16:] == CONTENT[: len(answer) - 16]
    held.file.claims_resident = False
    with held.enter(Mode.SIMPLE) as peer:
        still_serves(peer)


@row("R7")
def test_simple_reply_that_fails_before_its_header(held: Held) -> None:
    with held.enter(Mode.SIMPLE) as peer:
        os.truncate(held.path, 70_000)
        cookie = peer.request(Cmd.READ, 0, 256 << 10)
        reply = peer.reply()
        assert (reply.cookie, reply.error) == (cookie, Errno.EIO)
        still_serves(peer)


@row("R8")
@chunked
@pytest.mark.parametrize(
    "offset, length", [(BROKEN_STREAM, 512), (BROKEN_STREAM + 100, 3 * CLUSTER), (2**40, 1)]
)
def test_error_payload(server: RunningServer, mode: Mode, offset: int, length: int) -> None:
    """32 bits of error, not 0, 16 bits of length, and a text; an offset only after the text."""
    with server.enter(mode, "broken") as peer:
        peer.request(Cmd.READ, offset, length)
        (chunk,) = peer.reply().chunks
        size = int.from_bytes(chunk.payload[4:6])
        assert int.from_bytes(chunk.payload[:4]) in (Errno.EIO, Errno.EINVAL)
        assert chunk.payload[6 : 6 + size].decode()
        assert size <= MAX_ERROR_TEXT
        rest = chunk.payload[6 + size :]
        if chunk.type == Chunk.ERROR_OFFSET:
            assert offset <= int.from_bytes(rest) < offset + length
            assert len(rest) == 8
        else:
            assert chunk.type == Chunk.ERROR
            assert rest == b""
        assert peer.pread(2 * CLUSTER, 512) == pattern(2 * CLUSTER, 512)


@row("R1")
@each_mode
def test_reads_of_every_length(server: RunningServer, mode: Mode) -> None:
    """Over the places where the way of a read changes: in the buffer, on its own, sent from the
    file.
    """
    lengths = [1, 511, 512, 4096, 65535, 65536, 65537, 262144, 262145, 524288, 524289, 1 << 20]
    with server.enter(mode) as peer:
        for length in lengths:
            for offset in (0, 1, 4095):
                if offset + length <= 1 << 20:
                    assert peer.pread(offset, length) == pattern(offset, length)
        still_serves(peer)
