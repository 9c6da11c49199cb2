"""Allocating writes: what is copied around the new bytes, from everything a cluster may be.

Each image is also written by qemu-io in the same places; both have to read the same.
"""

from __future__ import annotations

import asyncio
import os
import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest

from interop import peers
from interop.samples import qemu_io
from tests.block.qcow2.images import IMAGES, over_raw, twice
from tests.block.qcow2.writing import (
    KiB,
    MiB,
    bytes_of,
    create,
    sound,
    watched,
    writable,
    write,
    zero,
)
from tests.block.reading import contents, qemu_contents

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


@pytest.mark.parametrize("name", IMAGES)
async def test_what_is_around_the_new_bytes_stays(tmp_path: Path, name: str) -> None:
    """Head, tail, both; many in a batch; the same cluster twice; across clusters."""
    path, theirs = twice(name, tmp_path)
    rng = random.Random(name)
    together = [(100, 1), (196096, 1024), (262144, 512), (393215, 1), (800 * KiB, 10)]
    together += [(800 * KiB + 500, 10), (MiB - 3, 3)]
    apart = [(rng.randrange(0, 900 * KiB), rng.choice([1, 512, 5000, 70000])) for _ in range(8)]
    async with writable(path) as node:
        disk = bytearray(await contents(node))
        commands = []
        for batch in (together, *([request] for request in apart)):
            pieces = []
            for offset, length in batch:
                pattern = rng.randrange(1, 256)
                disk[offset : offset + length] = data = bytes([pattern]) * length
                pieces.append((offset, data))
                commands.append(f"write -q -P {pattern} {offset} {length}")
            assert not any(await node.pwrite_batch(pieces))
        qemu_io(theirs, *commands)
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk
    assert qemu_contents(theirs) == disk
    if "snapshots" in peers.run("qemu-img", "info", "--output=json", path).stdout:
        assert qemu_contents(path, "-l", "s") == qemu_contents(theirs, "-l", "s")


async def test_what_is_between_the_new_bytes_stays(tmp_path: Path) -> None:
    """A subcluster that is not written, between two that are; some writes of the batch overlap."""
    path = over_raw(tmp_path, MiB, "extended_l2=on")
    async with writable(path) as node:
        await write(node, 4 * KiB, b"s" * 2 * KiB)
        disk = bytearray(await contents(node))
        pieces = [(2 * KiB + 512, b"n" * 512)] * 5 + [(6 * KiB + 512, b"n" * 512)]
        for offset, data in pieces:
            disk[offset : offset + len(data)] = data
        assert not any(await node.pwrite_batch(pieces))
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk


async def test_a_write_from_an_unallocated_into_a_zero_subcluster(tmp_path: Path) -> None:
    """Nothing is below: what is around the new bytes is zeroes, of two kinds."""
    path = create(tmp_path / "x.qcow2", MiB, "extended_l2=on")
    async with writable(path) as node:
        await write(node, 0, b"s" * 2 * KiB)
        await zero(node, 8 * KiB, 2 * KiB)
        disk = bytearray(await contents(node))
        disk[6 * KiB + 512 : 9 * KiB] = data = b"n" * (2 * KiB + 512)
        await write(node, 6 * KiB + 512, data)
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk


async def test_copies_do_not_wait_in_memory_for_each_other(tmp_path: Path) -> None:
    """Of many large clusters, a few bytes of each of which are written."""
    size, clusters = 512 * KiB, 64
    (tmp_path / "below").write_bytes(b"")
    os.truncate(tmp_path / "below", size * clusters)
    path = create(tmp_path / "x.qcow2", "32M", f"cluster_size={size}", "-b", "below", "-F", "raw")
    async with writable(path) as node:
        await write(node, 0, b"first")
        pieces = [(number * size + 5, b"n" * 512) for number in range(clusters)]
        tracemalloc.start()
        try:
            assert not any(await node.pwrite_batch(pieces))
            assert tracemalloc.get_traced_memory()[1] < 8 * MiB
        finally:
            tracemalloc.stop()
        assert bytes(await node.pread(63 * size, 6)) == b"\0\0\0\0\0n"
    await sound(path)


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
async def test_several_clusters_are_one_hop_and_neighbours_on_the_host(
    tmp_path: Path, options: str
) -> None:
    path = over_raw(tmp_path, MiB, options)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"first")  # which makes the L2 table
            host.calls.clear()
            await write(node, 65536 + 512, b"x" * 8 * 65536)
            (call,) = [call for call in host.calls if call.name == "write"]
            ranges = sorted(call.ranges)
            assert all(one[0] + one[1] == two[0] for one, two in pairwise(ranges))
            host.calls.clear()
            # Other clusters of one batch, and all of them in the cluster that follows.
            batch = [((10 + number) << 16, b"y" * 512) for number in range(4)]
            assert not any(await node.pwrite_batch(batch))
            assert host.count("write") == 1
    await sound(path)


