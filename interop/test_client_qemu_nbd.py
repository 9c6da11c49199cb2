"""Our client and qemu-nbd: all three dialects, every context, the filter, writing.

What is expected comes from qemu-img, qemu-io and nbdinfo.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from interop import peers, samples
from pynbd import OptionError, RequestError, connect
from pynbd.client.connecting import list_exports
from pynbd.client.connection import Client
from pynbd.client.node import NbdNode

DIALECTS: dict[str, dict[str, bool]] = {
    "simple": {"structured": False, "extended": False},
    "structured": {"extended": False},
    "extended": {},
}
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)

pytestmark = pytest.mark.usefixtures("peers_are_there")


@pytest.fixture(scope="module")
def peers_are_there() -> None:
    peers.require("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.chain(tmp_path_factory.mktemp("chain"))


def flattened(image: Path, to: Path) -> bytes:
    peers.run("qemu-img", "convert", "-O", "raw", image, to)
    return to.read_bytes()


def nbdinfo_map(uri: str, context: str) -> list[tuple[int, int]]:
    said = peers.run("nbdinfo", "--json", f"--map={context}", uri).stdout
    rows: list[dict[str, Any]] = json.loads(said)
    return [(row["length"], row["type"]) for row in rows]


async def whole_map(client: Client, context: str) -> list[tuple[int, int]]:
    """All extents of one context, with equal neighbours merged, as nbdinfo shows them."""
    extents: list[tuple[int, int]] = []
    offset = 0
    while offset < client.size:
        answers = await client.block_status(offset, client.size - offset, contexts=[context])
        for length, flags in answers[context]:
            if extents and extents[-1][1] == flags:
                length += extents.pop()[0]
            extents.append((length, flags))
        offset += int(answers[context].lengths.sum())
    return extents


@every_dialect
async def test_reading(chain: Path, tmp_path: Path, dialect: dict[str, bool]) -> None:
    content = flattened(chain, tmp_path / "flat.raw")
    with peers.qemu_nbd(chain, "-r", "-f", "qcow2") as uri:
        async with connect(uri, **dialect) as client:
            assert (client.size, client.read_only) == (len(content), True)
            assert (client.structured, client.extended) == (
                "structured" not in dialect and not client.extended,
                not dialect,
            )
            assert await client.pread(0, client.size) == content
            parts = [client.pread(at, 3000) for at in range(1000, client.size - 3000, 77_777)]
            read = await asyncio.gather(*parts)
            assert read == [
                content[at : at + 3000] for at in range(1000, len(content) - 3000, 77_777)
            ]


@pytest.mark.parametrize("dialect", [{"extended": False}, {}], ids=["structured", "extended"])
async def test_contexts(chain: Path, dialect: dict[str, bool]) -> None:
    offers = ["-A", "-B", "b0", "-B", "b1"]
    with peers.qemu_nbd(chain, "-r", "-f", "qcow2", *offers) as uri:
        async with connect(uri, contexts=["base:", "qemu:"], **dialect) as client:
            assert set(client.contexts) == {
                "base:allocation",
                "qemu:allocation-depth",
                "qemu:dirty-bitmap:b0",
                "qemu:dirty-bitmap:b1",
            }
            for context in client.contexts:
                assert await whole_map(client, context) == nbdinfo_map(uri, context), context
            answers = await client.block_status(0, client.size, req_one=True)
            assert {name: len(status) for name, status in answers.items()} == dict.fromkeys(
                client.contexts, 1
            )


async def test_a_list(chain: Path) -> None:
    with peers.qemu_nbd(chain, "-r", "-D", "three layers", "-B", "b0", export="x/y") as uri:
        (export,) = await list_exports(uri)
        told = json.loads(peers.run("nbdinfo", "--json", "--list", uri).stdout)["exports"][0]
        assert (export.name, export.description) == ("x/y", "three layers")
        assert export.size == told["export-size"]
        assert list(export.contexts) == told["contexts"]
        assert export.constrained
        assert export.block_size == (
            told["block_size_minimum"],
            told["block_size_preferred"],
            told["block_size_maximum"],
        )
        with pytest.raises(OptionError, match="NBD_OPT_GO: NBD_REP_ERR_UNKNOWN: export 'z'"):
            await Client.open(uri.replace("x/y", "z").replace("x%2Fy", "z"))


@every_dialect
async def test_writing(tmp_path: Path, dialect: dict[str, bool]) -> None:
    image = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "5G")
    with peers.qemu_nbd(image, "-f", "qcow2", "--discard=unmap") as uri:
        async with connect(uri, **dialect) as client:
            await asyncio.gather(
                client.pwrite(0, b"\x11" * (1 << 20)),
                client.pwrite(4 << 30, b"\x22" * (40 << 20), fua=True),
                client.cache(0, 1 << 20),
            )
            await client.write_zeroes(1 << 16, 1 << 16, no_hole=True)
            await client.trim(1 << 17, 1 << 16)
            await client.write_zeroes(5 << 29, 1 << 30, fua=True)
            await client.flush()
            assert await client.pread(65535, 2) == b"\x11\0"
    samples.qemu_io(
        image,
        "read -P 17 0 64k",
        "read -P 0 64k 128k",
        "read -P 17 192k 832k",
        "read -P 34 4G 40M",
    )


async def test_a_refused_write(tmp_path: Path) -> None:
    """qemu-nbd answers what is malformed with EINVAL and a text."""
    image = tmp_path / "disk.raw"
    samples.empty_file(image, 1 << 20)
    with peers.qemu_nbd(image, "-f", "raw") as uri:
        async with connect(uri) as client:
            client.size = 1 << 21
            with pytest.raises(RequestError, match=r"READ 1048000.2000: NBD_EINVAL: .+"):
                await client.pread(1048000, 2000)
            assert not any(await client.pread(0, 512))


async def test_a_node_with_several_connections(chain: Path, tmp_path: Path) -> None:
    content = flattened(chain, tmp_path / "flat.raw")
    with peers.qemu_nbd(chain, "-r", "-f", "qcow2") as uri:
        node = await NbdNode.open(uri, connections=4)
        assert len(node.clients) == 4
        assert await node.pread(0, node.size) == content
        runs = await node.map(0, node.size)
        # NBD_STATE_HOLE is 1 and NBD_STATE_ZERO 2; ZERO 2, ZERO | DATA 3 and DATA 1 in a node.
        kinds = {0: 1, 1: 1, 2: 3, 3: 2}
        mapped = nbdinfo_map(uri, "base:allocation")
        assert [(end - start, kind) for start, end, kind, _, _ in runs] == [
            (length, kinds[flags]) for length, flags in mapped
        ]
        await node.close()


async def test_a_server_for_one_client_lets_the_next_one_wait(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    samples.empty_file(image, 1 << 20)
    with peers.qemu_nbd(image, "-f", "raw", "--shared=1") as uri:
        first = await Client.open(uri)
        second = asyncio.ensure_future(Client.open(uri))
        await asyncio.sleep(0.1)
        assert not second.done()
        await first.close()
        await (await second).close()
