"""NbdNode: an export as a node, against the image that is served, and against played servers."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import struct
from pathlib import Path

import pytest

import pynbd
from pynbd.block.extent import DATA, ZERO
from pynbd.block.qcow2 import builder
from pynbd.client.node import NbdNode
from tests.client.playing import (
    EXTENDED_HEADERS,
    HAS_FLAGS,
    MULTI_CONN,
    READ_ONLY,
    REQUEST,
    negotiate,
    playing,
    receive,
    until_closed,
)

MIB = 1 << 20
CLUSTER = 1 << 16
CONTENT = hashlib.shake_128(b"node").digest(MIB)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A MiB of noise, then a hole."""
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    os.truncate(path, 8 * MIB)
    return path


async def test_it_is_what_it_serves(image: Path) -> None:
    async with pynbd.serve(image, format="raw", read_only=True, export_name="disk") as server:
        node = await NbdNode.open(server.uri, connections=3)
        try:
            assert len(node.clients) == 3
            assert (node.name, node.format, node.size) == (server.uri, "raw", 8 * MIB)
            assert (node.read_only, node.file) == (True, None)
            assert await node.pread(MIB - 1000, 2000) == CONTENT[-1000:] + bytes(1000)
            runs = await node.map(1000, 8 * MIB - 1000)
            assert [(start, end, kind) for start, end, kind, _, _ in runs] == [
                (1000, MIB, DATA),
                (MIB, 8 * MIB, ZERO),
            ]
            await node.prefetch(0, MIB)
            (failed,) = await node.pwrite_batch([(0, b"x")])
            assert failed is not None
            assert failed.errno == errno.EROFS
            with pytest.raises(OSError, match="read-only"):
                await node.discard(0, 512)
        finally:
            await node.close()


