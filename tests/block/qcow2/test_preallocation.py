"""Counting clusters in use, with refcounts of every width, and the guess at preallocation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2 import preallocation as module
from pynbd.block.qcow2.builder import Data, Image, poke
from pynbd.block.qcow2.image import read_header
from pynbd.block.qcow2.preallocation import Usage
from pynbd.errors import CorruptImage


@contextmanager
def opened(path: Path) -> Iterator[HostFile]:
    engine = Engine(1)
    file = HostFile.open(engine, str(path), writable=False)
    yield file
    file.close()
    engine.close()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
async def test_clusters_in_use(tmp_path: Path, bits: int) -> None:
    """As many as qemu-img check finds; enough of them for several blocks of 512 bytes."""
    peers.require("qemu-img")
    path = tmp_path / "disk.qcow2"
    clusters = {at * 512: Data(bytes([1 + at % 255])) for at in range(0, 900, 3)}
    Image(size=1 << 19, cluster_bits=9, refcount_bits=bits, clusters=clusters).write(path)
    checked = json.loads(peers.run("qemu-img", "check", "--output=json", path).stdout)
    assert checked.get("leaks", 0) == 0
    with opened(path) as file:
        counted = Usage(file, await read_header(file))
        total = path.stat().st_size // 512
        # The image has no cluster that is not in use: all up to its end are counted.
        assert checked["image-end-offset"] == total * 512
        assert await counted.count_in_use(total, 1 << 40) == total
        assert await counted.count_in_use(total + 5000, 1 << 40) == total
        assert await counted.count_in_use(7, 1 << 40) == 7
        assert 10 <= await counted.count_in_use(total, 10) <= total


@pytest.mark.parametrize("bound, value", [("MAX_BLOCKS", 3), ("MAX_BLOCK_BYTES", 3 * 512 + 511)])
async def test_counting_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    """A block of 512 bytes speaks of 256 clusters, all of which are in use; a table may be long."""
    path = tmp_path / "disk.qcow2"
    clusters = {at * 512: Data(b"x") for at in range(2000)}
    Image(size=1 << 20, cluster_bits=9, clusters=clusters).write(path)
    with opened(path) as file:
        counted = Usage(file, await read_header(file))
        assert await counted.count_in_use(2000, 1 << 40) == 2000
        monkeypatch.setattr(module, bound, value)
        assert await counted.count_in_use(2000, 1 << 40) == 3 * 256


@pytest.mark.parametrize("place", [512, 1 << 63, (1 << 64) - 65536, (1 << 63) - 65536])
async def test_a_misplaced_block(tmp_path: Path, place: int) -> None:
    """Also where it would be the last cluster of the longest file, whose end has no number."""
    path = tmp_path / "disk.qcow2"
    written = Image(size=1 << 20).write(path)
    poke(path, written.header.refcount_table_offset, place.to_bytes(8, "big"))
    with opened(path) as host:
        counted = Usage(host, written.header)
        with pytest.raises(CorruptImage, match="refcount block 0"):
            await counted.count_in_use(5, 5)
        assert not await counted.metadata_preallocated()


@pytest.mark.parametrize(
    "preallocation, expected",
    [("off", False), ("metadata", True), ("falloc", False), ("full", False)],
)
async def test_metadata_preallocated(tmp_path: Path, preallocation: str, expected: bool) -> None:
    peers.require("qemu-img")
    path = tmp_path / "disk.qcow2"
    peers.run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"preallocation={preallocation}",
        path,
        "4M",
    )
    with opened(path) as file:
        counted = Usage(file, await read_header(file))
        assert await counted.metadata_preallocated() is expected
