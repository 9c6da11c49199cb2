"""Refcounts as they are on disk; those of every width beside qemu-img are in
interop/test_check_images.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.builder import Data, Image, InternalSnapshot, Written, poke
from pynbd.block.qcow2.recorded import Recorded

CLUSTER = 512
SHARED = {at * CLUSTER: Data(b"%d" % at) for at in range(300)}


@contextmanager
def opened(path: Path) -> Iterator[HostFile]:
    engine = Engine(1)
    file = HostFile.open(engine, str(path), writable=False)
    yield file
    file.close()
    engine.close()


def write(path: Path, bits: int) -> Written:
    """300 data clusters in one layer, or shared by two."""
    snapshots = [InternalSnapshot("before", SHARED)] if bits > 1 else []
    image = Image(
        size=1 << 20,
        cluster_bits=9,
        refcount_bits=bits,
        clusters=SHARED,
        snapshots=snapshots,
    )
    return image.write(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
async def test_every_width(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = write(path, bits)
    with opened(path) as file:
        recorded = await Recorded.load(file, written.header)
        clusters = file.size() // CLUSTER
    assert recorded.in_block == CLUSTER * 8 // bits
    assert len(recorded.counts) % recorded.in_block == 0
    assert set(recorded.counts[clusters:].tolist()) <= {0}
    shared = 300 if bits > 1 else 0
    assert np.count_nonzero(recorded.counts[:clusters] == 2) == shared
    assert np.count_nonzero(recorded.counts[:clusters] == 1) == clusters - shared


async def test_copied_says_that_the_refcount_is_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = write(path, 16)
    with opened(path) as file:
        recorded = await Recorded.load(file, written.header)
    # The header, of which there is one; a cluster with data; one far behind the end.
    places = np.array([0, CLUSTER, 1 << 50], np.uint64)
    assert recorded.counts[:2].tolist() == [1, 2]
    every = np.ones(3, np.bool_)
    assert recorded.contradict(places, every).tolist() == [False, True, True]
    assert recorded.contradict(places, ~every).tolist() == [True, False, False]


async def test_bad_entries(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = write(path, 16)
    table = written.header.refcount_table_offset
    good = int.from_bytes(path.read_bytes()[table : table + 8], "big")
    end = path.stat().st_size // CLUSTER * CLUSTER
    for index, entry in enumerate([good | 1, end, 1 << 63, good]):
        poke(path, table + index * 8, entry.to_bytes(8, "big"))
    with opened(path) as file:
        recorded = await Recorded.load(file, written.header)
    assert recorded.bad_entries(end // CLUSTER) == {
        0: f"{good | 1:#018x}: reserved bits are set",
        1: f"{end:#018x}: the refcount block is past the end of the file",
        2: "0x8000000000000000: the refcount block is past the end of the file",
    }
    assert 0 not in recorded.good_entries(end // CLUSTER)
    assert 3 in recorded.good_entries(end // CLUSTER)
    # Bits that are reserved hide nothing; what is past the end reads as zeroes, as far as there
    # can be a file.
    assert recorded.unknown.tolist() == [2]
    assert recorded.counts[0] == 1
    assert not recorded.counts[recorded.in_block : 2 * recorded.in_block].any()
    places = np.array([2 * recorded.in_block * CLUSTER], np.uint64)
    assert recorded.known(places).tolist() == [False]
    assert recorded.contradict(places, np.ones(1, np.bool_)).tolist() == [False]
