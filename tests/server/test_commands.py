"""What a command may carry, in which order it is checked, and how errors are told.

The cells of command, flag and mode, and the bounds, are rows of the conformance tests; here are the
things that need a disk that fails.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.extent import Runs
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Compressed, Data, Image, Zero
from pynbd.protocol.transmission import Request, dialect
from pynbd.protocol.values import Error
from pynbd.server.commands import Commands, nbd_error
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export
from tests.server.session import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EPERM,
    ESHUTDOWN,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Mode,
    Talk,
    WatchedEngine,
    content,
    negotiated,
    talking,
)

SIZE = 1 << 20
BYTES = random.Random(11).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(BYTES)
    return path


@asynccontextmanager
async def talk_of(
    path: Path, engine: WatchedEngine, *, mode: Mode = Mode.STRUCTURED, **options: Any
) -> AsyncIterator[tuple[Talk, BlockNode]]:
    options = {"format": "raw", "read_only": False, **options}
    node = await open_image(path, engine=engine, **options)
    contexts = standard_contexts(depth=False, bitmaps=())
    engine.calls.clear()
    try:
        async with talking(node, mode, contexts=contexts) as talk:
            yield talk, node
    finally:
        await node.close()


# The order of the checks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, offset, length, flags, error",
    [
        (99, SIZE, 1, 0xFFFF, EINVAL),
        (WRITE, SIZE, 1, 0xFF00, EPERM),
        (TRIM, SIZE, 1, 0xFF00, EPERM),
        (WRITE_ZEROES, SIZE, 1, 0xFF00, EPERM),
        (READ, SIZE, 1, NO_HOLE, EINVAL),
        (READ, 0, (32 << 20) + 1, 0, EINVAL),
        (FLUSH, 0, 1, 0, EINVAL),
        (BLOCK_STATUS, 0, 0, 0, EINVAL),
        (READ, SIZE + 1, 0, 0, EINVAL),
    ],
)
async def test_a_read_only_export(
    path: Path,
    engine: WatchedEngine,
    command: int,
    offset: int,
    length: int,
    flags: int,
    error: int,
) -> None:
    """Known at all, then permitted (row W4), then its flags, then its place."""
    async with talk_of(path, engine, read_only=True) as (talk, _):
        payload = b"x" if command == WRITE else b""
        reply = await talk.client.ask(command, offset, length, flags=flags, payload=payload)
        assert reply.error == error
        assert reply.message
        assert engine.hops == 0


async def test_stopping_comes_first(path: Path) -> None:
    node = await open_image(path, format="raw")
    export = Export("", node, contexts={})
    commands = Commands(
        export,
        negotiated(export, Mode.STRUCTURED, {}),
        dialect(structured=True, extended=False),
    )
    commands.stopping = True
    (reply,) = await commands.serve(Request(0, 99, 7, 0, 0))
    assert isinstance(reply, bytes)
    assert int.from_bytes(reply[20:24], "big") == ESHUTDOWN
    await node.close()


# Errors of the host ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, error",
    [
        (errno.EPERM, Error.EPERM),
        (errno.EACCES, Error.EPERM),
        (errno.EROFS, Error.EPERM),
        (errno.EIO, Error.EIO),
        (errno.ENOMEM, Error.ENOMEM),
        (errno.ENOSPC, Error.ENOSPC),
        (errno.EDQUOT, Error.ENOSPC),
        (errno.EFBIG, Error.ENOSPC),
        (errno.EOPNOTSUPP, Error.ENOTSUP),
        (errno.ESHUTDOWN, Error.ESHUTDOWN),
        (errno.EBADF, Error.EINVAL),
        (errno.EAGAIN, Error.EINVAL),
        (None, Error.EINVAL),
    ],
)
def test_errors_of_the_host(number: int | None, error: Error) -> None:
    """Row W11: the eight of the specification, whatever the host says."""
    assert nbd_error(OSError(number, "text")) == error


@pytest.mark.parametrize("flags, error", [(FAST_ZERO, ENOTSUP), (0, EINVAL), (FUA, EINVAL)])
async def test_only_fast_zero_is_not_supported(path: Path, flags: int, error: int) -> None:
    """Row W10: ENOTSUP says nothing to who did not ask for FAST_ZERO."""
    node = await open_image(path, format="raw")
    export = Export("", node, contexts={})
    commands = Commands(
        export, negotiated(export, Mode.SIMPLE, {}), dialect(structured=False, extended=False)
    )
    request = Request(flags, WRITE_ZEROES, 1, 0, 512)
    reply = commands.refusal(request, OSError(errno.EOPNOTSUPP, "text"))
    assert int.from_bytes(reply[4:8], "big") == error
    await node.close()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


async def test_a_full_disk(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """In one batch, the write that fails is the one that is told so; the log names the file."""
    async with talk_of(path, engine) as (talk, _):
        os.truncate(path, 4096)
        client = talk.client
        with largest_file(8192):
            await client.send(
                client.request(WRITE, 0, payload=b"fits", cookie=1),
                client.request(WRITE, 16384, payload=b"does not", cookie=2),
                client.request(WRITE, 100, payload=b"fits", cookie=3, flags=FUA),
            )
            await client.all_replies()
        assert [client.replies[cookie].error for cookie in (1, 2, 3)] == [0, ENOSPC, 0]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "NBD_CMD_WRITE 16384+8" in record.getMessage()
    assert str(path) in record.getMessage()
    assert content(path)[100:104] == b"fits"


async def test_a_flush_that_fails(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """From then on no write and no flush succeeds, on this connection or the next; reads do."""
    async with talk_of(path, engine) as (talk, node):
        kept = os.dup(node.file.fd)
        reading, writing = os.pipe()
        os.dup2(writing, node.file.fd)  # a pipe cannot be flushed
        assert (await talk.client.ask(FLUSH)).error in (EIO, EINVAL)
        os.dup2(kept, node.file.fd)
        for fd in (kept, reading, writing):
            os.close(fd)
        for connection in (talk.client, None):
            async with talking(node, Mode.STRUCTURED) as another:
                client = connection or another.client
                for reply in (
                    await client.ask(FLUSH),
                    await client.ask(WRITE, 0, payload=b"x"),
                    await client.ask(WRITE, 0, payload=b"x", flags=FUA),
                    await client.ask(TRIM, 0, 4096),
                    await client.ask(WRITE_ZEROES, 0, 4096),
                ):
                    assert reply.error == EIO
                    assert "an earlier flush failed" in reply.message
                assert (await client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
    assert content(path) == BYTES


async def test_a_defect_is_an_error_like_others(
    path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """EIO for the peer, a traceback for us, and the connection lives on."""
    async with talk_of(path, engine) as (talk, node):

        async def defect(*args: Any, **kwargs: Any) -> Runs:
            raise ZeroDivisionError

        node.layer = defect  # type: ignore[method-assign]
        reply = await talk.client.ask(BLOCK_STATUS, 0, 4096)
        assert (reply.error, reply.message) == (EIO, "internal error")
        node.pwrite_batch = defect  # type: ignore[assignment]
        assert (await talk.client.ask(WRITE, 0, payload=b"x")).error == EIO
        assert (await talk.client.ask(READ, 0, 16)).data(0, 16) == BYTES[:16]
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("command", [READ, BLOCK_STATUS])
async def test_a_bad_cluster_does_not_fill_the_log(
    tmp_path: Path, engine: WatchedEngine, caplog: pytest.LogCaptureFixture, command: int
) -> None:
    """However often it is asked for, on however many connections."""
    path = tmp_path / "bad.qcow2"
    image = Image(size=SIZE, clusters={0: Data(b"lies at an odd place")})
    image.write(path)
    with path.open("r+b") as file:
        file.seek(40)
        l1_table = int.from_bytes(file.read(8), "big")
        file.seek(l1_table)
        file.write((1 << 63 | 0x10200).to_bytes(8, "big"))
    async with talk_of(path, engine, format="qcow2", read_only=True) as (_, node):
        export = Export("", node, contexts=standard_contexts(depth=False, bitmaps=()))
        for _ in range(3):
            async with talking(node, Mode.STRUCTURED, export=export) as talk:
                for n in range(100):
                    assert (await talk.client.ask(command, n * 512, 512)).error == EIO
    said = [record.getMessage() for record in caplog.records]
    assert len(said) <= 2  # what the image says of its damage, and what could not be done then
    assert all(str(path) in line for line in said)


async def test_a_guarded_sector(path: Path, engine: WatchedEngine) -> None:
    """EPERM, with a reason that a person can act on."""
    async with talk_of(path, engine, format=None) as (talk, _):
        reply = await talk.client.ask(WRITE, 0, payload=b"QFI\xfb\0\0\0\3")
        assert reply.error == EPERM
        assert "-f raw" in reply.message
    assert content(path) == BYTES


# FUA, zeroes, trim, cache ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, flags, calls",
    [
        (FLUSH, 0, ["_sync"]),
        (FLUSH, FUA, ["_sync"]),
        (READ, 0, []),
        (READ, FUA, ["_sync"]),
        (TRIM, 0, ["_fallocate_errno"]),
        (TRIM, FUA, ["_fallocate_errno", "_sync"]),
        (WRITE_ZEROES, 0, ["_fallocate_errno"]),
        (WRITE_ZEROES, FUA, ["_fallocate_errno", "_sync"]),
        (CACHE, FUA, ["will_need"]),
        (BLOCK_STATUS, FUA, ["data_runs"]),
    ],
)
async def test_fua(
    path: Path, engine: WatchedEngine, command: int, flags: int, calls: list[str]
) -> None:
    """What goes to the pool, in its order."""
    async with talk_of(path, engine) as (talk, _):
        where = (0, 0) if command == FLUSH else (0, 8192)
        assert not (await talk.client.ask(command, *where, flags=flags)).error
        assert engine.calls == calls


async def test_fua_writes_are_flushed(path: Path, engine: WatchedEngine) -> None:
    async with talk_of(path, engine) as (talk, _):
        assert not (await talk.client.ask(WRITE, 0, payload=b"x", flags=FUA)).error
        assert engine.calls == ["_write_batch", "_sync"]


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
async def test_zeroes_and_holes(path: Path, engine: WatchedEngine, mode: Mode) -> None:
    """W8: without NO_HOLE the host may get its space back, with it the space stays."""
    async with talk_of(path, engine, mode=mode) as (talk, node):
        client = talk.client
        before = node.file.allocated_size()
        assert not (await client.ask(WRITE_ZEROES, 0, 1 << 17, flags=NO_HOLE)).error
        assert node.file.allocated_size() == before
        assert not (await client.ask(WRITE_ZEROES, 1 << 17, 1 << 17)).error
        assert node.file.allocated_size() < before
        assert not (await client.ask(TRIM, 1 << 18, 1 << 17)).error
        data = (await client.ask(READ, 0, SIZE)).data(0, SIZE)
        assert data == bytes(3 << 17) + BYTES[3 << 17 :]


async def test_an_export_that_gives_no_space_back(path: Path, engine: WatchedEngine) -> None:
    """TRIM succeeds and does nothing; zeroes keep their space."""
    node = await open_image(path, format="raw", read_only=False, engine=engine)
    export = Export("", node, contexts={}, unmap=False)
    commands = Commands(
        export,
        negotiated(export, Mode.STRUCTURED, {}),
        dialect(structured=True, extended=False),
    )
    before = node.file.allocated_size()
    engine.calls.clear()
    await commands.serve(Request(0, TRIM, 1, 0, 1 << 17))
    assert engine.calls == []
    await commands.serve(Request(0, WRITE_ZEROES, 2, 1 << 17, 1 << 17))
    assert node.file.allocated_size() == before
    await node.close()
    assert content(path) == BYTES[: 1 << 17] + bytes(1 << 17) + BYTES[1 << 18 :]


@pytest.mark.parametrize("flags, error", [(FAST_ZERO, ENOTSUP), (0, 0)])
async def test_fast_zero(path: Path, engine: WatchedEngine, flags: int, error: int) -> None:
    """W9: told before anything is touched; only where FAST_ZERO asks is it ENOTSUP."""
    async with talk_of(path, engine) as (talk, node):

        async def unable(*args: Any) -> bool:
            return False

        node.file.fallocate = unable  # type: ignore[method-assign, assignment]
        reply = await talk.client.ask(WRITE_ZEROES, 5, 8192, flags=flags)
        assert reply.error == error
    expected = BYTES if error else BYTES[:5] + bytes(8192) + BYTES[8197:]
    assert content(path) == expected


async def test_requests_of_no_bytes(path: Path, engine: WatchedEngine) -> None:
    """Rows B11 and B12: they succeed, and nothing happens."""
    async with talk_of(path, engine) as (talk, _):
        for command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE):
            for offset in (0, 77, SIZE):
                assert not (await talk.client.ask(command, offset, 0)).error, command
        assert set(engine.calls) <= {"_write_batch"}
    assert content(path) == BYTES


# Chunks ------------------------------------------------------------------------------------------


async def test_chunks_of_a_sparse_read(tmp_path: Path, engine: WatchedEngine) -> None:
    """Rows R1 to R5: as few chunks as there are stretches of data and of zeroes; with DF one."""
    from_qcow2 = tmp_path / "disk.qcow2"
    clusters: dict[int, Any] = {0: Data(b"a"), 1 << 16: Data(b"b"), 1 << 18: Compressed(b"c")}
    clusters |= {(1 << 18) + (1 << 16): Zero(), 1 << 19: Data(b"d")}
    Image(size=SIZE, clusters=clusters).write(from_qcow2)
    async with talk_of(from_qcow2, engine, format=None, read_only=True) as (talk, _):
        sparse = await talk.client.ask(READ, 10, SIZE - 20)
        whole = await talk.client.ask(READ, 10, SIZE - 20, flags=DF)
        assert [(at, length, data is None) for at, length, data in sparse.pieces] == [
            (10, (1 << 17) - 10, False),
            (1 << 17, 1 << 17, True),
            (1 << 18, 1 << 16, False),
            ((1 << 18) + (1 << 16), (1 << 18) - (1 << 16), True),
            (1 << 19, 1 << 16, False),
            ((1 << 19) + (1 << 16), SIZE - 10 - (1 << 19) - (1 << 16), True),
        ]
        assert len(whole.pieces) == 1
        assert sparse.data(10, SIZE - 20) == whole.data(10, SIZE - 20)


async def test_a_last_cluster_that_the_file_cuts_short(
    tmp_path: Path, engine: WatchedEngine
) -> None:
    """Past the end of a qcow2 file there are zeroes, also in the middle of a page."""
    path = tmp_path / "short.qcow2"
    written = Image(size=SIZE, clusters={0: Data(b"\x55" * (1 << 16))}).write(path)
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(written.entry_offset(0))
        place = (end + 0xFFFF) & ~0xFFFF
        file.write((1 << 63 | place).to_bytes(8, "big"))
        file.seek(place)
        file.write(b"\x55" * 60_000)
    for mode in Mode:
        async with talk_of(path, engine, mode=mode, format=None, read_only=True) as (talk, _):
            reply = await talk.client.ask(READ, 0, 1 << 16)
            assert reply.data(0, 1 << 16) == b"\x55" * 60_000 + bytes(5536)
