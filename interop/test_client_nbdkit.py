"""Our client and nbdkit: dialects that it limits, block sizes, old handshakes, its errors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from interop import peers, samples
from pynbd import ProtocolError, RequestError, UnsupportedFeature, connect
from pynbd.client.connecting import list_exports
from pynbd.client.connection import Client
from pynbd.client.node import NbdNode
from pynbd.protocol.values import TransmissionFlag

pytestmark = pytest.mark.usefixtures("peers_are_there")


@pytest.fixture(scope="module")
def peers_are_there() -> None:
    peers.require("nbdkit")


@pytest.fixture
def image(tmp_path: Path) -> tuple[str, bytes]:
    content = samples.sparse_file(tmp_path / "disk.raw", 4 << 20)
    return str(tmp_path / "disk.raw"), content


@pytest.mark.parametrize(
    "options,structured,contexts",
    [
        ([], True, ("base:allocation",)),
        (["--no-sr"], False, ()),
        (["--mask-handshake=1"], True, ("base:allocation",)),  # without NBD_FLAG_NO_ZEROES
        (["--mask-handshake=0"], False, ()),  # nor NBD_FLAG_FIXED_NEWSTYLE: NBD_OPT_EXPORT_NAME
    ],
)
async def test_dialects(
    image: tuple[str, bytes], options: list[str], structured: bool, contexts: tuple[str, ...]
) -> None:
    path, content = image
    with peers.nbdkit(*options, "file", path) as uri:
        async with connect(uri, contexts=["base:"]) as client:
            assert (client.structured, client.extended) == (structured, False)
            assert client.contexts == contexts
            assert await client.pread(0, client.size) == content
            await client.pwrite(1000, b"x" * 100_000, fua=True)
            await client.write_zeroes(2000, 50)
            await client.trim(0, 500)
            await client.flush()
            assert await client.pread(1999, 52) == b"x" + bytes(50) + b"x"
            client.flags &= ~TransmissionFlag.SEND_CACHE
            with pytest.raises(UnsupportedFeature, match="NBD_FLAG_SEND_CACHE"):
                await client.cache(0, 512)


async def test_oldstyle_is_refused(image: tuple[str, bytes]) -> None:
    with (
        peers.nbdkit("--oldstyle", "file", image[0]) as uri,
        pytest.raises(ProtocolError, match="oldstyle NBD, which is not supported"),
    ):
        await Client.open(uri)


async def test_block_sizes(image: tuple[str, bytes]) -> None:
    """A server that takes whole blocks only; a node reads what lies between."""
    path, content = image
    sizes = ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=1M"]
    line = ["--filter=blocksize-policy", "file", path, *sizes, "blocksize-error-policy=error"]
    with peers.nbdkit(*line) as uri:
        async with connect(uri) as client:
            assert client.info.block_size == (4096, 65536, 1 << 20)
            assert await client.pread(0, client.size) == content
            with pytest.raises(RequestError, match="not a multiple of the block size 4096"):
                await client.pread(512, 512)
        node = await NbdNode.open(uri, connections=2)
        assert await node.pread(700_001, 300_000) == content[700_001:1_000_001]
        await node.close()


async def test_errors(image: tuple[str, bytes]) -> None:
    """The server goes on after an error, and so does the connection."""
    path, content = image
    line = ["error-pread=ENOSPC", "error-pread-rate=100%"]
    with peers.nbdkit("--filter=error", "file", path, *line) as uri:
        async with connect(uri) as client:
            with pytest.raises(RequestError, match=r"NBD_CMD_READ 0.512: NBD_ENOSPC"):
                await client.pread(0, 512)
            await client.flush()
    line = ["error-pread=EIO", "error-pread-rate=50%"]
    with peers.nbdkit("--filter=error", "file", path, *line) as uri:
        async with connect(uri) as client:
            reads = (client.pread(at, 4096) for at in range(0, 1 << 18, 4096))
            answers = await asyncio.gather(*reads, return_exceptions=True)
            failed = [answer for answer in answers if isinstance(answer, RequestError)]
            assert 0 < len(failed) < len(answers)
            for number, answer in enumerate(answers):
                if not isinstance(answer, RequestError):
                    assert answer == content[number * 4096 :][:4096]


async def test_a_server_that_dies(image: tuple[str, bytes]) -> None:
    """nbdkit's filter ends the process in the middle of things."""
    line = ["--filter=delay", "file", image[0], "rdelay=30"]
    with peers.socket_path() as path:
        start = [*peers.command("nbdkit"), "--foreground", f"--unix={path}", *line]
        with peers.listening(start, path) as process:
            client = await Client.open(peers.unix_uri(path))
            reads = [asyncio.ensure_future(client.pread(at, 512)) for at in (0, 512)]
            await asyncio.sleep(0.05)
            process.kill()
            for answer in await asyncio.gather(*reads, return_exceptions=True):
                assert isinstance(answer, ConnectionError)
            await client.close()


async def test_an_export_for_each_file(tmp_path: Path) -> None:
    """And one that is as large as an export can be."""
    for name, size in (("a", 512), ("ü b", 1024)):
        samples.empty_file(tmp_path / name, size)
    with peers.nbdkit("file", f"dir={tmp_path}") as uri:
        exports = await list_exports(uri)
        assert {(each.name, each.size) for each in exports} == {("a", 512), ("ü b", 1024)}
        assert not any(each.constrained for each in exports)
    with peers.nbdkit("memory", str(2**63 - 1)) as uri:
        async with connect(uri, contexts=["base:allocation"]) as client:
            assert client.size == 2**63 - 1
            await client.pwrite(2**63 - 5, b"last")
            assert await client.pread(2**63 - 6, 5) == b"\0last"
            answers = await client.block_status(0, 2**63 - 1)
            assert int(answers["base:allocation"].lengths[0]) >= 1 << 31