async def test_a_server_that_takes_fewer_clients(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets the others wait; what is asked goes to those that there are."""
    monkeypatch.setattr("pynbd.client.node._PATIENCE", 0.2)
    async with pynbd.serve(image, format="raw", read_only=True, max_clients=2) as server:
        node = await NbdNode.open(server.uri, connections=4)
        assert len(node.clients) == 2
        assert await node.pread(0, MIB) == CONTENT
        await node.close()
        async with pynbd.connect(server.uri):  # those that were given up take no place
            pass


async def test_a_server_that_takes_one_client_and_goes() -> None:
    def play(sock: socket.socket) -> None:
        os.unlink(sock.getsockname())
        negotiate(sock, flags=HAS_FLAGS | MULTI_CONN)
        until_closed(sock)

    with playing(play) as uri:
        node = await NbdNode.open(uri, connections=4)
        assert len(node.clients) == 1
        await node.close()


async def test_opening_and_closing_are_cancelled(image: Path) -> None:
    """No connection stays open."""
    async with pynbd.serve(image, format="raw", read_only=True, max_clients=3) as server:
        files = len(os.listdir("/proc/self/fd"))
        opening = asyncio.ensure_future(NbdNode.open(server.uri, connections=4))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opening, 0.2)
        node = await NbdNode.open(server.uri, connections=3)
        closing = asyncio.ensure_future(node.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        async with asyncio.timeout(5):
            while len(os.listdir("/proc/self/fd")) > files:  # noqa: ASYNC110 (the server's ends)
                await asyncio.sleep(0.01)


async def test_an_image_of_layers_is_one(tmp_path: Path) -> None:
    image = builder.Image(
        size=3 * CLUSTER,
        clusters={0: builder.Data(b"\1" * CLUSTER), CLUSTER: builder.Zero()},
    )
    image.write(tmp_path / "a.qcow2")
    async with pynbd.serve(tmp_path / "a.qcow2") as server:
        node = await NbdNode.open(server.uri)
        runs = await node.map(0, node.size)
        assert [(start, end, kind) for start, end, kind, _, _ in runs] == [
            (0, CLUSTER, DATA),
            (CLUSTER, 3 * CLUSTER, ZERO),
        ]
        await node.close()


async def test_writing(image: Path) -> None:
    async with pynbd.serve(image, format="raw") as server:
        node = await NbdNode.open(server.uri, connections=2, read_only=False)
        try:
            pieces = [(n * MIB, CONTENT[n : n + 5000]) for n in range(1, 7)]
            assert await node.pwrite_batch(pieces, fua=True) == [None] * 6
            for offset, data in pieces:
                assert await node.pread(offset, 5000) == data
            await node.write_zeroes(MIB, 1000, may_unmap=False, fast=False, fua=True)
            await node.discard(2 * MIB, 4096, fua=True)
            await node.flush()
            assert await node.pread(MIB, 1001) == bytes(1000) + pieces[0][1][1000:1001]
            good, bad = await node.pwrite_batch([(0, b"good"), (8 * MIB, b"bad")])
            assert good is None
            assert bad is not None
            assert (bad.errno, bad.filename) == (errno.ENOSPC, server.uri)
            assert (
                bad.strerror
                == "NBD_CMD_WRITE 8388608+3: outside the export, which has 8388608 bytes"
            )
            assert await node.pread(0, 4) == b"good"
        finally:
            await node.close()


async def test_it_can_be_served_itself(image: Path) -> None:
    """Reads, writes and maps through two servers."""
    async with pynbd.serve(image, format="raw") as first:
        node = await NbdNode.open(first.uri, read_only=False)
        async with pynbd.serve(node) as second:
            outer = await NbdNode.open(second.uri, read_only=False)
            assert await outer.pread(0, 2 * MIB) == CONTENT + bytes(MIB)
            assert await outer.pwrite_batch([(4 * MIB, CONTENT)]) == [None]
            assert [kind for _, _, kind, _, _ in await outer.map(0, 8 * MIB)] == [
                DATA,
                ZERO,
                DATA,
                ZERO,
            ]
            await outer.close()
        await node.close()
    with image.open("rb") as file:
        assert os.pread(file.fileno(), MIB, 4 * MIB) == CONTENT


async def test_a_read_only_export_is_not_written(image: Path) -> None:
    async with pynbd.serve(image, format="raw", read_only=True) as server:
        with pytest.raises(OSError, match="the export is read-only") as caught:
            await NbdNode.open(server.uri, read_only=False)
        assert (caught.value.errno, caught.value.filename) == (errno.EROFS, server.uri)


async def test_more_connections_only_if_they_agree() -> None:
    """Without NBD_FLAG_CAN_MULTI_CONN; and without contexts all is data."""

    def play(sock: socket.socket) -> None:
        negotiate(sock, flags=HAS_FLAGS | READ_ONLY, size=1 << 50)
        until_closed(sock)

    with playing(play) as uri:
        node = await NbdNode.open(uri, connections=4)
        assert len(node.clients) == 1
        assert [row[:3] for row in await node.map(0, 1 << 50)] == [(0, 1 << 50, DATA)]
        await node.close()


async def test_every_state_of_base_allocation() -> None:
    """The table of "base:allocation metadata context": only zeroes read as zeroes."""

    def play(sock: socket.socket) -> None:
        negotiate(sock, grants=(EXTENDED_HEADERS,), contexts=(b"base:allocation",))
        cookie = struct.unpack(">IHHQQQ", receive(sock, 32))[3]
        said = struct.pack(">II", 0, 4)
        said += b"".join(struct.pack(">QQ", 4096, state) for state in range(4))
        sock.sendall(struct.pack(">IHHQQQ", 0x6E8A278C, 1, 6, cookie, 0, len(said)) + said)
        until_closed(sock)

    with playing(play) as uri:
        node = await NbdNode.open(uri)
        runs = await node.map(0, MIB)
        assert [(end, kind) for _, end, kind, _, _ in runs] == [
            (2 * 4096, DATA),
            (3 * 4096, ZERO | DATA),
            (4 * 4096, ZERO),
        ]
        await node.close()


async def test_reads_between_the_edges_of_blocks() -> None:
    asked: list[tuple[int, int]] = []

    def play(sock: socket.socket) -> None:
        negotiate(sock, block_size=(4096, 4096, MIB))
        while True:
            _, _, command, cookie, offset, length = REQUEST.unpack(receive(sock, REQUEST.size))
            if command == 2:
                break
            asked.append((offset, length))
            data = b"".join(struct.pack(">Q", at) for at in range(offset, offset + length, 8))
            sock.sendall(struct.pack(">IIQ", 0x67446698, 0, cookie) + data)

    with playing(play) as uri:
        node = await NbdNode.open(uri)
        assert await node.pread(4096 * 3 + 8, 8) == struct.pack(">Q", 4096 * 3 + 8)
        await node.pread(4096, 8192)
        await node.pread(4095, 2)
        await node.close()
    assert asked == [(4096 * 3, 4096), (4096, 8192), (0, 8192)]


async def test_a_server_that_offers_nothing() -> None:
    """Zeroes are written, a discard is left out, there is nothing to flush."""
    asked: list[tuple[int, int, int]] = []

    def play(sock: socket.socket) -> None:
        negotiate(sock, size=4 * MIB)
        while True:
            _, _, command, cookie, offset, length = REQUEST.unpack(receive(sock, REQUEST.size))
            if command == 2:
                break
            assert not any(receive(sock, length))
            asked.append((command, offset, length))
            error = errno.ENOSPC if offset >= 2 * MIB else 0
            sock.sendall(struct.pack(">IIQ", 0x67446698, error, cookie))

    with playing(play) as uri:
        node = await NbdNode.open(uri, read_only=False)
        await node.write_zeroes(512, MIB + 512, may_unmap=True, fast=False, fua=True)
        await node.discard(0, MIB, fua=True)
        with pytest.raises(OSError, match="fast zeroes") as caught:
            await node.write_zeroes(0, MIB, may_unmap=True, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(OSError, match=r"NBD_CMD_WRITE 2097152.512: NBD_ENOSPC") as caught:
            await node.write_zeroes(2 * MIB, 512, may_unmap=True, fast=False)
        assert caught.value.errno == errno.ENOSPC
        await node.close()
    assert asked == [(1, 512, MIB), (1, 512 + MIB, 512), (1, 2 * MIB, 512)]
