"""TracedStream does what Stream does, and tells exactly what has passed.

All tests of `test_stream` run here again, on a traced stream; how messages are told is the business
of `tests/protocol/test_trace.py`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from struct import pack

import pytest

from pynbd.block.chain import open_image
from pynbd.protocol.transmission import StructuredReplies
from pynbd.server.buffers import BufferPool
from pynbd.server.connection import Connection
from pynbd.server.contexts import standard_contexts
from pynbd.server.export import Export, ExportTable
from pynbd.server.limits import Limits
from pynbd.server.stream import FilePiece, ReplyEnd
from pynbd.server.tracing import TracedStream
from tests.server import test_stream
from tests.server.session import DF, READ, WRITE, Client, Mode, open_files
from tests.server.test_connection import OPENING
from tests.server.test_stream import *  # noqa: F403

GREETING = b"NBDMAGICIHAVEOPT\0\3"
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _traced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(test_stream, "Stream", TracedStream)
    caplog.set_level(logging.DEBUG, "pynbd.trace")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was told, without the name of the one connection."""
    records = [record for record in caplog.records if record.name == "pynbd.trace"]
    (name,) = {record.__dict__["trace"]["connection"] for record in records}
    return [record.getMessage().removeprefix(f"{name} ") for record in records]


@asynccontextmanager
async def talking(tmp_path: Path, *, trace: bool) -> AsyncIterator[socket.socket]:
    """A connection that serves a disk; the other end of its socket."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(1, 129)) * (SIZE // 128))
    before = open_files()
    node = await open_image(path, format="raw", read_only=False)
    exports = ExportTable([Export("x", node, contexts=standard_contexts(depth=True, bitmaps=()))])
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    running = asyncio.create_task(
        Connection(ours, exports, BufferPool(), Limits(), trace=trace).run()
    )
    try:
        yield theirs
    finally:
        theirs.close()
        await asyncio.wait_for(running, 5)
        await node.close()
    assert open_files() == before


async def hear(sock: socket.socket, end: bytes) -> None:
    heard = b""
    while not heard.endswith(end):
        heard += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 5)


ACKNOWLEDGED = pack(">QIII", 0x3E889045565A9, 7, 1, 0)


async def session(sock: socket.socket) -> None:
    """Negotiation with an option that is skipped, then reads of all kinds and a write."""
    await hear(sock, GREETING)
    skipped = b"IHAVEOPT" + pack(">II", 99, 100_000) + bytes(100_000)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, OPENING[:4] + skipped + OPENING[4:])
    await hear(sock, ACKNOWLEDGED)
    client = Client(sock, Mode.EXTENDED)
    await client.ask(READ, 0, 512)
    await client.ask(READ, 0, SIZE, flags=DF)
    await client.ask(WRITE, 4096, 300_000, payload=bytes(300_000))
    await client.ask(READ, SIZE, 1)


async def test_a_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with talking(tmp_path, trace=True) as sock:
        await session(sock)
    lines = told(caplog)
    opening = ["< NBDMAGIC", "> client", "> 0x63 length 100000", "< NBD_REP_ERR_UNSUP"]
    assert all(map(str.startswith, lines, opening))
    done = lines.index("< NBD_REP_ACK option NBD_OPT_GO") + 1
    assert lines[done:] == [
        "> NBD_CMD_READ cookie 0x1 offset 0 length 512",
        "< NBD_REPLY_TYPE_OFFSET_DATA NBD_REPLY_FLAG_DONE cookie 0x1 offset 0 length 512",
        "> NBD_CMD_READ NBD_CMD_FLAG_DF cookie 0x2 offset 0 length 1048576",
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x2 offset 0 length 1048576",
        "< NBD_REPLY_TYPE_NONE NBD_REPLY_FLAG_DONE cookie 0x2",
        "> NBD_CMD_WRITE NBD_CMD_FLAG_PAYLOAD_LEN cookie 0x3 offset 4096 length 300000",
        "< NBD_REPLY_TYPE_NONE NBD_REPLY_FLAG_DONE cookie 0x3",
        "> NBD_CMD_READ cookie 0x4 offset 1048576 length 1",
        lines[-1],
    ]
    error = "< NBD_REPLY_TYPE_ERROR NBD_REPLY_FLAG_DONE cookie 0x4 error NBD_EINVAL text "
    assert lines[-1].startswith(error)


async def test_what_a_record_carries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with talking(tmp_path, trace=True) as sock:
        await session(sock)
    read = next(record for record in caplog.records if "NBD_CMD_READ" in record.getMessage())
    trace = read.__dict__["trace"]
    assert read.levelno == logging.DEBUG
    assert trace["connection"].startswith("a local client #")
    assert trace["direction"] == "to server"
    assert trace["nbd"] == {"message": "NBD_CMD_READ", "cookie": "0x1", "offset": 0, "length": 512}


async def test_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with talking(tmp_path, trace=False) as sock:
        await session(sock)
    assert not [record for record in caplog.records if record.name == "pynbd.trace"]


async def test_garbage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told, and the client is treated as ever: the connection ends."""
    async with talking(tmp_path, trace=True) as sock:
        await hear(sock, GREETING)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, pack(">I", 3) + b"GET / HTTP/1.0\r\n")
        assert await asyncio.wait_for(loop.sock_recv(sock, 1), 5) == b""
    assert told(caplog)[2:] == [
        "> undecodable, and so is the rest reason 'no option and no request begins with 0x47455420'"
    ]


@pytest.mark.parametrize("small", [False, True])
async def test_the_end_that_a_reply_gets(
    file: int, small: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a file fails, what is told is the error, not the success that was meant."""
    replies = StructuredReplies()
    size = len(test_stream.DATA)
    async with test_stream.connected(small) as (stream, peer):
        await stream.write(GREETING)
        for cookie, at in (1, 0), (2, size - 1000):
            head = replies.data(cookie, 0, at, 5000)
            end = ReplyEnd(replies.done(cookie, 0), replies.error(cookie, 0, 5, "it ends"))
            stream.send([head, FilePiece(file, at, 5000, end), end])
        await test_stream.received(peer, 18 + 2 * (28 + 5000) + 20 + 33)
    assert told(caplog)[1:] == [
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x1 offset 0 length 5000",
        "< NBD_REPLY_TYPE_NONE NBD_REPLY_FLAG_DONE cookie 0x1",
        f"< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x2 offset {size - 1000} length 5000",
        "< NBD_REPLY_TYPE_ERROR NBD_REPLY_FLAG_DONE cookie 0x2 error NBD_EIO text 'it ends'",
    ]