async def test_subclusters_are_all_that_is_copied(tmp_path: Path) -> None:
    """Of a cluster of 64 KiB, 2 KiB."""
    path = over_raw(tmp_path, MiB, "extended_l2=on")
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"first")
            host.calls.clear()
            await write(node, 65536 + 3000, b"x" * 100)
            (call,) = [call for call in host.calls if call.name == "write"]
    assert sum(length for _, length in call.ranges) == 2048
    await sound(path)


async def test_nothing_is_copied_where_all_is_new(tmp_path: Path) -> None:
    path = over_raw(tmp_path, MiB)
    with watched() as host:
        async with writable(path) as node:
            host.calls.clear()
            await write(node, 65536, b"x" * 65536)
            (call,) = [call for call in host.calls if call.name == "write"]
    assert [length for _, length in call.ranges] == [65536]


# At the same time ---------------------------------------------------------------------------------


async def test_writers_of_one_cluster_wait_others_do_not(tmp_path: Path) -> None:
    path = over_raw(tmp_path, MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 15 * 65536, b"first")
            host.calls.clear()
            gate = host.gate(lambda call: any(b"slow" in bytes(data) for data in call.data))
            slow = asyncio.create_task(write(node, 10, b"slow"))
            await gate.reached()
            same = asyncio.create_task(write(node, 40000, b"same"))
            await write(node, 65536, b"other")
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not same.done()
            gate.opened.set()
            await asyncio.gather(slow, same)
            assert bytes(await node.pread(10, 4)) == b"slow"
            assert bytes(await node.pread(40000, 4)) == b"same"
            assert bytes(await node.pread(65536, 5)) == b"other"
    await sound(path)


async def test_many_at_once_in_few_clusters(tmp_path: Path) -> None:
    """No bytes of one get lost in what another copies."""
    path = over_raw(tmp_path, MiB)
    rng = random.Random(5)
    async with writable(path) as node:
        disk = bytearray(await contents(node))
        places = rng.sample(range(4 * 65536 // 512), 400)
        tasks = []
        for place in places:
            disk[place * 512 : (place + 1) * 512] = data = rng.randbytes(512)
            tasks.append(asyncio.create_task(write(node, place * 512, data)))
        await asyncio.gather(*tasks)
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk


async def test_who_asks_may_go_away(tmp_path: Path) -> None:
    """A request that is cancelled is done to its end, and leaves nothing behind."""
    path = over_raw(tmp_path, MiB)
    with watched() as host:
        async with writable(path) as node:
            gate = host.gate(lambda call: call.name == "write")
            task = asyncio.create_task(write(node, 10, b"slow"))
            await gate.reached()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.opened.set()
            await write(node, 40000, b"same")
            assert bytes(await node.pread(10, 4)) == b"slow"
    await sound(path)


# The end of a disk, and data files ----------------------------------------------------------------


@pytest.mark.parametrize("raw", [False, True])
async def test_a_data_file(tmp_path: Path, raw: bool) -> None:
    """It ends with the disk, whatever is written; a raw one is the disk."""
    size = 5 * 65536 + 1536
    name = tmp_path / "x.data"
    path = create(
        tmp_path / "x.qcow2", size, f"data_file={name},data_file_raw={'on' if raw else 'off'}"
    )
    rng = random.Random(2)
    disk = bytearray(size)
    longest = max(size, len(bytes_of(name)))  # qemu-img makes a raw one whole clusters
    async with writable(path) as node:
        for _ in range(30):
            length = rng.choice([1, 512, 70000])
            offset = rng.randrange(0, size - length)
            disk[offset : offset + length] = data = rng.randbytes(length)
            await write(node, offset, data)
        disk[-1:] = b"!"
        await write(node, size - 1, b"!")
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk
    assert len(bytes_of(name)) <= longest
    if raw:
        assert bytes_of(name)[:size] == disk


async def test_a_data_file_has_no_metadata_in_the_way(tmp_path: Path) -> None:
    """Where the image has its header, the disk has its first cluster, which is written in place."""
    path = create(tmp_path / "x.qcow2", MiB, f"data_file={tmp_path}/x.data")
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * MiB)
            gate = host.gate(lambda call: b"slow" in call.data)
            slow = asyncio.create_task(write(node, 0, b"slow"))
            await gate.reached()
            async with asyncio.timeout(5):
                await write(node, 100, b"quick")  # no in-place write waits for another
            gate.opened.set()
            await slow
    await sound(path)


async def test_the_last_cluster_of_a_disk_is_a_whole_one_in_the_image(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 65536 + 512)
    async with writable(path) as node:
        await write(node, 65536 + 100, b"x" * 412)
    await sound(path)
    assert qemu_contents(path) == bytes(65536 + 100) + b"x" * 412
