"""`serve`: ready when it is entered, gone when it is left."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.client.connecting import connect
from pynbd.errors import ImageError, OptionError, PynbdError, UsageError
from pynbd.protocol.uri import NbdUri
from pynbd.server.access import Allow
from pynbd.server.disk import Disk
from pynbd.server.serving import serve

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


def gone(path: Path) -> int:
    """How many bytes of it are holes."""
    return SIZE - path.stat().st_blocks * 512


def exists(path: str | Path) -> bool:
    return os.path.lexists(path)


async def nbdinfo(uri: str, *args: str) -> str:
    """What nbdinfo says of it, while the loop serves."""
    return (await asyncio.to_thread(peers.run, "nbdinfo", *args, uri)).stdout


async def test_it_serves_while_the_block_lasts(disk: Path) -> None:
    peers.require("nbdinfo")
    async with serve(disk, read_only=True, export_name="a b") as server:
        uri = NbdUri.parse(server.uri)
        assert uri.export == "a b"
        assert await nbdinfo(server.uri, "--size") == f"{SIZE}\n"
        assert await nbdinfo(server.uri, "--is", "readonly") == ""
    assert not exists(os.path.dirname(uri.socket))


async def test_a_raw_image_is_written(disk: Path) -> None:
    peers.require("qemu-io")
    async with serve(disk, format="raw", host="127.0.0.1", port=0) as server:
        assert server.uri.startswith("nbd://127.0.0.1:")
        await asyncio.to_thread(
            peers.run, "qemu-io", "-f", "raw", "-c", "write -P 7 4k 4k", server.uri
        )
    assert content(disk)[4096:8192] == b"\7" * 4096


@pytest.mark.parametrize(
    "options, blocks",
    [
        ({}, 3),  # TRIM gives 2 blocks back, and WRITE_ZEROES 1
        ({"discard": "ignore"}, 0),
        ({"detect_zeroes": "on"}, 3),
        ({"detect_zeroes": "unmap"}, 7),
        ({"discard": "ignore", "detect_zeroes": "on"}, 0),
    ],
)
async def test_what_becomes_of_discards_and_zeroes(
    disk: Path, options: dict[str, str], blocks: int
) -> None:
    async with (
        serve(disk, format="raw", **options) as server,  # type: ignore[arg-type]
        connect(server.uri) as client,
    ):
        await client.trim(0, 2 << 12)
        await client.write_zeroes(2 << 12, 1 << 12)
        await client.pwrite(3 << 12, bytes(4 << 12))
        assert await client.pread(2 << 12, 5 << 12) == bytes(5 << 12)
    assert gone(disk) == blocks << 12


async def test_an_overlay(disk: Path) -> None:
    """What was written is read again, and is gone in the end; the image stays as it was."""
    before = content(disk)
    async with serve(disk, format="raw", overlay=True) as server, connect(server.uri) as client:
        await client.pwrite(5, b"written")
        await client.flush()
        assert await client.pread(0, 20) == before[:5] + b"written" + before[12:20]
    assert content(disk) == before


async def test_an_open_image_stays_open(disk: Path) -> None:
    node = await open_image(disk)
    async with serve(node, socket=disk.with_suffix(".sock")) as server:
        assert server.export.read_only
    with pytest.raises(UsageError, match="format: it is for image files"):
        await serve(node, format="raw").__aenter__()
    assert await node.pread(0, SIZE) == content(disk)
    await node.close()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tls": "pki"}, "tls: a pynbd.Tls is expected, not 'pki'"),
        ({"tls": True}, "tls: a pynbd.Tls is expected"),
        ({"access": Allow("read")}, "access: a list of pynbd.Allow is expected"),
        ({"access": iter([Allow("read")])}, "access: a list of pynbd.Allow is expected"),
        ({"access": ["read"]}, "access: a list of pynbd.Allow is expected"),
        ({"access": [Allow("read", cert="a")]}, "access: read,cert=a: nobody could meet it: tls"),
        ({"access": [Allow("read", uid=0)], "port": 0}, "uid and gid need a unix socket"),
        ({"access": [Allow("write", address="::1")]}, "address needs TCP"),
    ],
)
async def test_what_nobody_could_mean(disk: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^.*{said}"):
        await serve(disk, **options).__aenter__()


async def test_rules(disk: Path) -> None:
    rules = [Allow("read", uid=os.geteuid())]
    async with serve(disk, access=rules) as server, connect(server.uri) as client:
        assert client.read_only
    async with serve(disk, format="raw", access=()) as server:
        with pytest.raises(OptionError, match="there is no default export"):
            await connect(server.uri).__aenter__()


async def test_it_may_be_stopped_inside(disk: Path) -> None:
    async with serve(disk) as server:
        server.stop()
        await asyncio.wait_for(server.ended(), 5)


async def test_a_failure_inside_ends_it_too(disk: Path) -> None:
    async def fail() -> None:
        async with serve(disk, socket=disk.with_suffix(".sock")):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await fail()
    assert not exists(disk.with_suffix(".sock"))


class Slow(Disk):
    size = 512

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.told: list[str] = []

    async def pread(self, offset: int, length: int) -> bytes:
        self.reading.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.told.append("read")
        return bytes(length)

    async def close(self) -> None:
        self.told.append("closed")


@pytest.mark.parametrize("pause", [0, 0.1])
async def test_it_is_cancelled_twice(pause: float) -> None:
    """By a timeout around a timeout, say: nothing is left, and nothing is under way any more when
    the disk is closed.
    """
    before = asyncio.all_tasks()
    disk = Slow()

    async def block() -> None:
        async with serve(disk) as server, connect(server.uri) as client:
            await client.pread(0, 1)

    task = asyncio.create_task(block())
    await disk.reading.wait()
    task.cancel()
    await asyncio.sleep(pause)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert disk.told == ["read", "closed"]
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_what_cannot_be_served(disk: Path) -> None:
    with pytest.raises(ImageError, match="nowhere"):
        await serve(disk.parent / "nowhere").__aenter__()
    with pytest.raises(ImageError, match="no bitmap 'b'"):
        await serve(disk, bitmaps=["b"]).__aenter__()
    with pytest.raises(UsageError, match="socket excludes"):
        await serve(disk, socket="s", port=0).__aenter__()
    with pytest.raises(UsageError, match="max_clients: 0 or more is expected, not -1"):
        await serve(disk, max_clients=-1).__aenter__()
    with pytest.raises(UsageError, match="export name: it has 4097 bytes; at most 4096"):
        await serve(disk, export_name="x" * 4097).__aenter__()
    with pytest.raises(UsageError, match="export name: it has a NUL"):
        await serve(disk, export_name="a\0b").__aenter__()
    with pytest.raises(UsageError, match="description: it has to be UTF-8"):
        await serve(disk, description="\udcff").__aenter__()
    with pytest.raises(UsageError, match="discard: one of 'unmap', 'ignore' is expected, not 'on'"):
        await serve(disk, discard="on").__aenter__()
    with pytest.raises(UsageError, match="detect_zeroes='unmap' needs discard='unmap'"):
        await serve(disk, discard="ignore", detect_zeroes="unmap").__aenter__()
    with pytest.raises(PynbdError, match="not a socket"):
        await serve(disk, socket=disk).__aenter__()


@pytest.mark.parametrize(
    "dialect, said",
    [
        ({}, "using extended packets"),
        ({"extended": False}, "using structured packets"),
        ({"extended": False, "structured": False}, "using simple packets"),
    ],
)
async def test_an_older_server(disk: Path, dialect: dict[str, bool], said: str) -> None:
    """What a client falls back to, to test it with (S11)."""
    peers.require("nbdinfo")
    async with serve(disk, read_only=True, **dialect) as server:  # type: ignore[arg-type]
        assert said in await nbdinfo(server.uri)
