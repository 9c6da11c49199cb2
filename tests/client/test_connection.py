"""Client against the server of this package, and against servers that a test plays."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pynbd
from pynbd import (
    Export,
    ExportTable,
    OptionError,
    ProtocolError,
    RequestError,
    Server,
    UnsupportedFeature,
    UsageError,
    listen_unix,
    open_image,
    standard_contexts,
)
from pynbd.block.qcow2 import builder
from pynbd.client import negotiation
from pynbd.client.connecting import connect, list_exports
from pynbd.client.connection import Client
from tests.client.playing import (
    ACK,
    CACHE,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FAST_ZERO,
    FLUSH,
    FUA,
    HAS_FLAGS,
    LIST,
    PAYLOAD,
    READ_ONLY,
    REQUEST,
    STARTTLS,
    STRUCTURED_REPLY,
    TRIM,
    ZEROES,
    negotiate,
    playing,
    receive,
    reply,
    until_closed,
)

MIB = 1 << 20
CLUSTER = 1 << 16
DIALECTS: dict[str, dict[str, bool]] = {
    "simple": {"structured": False, "extended": False},
    "structured": {"extended": False},
    "extended": {},
}
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
with_chunks = pytest.mark.parametrize(
    "dialect", [DIALECTS["structured"], DIALECTS["extended"]], ids=["structured", "extended"]
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, 5 << 30)
    return path


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """Data, zero, unallocated, data; the last two clusters are dirty in ``b``."""
    data = builder.Data(b"\1" * CLUSTER)
    image = builder.Image(
        size=4 * CLUSTER,
        clusters={0: data, CLUSTER: builder.Zero(), 3 * CLUSTER: data},
        bitmaps=[builder.Bitmap("b", granularity=CLUSTER, dirty=[(2 * CLUSTER, 2 * CLUSTER)])],
    )
    image.write(tmp_path / "layered.qcow2")
    return tmp_path / "layered.qcow2"


# Against our server


@every_dialect
async def test_what_is_written_is_read(image: Path, dialect: dict[str, bool]) -> None:
    async with (
        pynbd.serve(image, format="raw") as server,
        connect(server.uri, **dialect) as client,
    ):
        assert (client.size, client.read_only) == (5 << 30, False)
        assert client.extended == (not dialect)
        await client.pwrite(MIB - 1, b"hello")
        await client.pwrite(2 * MIB, memoryview(b"\xaa" * MIB), fua=True)
        assert await client.pread(MIB - 2, 7) == b"\0hello\0"
        await client.write_zeroes(2 * MIB, 4096, no_hole=True, fua=True)
        await client.trim(2 * MIB + 8192, 4096, fua=True)
        await client.cache(0, 3 * MIB)
        await client.flush()
        view = bytearray(20)
        await client.pread_into(2 * MIB + 4090, view)
        assert view == bytes(6) + b"\xaa" * 14
        assert await client.pread(0, 0) == b""
    with image.open("rb") as file:
        assert os.pread(file.fileno(), 7, MIB - 2) == b"\0hello\0"


@every_dialect
async def test_what_is_longer_than_a_request_is_split(
    image: Path, dialect: dict[str, bool]
) -> None:
    """Payloads above the maximum of 32 MiB, and lengths of more than 32 bits."""
    payload = hashlib.shake_128(b"split").digest(33 * MIB + 5)
    async with (
        pynbd.serve(image, format="raw") as server,
        connect(server.uri, **dialect) as client,
    ):
        await client.pwrite(7, payload)
        assert await client.pread(7, len(payload)) == payload
        await client.write_zeroes(0, 5 << 30)
        await client.trim(0, 5 << 30)
        await client.cache(0, 5 << 30)
        assert not any(await client.pread(7, MIB))


@every_dialect
async def test_many_requests_at_once(image: Path, dialect: dict[str, bool]) -> None:
    """Also on several connections; each coroutine has its own answer."""
    async with (
        pynbd.serve(image, format="raw") as server,
        connect(server.uri, **dialect) as one,
        connect(server.uri, **dialect) as two,
    ):
        blocks = [hashlib.shake_128(bytes([n])).digest(4096 * (1 + n % 40)) for n in range(200)]
        await asyncio.gather(*(one.pwrite(n * MIB, block) for n, block in enumerate(blocks)))
        views = [bytearray(len(block)) for block in blocks]
        pending = [two.start_read(n * MIB, view) for n, view in enumerate(views)]
        read = await asyncio.gather(
            *(one.pread(n * MIB, len(block)) for n, block in enumerate(blocks))
        )
        for each in pending:
            await each
        assert read == views == blocks


@every_dialect
async def test_an_export_of_no_bytes(tmp_path: Path, dialect: dict[str, bool]) -> None:
    (tmp_path / "empty.raw").touch()
    async with (
        pynbd.serve(tmp_path / "empty.raw", format="raw") as server,
        connect(server.uri, contexts=["base:"], **dialect) as client,
    ):
        assert await client.pread(0, 0) == b""
        await client.pwrite(0, b"")
        await client.write_zeroes(0, 0)
        await client.trim(0, 0)
        await client.flush()
        with pytest.raises(RequestError, match="the export, which has 0 bytes"):
            await client.pread(0, 1)
        if client.contexts:
            with pytest.raises(RequestError, match="the status of no bytes"):
                await client.block_status(0, 0)


@with_chunks
async def test_block_status(layered: Path, dialect: dict[str, bool]) -> None:
    bitmap = "qemu:dirty-bitmap:b"
    async with (
        pynbd.serve(layered) as server,
        connect(server.uri, contexts=["base:", "qemu:"], **dialect) as client,
    ):
        assert set(client.contexts) == {"base:allocation", "qemu:allocation-depth", bitmap}
        answers = await client.block_status(0, client.size)
        assert {name: list(status) for name, status in answers.items()} == {
            "base:allocation": [(CLUSTER, 0), (2 * CLUSTER, 3), (CLUSTER, 0)],
            "qemu:allocation-depth": [(2 * CLUSTER, 1), (CLUSTER, 0), (CLUSTER, 1)],
            bitmap: [(2 * CLUSTER, 0), (2 * CLUSTER, 1)],
        }
        some = await client.block_status(CLUSTER, 100, contexts=[bitmap])
        assert {name: list(status) for name, status in some.items()} == {bitmap: [(100, 0)]}
        one = await client.block_status(0, client.size, contexts=[bitmap], req_one=True)
        assert list(one[bitmap]) == [(2 * CLUSTER, 0)]
        with pytest.raises(UnsupportedFeature, match="'x:y' was not negotiated"):
            await client.block_status(0, 512, contexts=["x:y"])


async def test_a_status_beyond_32_bits(image: Path) -> None:
    async with pynbd.serve(image, format="raw") as server:
        for dialect, most in ((DIALECTS["structured"], 2**32 - 1), (DIALECTS["extended"], 5 << 30)):
            async with connect(server.uri, contexts=["base:allocation"], **dialect) as client:
                answers = await client.block_status(0, 5 << 30)
                (length, flags), *more = answers["base:allocation"]
                assert not more
                assert flags == 3
                assert 1 << 31 < length <= most


async def test_only_the_contexts_that_there_are(layered: Path) -> None:
    async with pynbd.serve(layered, bitmaps=[], depth=False) as server:
        asked = ["qemu:dirty-bitmap:b", "base:allocation", "x-other:"]
        async with await Client.open(server.uri, contexts=asked) as client:
            assert client.contexts == ("base:allocation",)
        async with connect(server.uri, contexts=asked[1:]) as client:
            assert client.contexts == ("base:allocation",)
        there = "'qemu:dirty-bitmap:b'; of those asked for there are: base:allocation"
        with pytest.raises(UnsupportedFeature, match=there):
            await connect(server.uri, contexts=asked).__aenter__()
        async with connect(server.uri) as client:
            assert client.contexts == ()
            with pytest.raises(UnsupportedFeature, match="no metadata context was negotiated"):
                await client.block_status(0, 512)


async def test_what_is_listed(layered: Path, image: Path, tmp_path: Path) -> None:
    nodes = [await open_image(str(layered)), await open_image(str(image), format="raw")]
    first, second = nodes
    exports = [
        Export("größe", first, contexts=standard_contexts(depth=False, bitmaps=first.bitmaps())),
        Export(
            "b",
            second,
            description="the second",
            contexts=standard_contexts(depth=False, bitmaps=[]),
        ),
    ]
    path = str(tmp_path / "s")
    server = Server(ExportTable(exports), [listen_unix(path)])
    running = asyncio.create_task(server.run())
    try:
        one, two = await list_exports(f"nbd+unix:///?socket={path}")
        assert (one.name, one.size, two.name, two.size) == ("größe", 4 * CLUSTER, "b", 5 << 30)
        assert one.contexts == ("base:allocation", "qemu:dirty-bitmap:b")
        assert (one.description, two.description) == ("", "the second")
        async with connect(f"nbd+unix:///b?socket={path}") as client:
            assert client.info.description == "the second"
        with pytest.raises(OptionError, match=r"s: NBD_OPT_GO: NBD_REP_ERR_UNKNOWN: .*'c'"):
            await Client.open(f"nbd+unix:///c?socket={path}")
    finally:
        server.stop()
        await running
        for node in nodes:
            await node.close()


async def test_over_tcp(image: Path) -> None:
    async with (
        pynbd.serve(image, format="raw", port=0) as server,
        connect(server.uri) as client,
    ):
        await client.pwrite(0, b"x" * MIB)
        assert await client.pread(MIB - 5, 10) == b"x" * 5 + bytes(5)


async def test_an_end_in_good_order(image: Path) -> None:
    """A second close does nothing; what comes later fails, and what is under way as well."""
    async with pynbd.serve(image, format="raw") as server:
        client = await Client.open(server.uri)
        reading = asyncio.ensure_future(client.pread(0, 64 * MIB))
        await asyncio.sleep(0)
        await asyncio.gather(client.close(), client.close())
        await client.close()
        with pytest.raises(ConnectionAbortedError, match="the connection was closed"):
            await reading
        with pytest.raises(ConnectionAbortedError):
            await client.flush()


async def test_a_cancelled_read_harms_nobody(image: Path) -> None:
    async with (
        pynbd.serve(image, format="raw") as server,
        connect(server.uri) as client,
    ):
        await client.pwrite(0, b"y" * MIB)
        view = bytearray(MIB)
        reading = asyncio.ensure_future(client.pread_into(0, view))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await client.pread(MIB - 1, 2) == b"y\0"
        assert not any(view)


# What is not even sent


FULL = HAS_FLAGS | FLUSH | FUA | TRIM | ZEROES | CACHE | FAST_ZERO
Deed = Callable[[Client], Any]


@pytest.mark.parametrize(
    "missing,deed,text",
    [
        (FLUSH, lambda c: c.flush(), "offer NBD_CMD_FLUSH: no NBD_FLAG_SEND_FLUSH"),
        (TRIM, lambda c: c.trim(0, 512), "offer NBD_CMD_TRIM: no NBD_FLAG_SEND_TRIM"),
        (CACHE, lambda c: c.cache(0, 512), "offer NBD_CMD_CACHE: no NBD_FLAG_SEND_CACHE"),
        (ZEROES, lambda c: c.write_zeroes(0, 512), "no NBD_FLAG_SEND_WRITE_ZEROES"),
        (FUA, lambda c: c.pwrite(0, b"x" * 512, fua=True), "no NBD_FLAG_SEND_FUA"),
        (
            FAST_ZERO,
            lambda c: c.write_zeroes(0, 512, fast_zero=True),
            "NBD_CMD_WRITE_ZEROES NBD_CMD_FLAG_FAST_ZERO: no NBD_FLAG_SEND_FAST_ZERO",
        ),
    ],
)
async def test_what_the_server_does_not_offer(missing: int, deed: Deed, text: str) -> None:
    said: list[bytes] = []

    def play(sock: socket.socket) -> None:
        negotiate(sock, flags=FULL & ~missing)
        said.append(until_closed(sock))

    with playing(play) as uri:
        async with connect(uri) as client:
            with pytest.raises(UnsupportedFeature, match=text):
                await deed(client)
    assert said == [REQUEST.pack(0x25609513, 0, 2, 1, 0, 0)]  # NBD_CMD_DISC


@pytest.mark.parametrize(
    "deed,number,text",
    [
        (lambda c: c.pread(0, MIB + 4096), errno.EINVAL, "READ 0.1052672: outside .* 1048576"),
        (lambda c: c.pwrite(MIB, b"x" * 4096), errno.ENOSPC, "outside the export"),
        (lambda c: c.pread(-4096, 4096), errno.EINVAL, "outside the export"),
        (lambda c: c.pread(0, 1 << 62), errno.EINVAL, "outside the export"),
        (lambda c: c.pread(4096, -4096), errno.EINVAL, "outside the export"),
        (lambda c: c.trim(MIB, 4096), errno.EINVAL, "outside the export"),
        (lambda c: c.pread(512, 4096), errno.EINVAL, "not a multiple of the block size 4096"),
        (lambda c: c.cache(0, 512), errno.EINVAL, "not a multiple of the block size 4096"),
        (lambda c: c.pwrite(0, b"x" * 4096), errno.EPERM, "WRITE 0.4096: the export is read-only"),
        (lambda c: c.write_zeroes(0, 4096), errno.EPERM, "read-only"),
        (lambda c: c.trim(0, 4096), errno.EPERM, "read-only"),
    ],
)
async def test_what_the_export_cannot_have(deed: Deed, number: int, text: str) -> None:
    flags = FULL | READ_ONLY if "read-only" in text else FULL

    def play(sock: socket.socket) -> None:
        negotiate(sock, flags=flags, block_size=(4096, 4096, MIB))
        assert len(until_closed(sock)) == REQUEST.size

    with playing(play) as uri:
        async with connect(uri) as client:
            with pytest.raises(RequestError, match=text) as caught:
                await deed(client)
            assert caught.value.error == number


async def test_payloads_are_as_long_as_the_server_allows_in_whole_blocks() -> None:
    lengths: list[int] = []

    def play(sock: socket.socket) -> None:
        negotiate(sock, block_size=(4096, 4096, 10000), size=20480)
        for _ in range(3):
            _, _, _, cookie, _, length = REQUEST.unpack(receive(sock, REQUEST.size))
            lengths.append(length)
            sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(length))
        until_closed(sock)

    with playing(play) as uri:
        async with connect(uri) as client:
            await client.pread(0, 20480)
    assert lengths == [8192, 8192, 4096]


# Servers that fail


@pytest.mark.parametrize("uri", ["http://localhost/", "nbd+unix:///", "nbd://localhost:0/"])
async def test_no_uri(uri: str) -> None:
    with pytest.raises(UsageError):
        await Client.open(uri)


async def test_a_server_that_refuses_tls() -> None:
    """Nothing goes on in clear."""

    def play(sock: socket.socket) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        receive(sock, 4 + 16)
        sock.sendall(reply(STARTTLS, 0x80000002))  # NBD_REP_ERR_POLICY
        assert receive(sock, 16) == b"IHAVEOPT\0\0\0\2\0\0\0\0"  # NBD_OPT_ABORT
        until_closed(sock)

    text = "NBD_OPT_STARTTLS: NBD_REP_ERR_POLICY"
    with playing(play) as uri, pytest.raises(OptionError, match=text):
        await Client.open(uri.replace("nbd+", "nbds+"))


async def test_nobody_listens(tmp_path: Path) -> None:
    missing = f"nbd+unix:///?socket={tmp_path}/none"
    with pytest.raises(FileNotFoundError) as caught:
        await Client.open(missing)
    assert caught.value.filename == missing
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        await list_exports(f"nbd://127.0.0.1:{port}")


async def test_a_server_that_does_not_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiation, "HANDSHAKE_LIMIT", 0.05)
    with playing(until_closed) as uri, pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        await Client.open(uri)


async def test_a_server_that_speaks_something_else() -> None:
    with (
        playing(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")) as uri,
        pytest.raises(ProtocolError, match=r"x.socket=.*: malformed Greeting"),
    ):
        await Client.open(uri)


async def test_an_export_name_that_an_old_server_does_not_have() -> None:
    def play(sock: socket.socket) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT\0\0")
        option, length = struct.unpack(">4x8xII", receive(sock, 20))
        assert (option, length) == (EXPORT_NAME, 1)
        receive(sock, 1)

    text = "the server closed the connection during negotiation"
    with playing(play) as uri, pytest.raises(ConnectionResetError, match=text):
        await Client.open(uri)


async def test_a_server_that_requires_tls() -> None:
    def play(sock: socket.socket) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        receive(sock, 4 + 16)
        sock.sendall(reply(EXTENDED_HEADERS, 0x80000005))  # NBD_REP_ERR_TLS_REQD
        until_closed(sock)

    text = r"TLS_REQD \(nbds\+unix://\.\.\. begins a URI with TLS\)"
    with playing(play) as uri, pytest.raises(OptionError, match=text):
        await Client.open(uri)


async def test_a_refused_listing() -> None:
    def play(sock: socket.socket) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        receive(sock, 4)
        for option, kind in ((EXTENDED_HEADERS, ACK), (LIST, 0x80000002)):
            receive(sock, 16)
            sock.sendall(reply(option, kind))
        assert receive(sock, 16) == b"IHAVEOPT" + struct.pack(">II", 2, 0)  # NBD_OPT_ABORT

    with playing(play) as uri, pytest.raises(OptionError, match="NBD_REP_ERR_POLICY"):
        await list_exports(uri)


async def test_the_servers_errors_and_words() -> None:
    def play(sock: socket.socket) -> None:
        negotiate(sock, grants=(STRUCTURED_REPLY,))
        cookie = REQUEST.unpack(receive(sock, REQUEST.size))[3]
        said = struct.pack(">IH", 28, 9) + b"disk\nfull"
        sock.sendall(struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, cookie, len(said)) + said)
        until_closed(sock)

    with playing(play) as uri:
        async with connect(uri) as client:
            with pytest.raises(RequestError) as caught:
                await client.pread(512, 1024)
            assert caught.value.error == errno.ENOSPC
            assert str(caught.value) == f"{uri}: NBD_CMD_READ 512+1024: NBD_ENOSPC: disk full"


async def test_a_part_that_fails_fails_the_whole() -> None:
    """All parts are answered before the error is raised, and the connection goes on."""

    def play(sock: socket.socket) -> None:
        negotiate(sock, block_size=(1, 4096, 4096))
        for number in range(4):
            _, _, _, cookie, _, length = REQUEST.unpack(receive(sock, REQUEST.size))
            error = errno.EIO if number == 1 else 0
            data = b"" if error else b"z" * length
            sock.sendall(struct.pack(">IIQ", 0x67446698, error, cookie) + data)
        until_closed(sock)

    with playing(play) as uri:
        async with connect(uri) as client:
            view = bytearray(3 * 4096)
            with pytest.raises(RequestError, match=r"NBD_CMD_READ 4096.4096: NBD_EIO$"):
                await client.pread_into(0, view)
            assert view == b"z" * 4096 + bytes(4096) + b"z" * 4096
            assert await client.pread(0, 2) == b"zz"


async def test_a_filter_is_sent_only_where_the_server_knows_it() -> None:
    """NBD_FLAG_BLOCK_STATUS_PAYLOAD, in either state, with two contexts of which one is wanted."""
    contexts = (b"a:x", b"b:y")
    lengths: list[tuple[int, int]] = []

    def play(flags: int, sock: socket.socket) -> None:
        negotiate(sock, grants=(EXTENDED_HEADERS,), flags=flags, contexts=contexts)
        head = struct.unpack(">IHHQQQ", receive(sock, 32))
        _, words, _, cookie, offset, length = head
        lengths.append((words, length))
        payload = receive(sock, length) if words else b""
        assert payload in (b"", struct.pack(">QI", 4096, 1))
        for id_ in (1,) if payload else (0, 1):
            said = struct.pack(">IIQQ", id_, 1, 4096, id_)
            chunk = struct.pack(">IHHQQQ", 0x6E8A278C, id_ == 1, 6, cookie, offset, len(said))
            sock.sendall(chunk + said)
        until_closed(sock)

    for flags in (HAS_FLAGS, HAS_FLAGS | PAYLOAD):
        with playing(lambda sock, flags=flags: play(flags, sock)) as uri:
            async with connect(uri, contexts=["a:x", "b:y"]) as client:
                answers = await client.block_status(0, 4096, contexts=["b:y"])
                assert [(name, list(each)) for name, each in answers.items()] == [
                    ("b:y", [(4096, 1)])
                ]
    assert lengths == [(0, 4096), (1 << 5, 12)]


@pytest.mark.parametrize("begun", [0, 10, 16, 100])
async def test_a_lost_connection(begun: int) -> None:
    """In the middle of a reply, at its edge, before it: whatever is under way fails, and whatever
    comes later."""

    def play(sock: socket.socket) -> None:
        negotiate(sock)
        _, _, _, cookie, _, _ = REQUEST.unpack(receive(sock, REQUEST.size))
        sock.sendall((struct.pack(">IIQ", 0x67446698, 0, cookie) + bytes(512))[:begun])
        receive(sock, 2 * REQUEST.size)

    with playing(play) as uri:
        client = await Client.open(uri)
        answers = await asyncio.gather(
            *(client.pread(at, 512) for at in (0, 512, 1024)), return_exceptions=True
        )
        for answer in answers:
            assert isinstance(answer, ConnectionResetError)
            assert answer.filename == uri
        with pytest.raises(ConnectionResetError, match="the server closed the connection"):
            await client.pread(0, 512)
        await client.close()


async def test_a_connection_that_is_lost_while_writing() -> None:
    def play(sock: socket.socket) -> None:
        negotiate(sock, size=1 << 30)
        receive(sock, 100)

    with playing(play) as uri:
        client = await Client.open(uri)
        with pytest.raises(ConnectionError):
            await client.pwrite(0, bytes(64 * MIB))
        with pytest.raises(ConnectionError):
            await client.pwrite(0, b"x")
        await client.close()


async def test_a_breach_ends_the_connection() -> None:
    """What was answered before is answered; the rest fails."""

    def play(sock: socket.socket) -> None:
        negotiate(sock)
        cookies = [REQUEST.unpack(receive(sock, REQUEST.size))[3] for _ in range(3)]
        good = struct.pack(">IIQ", 0x67446698, 0, cookies[1]) + b"x" * 512
        sock.sendall(good + bytes(16))
        assert until_closed(sock) == b""

    with playing(play) as uri:
        client = await Client.open(uri)
        one, two, three = await asyncio.gather(
            *(client.pread(at, 512) for at in (0, 512, 1024)), return_exceptions=True
        )
        assert two == b"x" * 512
        for answer in (one, three):
            assert isinstance(answer, ProtocolError)
            assert str(answer) == f"{uri}: a reply with the magic number 0x0"
        with pytest.raises(ProtocolError):
            await client.pread(0, 512)
        await client.close()


async def test_a_server_that_reads_nothing_does_not_hold_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pynbd.client.connection._CLOSE_LIMIT", 0.05)

    def play(sock: socket.socket) -> None:
        negotiate(sock, size=1 << 30)
        receive(sock, 100)
        closed.wait(20)

    closed = threading.Event()
    with playing(play) as uri:
        client = await Client.open(uri)
        writing = asyncio.ensure_future(client.pwrite(0, bytes(64 * MIB)))
        await asyncio.sleep(0.02)
        await client.close()
        closed.set()
        with pytest.raises(ConnectionAbortedError):
            await writing


async def test_contexts_are_a_list(image: Path) -> None:
    """A string is one of its letters."""
    async with pynbd.serve(image, format="raw") as server:
        with pytest.raises(UsageError, match="a list of names is expected, not 'base:allocation'"):
            await connect(server.uri, contexts="base:allocation").__aenter__()
        async with connect(server.uri, contexts=["base:allocation"]) as client:
            with pytest.raises(UsageError, match="a list of names is expected"):
                await client.block_status(0, 512, contexts="base:allocation")
            twice = await client.block_status(0, 512, contexts=["base:allocation"] * 2)
            assert list(twice) == ["base:allocation"]
            with pytest.raises(UnsupportedFeature, match=r"'qemu:' .* there is: base:allocation"):
                await client.block_status(0, 512, contexts=["qemu:"])
