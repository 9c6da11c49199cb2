"""What a qcow2 image costs beneath the server: looks at tables, reads of them, clusters that are
decompressed, bytes that are written. Images are qemu-img's.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from interop import peers
from interop.samples import qemu_io
from pynbd.block.engine import WRITE_NOW_MAX
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.image import Qcow2Node
from tests.block.qcow2.writing import KiB, MiB, create, sound, writable, write, zero
from tests.server.counting import Costs, in_page_cache, spread, table_lookups

BYTES = random.Random(53).randbytes(4 * MiB)
BATCH = 16


def full(folder: Path) -> Path:
    (folder / "base.raw").write_bytes(BYTES)
    path = folder / "x.qcow2"
    peers.run("qemu-img", "convert", "-O", "qcow2", folder / "base.raw", path)
    return path


def chain(folder: Path) -> Path:
    """Three layers, each with something of its own."""
    path = full(folder)
    for layer in (1, 2):
        above = folder / f"layer{layer}.qcow2"
        create(above, "4M", "", "-b", path.name, "-F", "qcow2")
        qemu_io(above, *(f"write -q -P {layer} {(8 * at + layer) * 64}k 64k" for at in range(8)))
        path = above
    return path


def loads(node: BlockNode) -> int:
    """How often an L2 table was read from its file."""
    return sum(each.mapping.tables.loads for each in node.chain() if isinstance(each, Qcow2Node))


async def test_a_chain_is_looked_up_once(tmp_path: Path) -> None:
    """4 MiB are a part of one L2 table in each of the three layers: a look at each, for all that is
    read of them afterwards.
    """
    async with writable(chain(tmp_path)) as node:
        before = table_lookups(node)
        for at in spread(32, 64 * KiB):
            await node.pread(at, 4 * KiB)
        assert table_lookups(node) - before == 3
        await node.pread(0, 4 * MiB)
        assert table_lookups(node) - before == 3


async def test_a_new_cluster_is_looked_up_in_memory(tmp_path: Path) -> None:
    """What was written is found in the table that is there: a look at each layer, and no table is
    read from its file again. Writes in place change nothing of what is known.
    """
    async with writable(chain(tmp_path)) as node:
        await node.pread(0, 4 * MiB)
        await write(node, 0, b"new")
        await node.pread(0, 4 * MiB)
        looked, read = table_lookups(node), loads(node)
        await write(node, 3 * 64 * KiB, b"x" * 512)  # nobody's in the top layer
        assert await node.pread(3 * 64 * KiB, 512) == b"x" * 512
        assert loads(node) == read
        changed = table_lookups(node)
        assert changed - looked <= 4  # one of them for the writer
        await write(node, 3 * 64 * KiB, b"y" * 512)
        assert await node.pread(3 * 64 * KiB, 512) == b"y" * 512
        assert table_lookups(node) == changed


async def test_a_map_of_all_reads_each_table_once(tmp_path: Path) -> None:
    """1 TiB in 64 L2 tables of 32768 entries: each is read once, and asked for once or twice, as a
    step may end inside of one.
    """
    path = create(tmp_path / "x.qcow2", "1T", "cluster_size=512k,preallocation=metadata")
    async with writable(path) as node:
        # "l2_entries = (cluster_size / sizeof(uint64_t))"
        tables = -(-(1 << 40) // ((512 * KiB // 8) * 512 * KiB))
        looked, read, at, steps = table_lookups(node), loads(node), 0, 0
        while at < node.size:
            at = (await node.map(at, node.size - at, want_zero=False)).end
            steps += 1
        assert loads(node) - read <= tables
        assert tables <= table_lookups(node) - looked <= tables + steps


async def test_copies_of_compressed_clusters(tmp_path: Path, costs: Costs) -> None:
    """Each of the clusters that a batch touches is decompressed once, also where two pieces go into
    it, and they are found a place together.
    """
    path = create(tmp_path / "x.qcow2", "4M", "compression_type=zstd")
    qemu_io(path, *(f"write -q -c -P {at + 1} {at * 128}k 64k" for at in range(BATCH)))
    async with writable(path) as node:
        pieces = [
            (at * 128 * KiB + inside, b"x" * 512) for at in range(BATCH) for inside in (0, 4096)
        ]
        before = node.clusters.loads
        costs.start()
        assert not any(await node.pwrite_batch(pieces))
        costs.stop()
        assert node.clusters.loads - before == BATCH
        assert sum(costs.writes()) == BATCH * 64 * KiB
        assert await node.pread(0, 5120) == b"x" * 512 + b"\1" * 3584 + b"x" * 512 + b"\1" * 512
    await sound(path)


@pytest.mark.parametrize("unmap", [False, True])
async def test_zeroes_are_not_written(tmp_path: Path, costs: Costs, unmap: bool) -> None:
    """Of whole clusters above a backing file: entries of the table say so. Nothing is read, and
    nothing written before a flush.
    """
    (tmp_path / "base.raw").write_bytes(BYTES)
    path = create(tmp_path / "x.qcow2", "4M", "", "-b", "base.raw", "-F", "raw")
    async with writable(path) as node:
        await write(node, 0, b"first")
        costs.start()
        await zero(node, MiB, 2 * MiB, unmap=unmap)
        costs.stop()
        assert costs.writes() == []
        assert costs.reads() == []
        assert await node.pread(MiB, 2 * MiB) == bytes(2 * MiB)


async def test_a_commit_writes_changed_pages_only(tmp_path: Path, costs: Costs) -> None:
    """512 entries of an L2 table are a page of 4 KiB, as are 2048 refcounts: clusters that are far
    apart in the guest are two pages of the L2 table and, allocated together, one of refcounts.
    """
    path = create(tmp_path / "x.qcow2", "512M")
    async with writable(path) as node:
        await write(node, 256 * MiB, b"first")
        await node.flush()
        for at in (MiB, 2 * MiB, 100 * MiB, 101 * MiB):
            await write(node, at, b"x" * 4096)
        costs.start()
        await node.flush()
        costs.stop()
        assert sorted(costs.writes()) in ([4096] * 3, [4096, 8192])
        assert costs.syncs() == 2
    await sound(path)


async def test_a_batch_goes_into_one_run(tmp_path: Path, costs: Costs) -> None:
    """Whole clusters that follow one another are written by one system call, and in the loop by one
    in each turn.
    """
    path = create(tmp_path / "x.qcow2", "64M")
    with in_page_cache(path):
        async with writable(path) as node:
            await write(node, 63 * MiB, b"first")
            costs.start()
            await write(node, 0, b"x" * MiB)
            costs.stop()
            assert costs.writes() in ([WRITE_NOW_MAX] * 4, [MiB])
            assert costs.reads() == []
    await sound(path)
