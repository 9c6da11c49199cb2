"""Zeroes and discards of everything that a cluster may be.

The oracle is QEMU: what qemu-io makes of the same requests reads the same, and has the same map
where the specification leaves no choice.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from interop.samples import qemu_io
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import commit
from tests.block.qcow2.images import IMAGES, over_raw, twice
from tests.block.qcow2.writing import (
    GiB,
    KiB,
    MiB,
    allocated,
    bytes_of,
    create,
    sound,
    watched,
    writable,
    write,
    zero,
)
from tests.block.reading import contents, merged, qemu_contents, qemu_rows

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

# (offset, length): whole clusters, parts of one, of two and of three, and the end of the disk
RANGES = [
    (65536, 131072),
    (4 * 65536 + 100, 1000),
    (6 * 65536 - 100, 200),
    (7 * 65536 - 512, 65536 + 1024),
    (10 * 65536 + 2048, 8192),
    (11 * 65536 - 4096, 8192),
    (300 * KiB - 512, 2048),
    (14 * 65536, 2 * 65536),
]


async def kept(node: BlockNode, offset: int, length: int) -> None:
    await zero(node, offset, length, unmap=False)


async def given_back(node: BlockNode, offset: int, length: int) -> None:
    await zero(node, offset, length)


async def reserved(node: BlockNode, offset: int, length: int) -> None:
    await zero(node, offset, length, unmap=False, no_hole=True)


def map_of(path: Path) -> list[tuple[int, int, bool, bool, int | None, int]]:
    """What QEMU says, without what is left open: host offsets, and whether zeroes with nothing
    below them are there or not.
    """
    return merged(
        [
            (start, end, is_zero, data, None, depth if data or not is_zero else 0)
            for start, end, is_zero, data, _, depth in qemu_rows(path)
        ]
    )


@pytest.mark.parametrize("how, theirs", [(kept, "write -q -z"), (given_back, "write -q -z -u")])
@pytest.mark.parametrize("name", IMAGES)
async def test_zeroes_as_qemu_makes_them(
    tmp_path: Path, name: str, how: object, theirs: str
) -> None:
    ours, other = twice(name, tmp_path)
    async with writable(ours) as node:
        disk = bytearray(await contents(node))
        for offset, length in RANGES:
            disk[offset : offset + length] = bytes(length)
            await how(node, offset, length)  # type: ignore[operator]
        assert await contents(node) == disk
    qemu_io(other, *(f"{theirs} {offset} {length}" for offset, length in RANGES))
    await sound(ours)
    assert qemu_contents(ours) == disk
    assert map_of(ours) == map_of(other)


@pytest.mark.parametrize("name", IMAGES)
async def test_discards_as_qemu_makes_them(tmp_path: Path, name: str) -> None:
    """Of whole clusters: of subclusters, QEMU discards none."""
    ours, other = twice(name, tmp_path)
    whole = [(offset, length) for offset, length in RANGES if not (offset | length) & 65535]
    before = qemu_contents(ours)
    async with writable(ours) as node:
        for offset, length in whole:
            await node.discard(offset, length)
    qemu_io(other, *(f"discard -q {offset} {length}" for offset, length in whole))
    await sound(ours)
    after = qemu_contents(ours)
    assert after == qemu_contents(other)
    assert map_of(ours) == map_of(other)
    if name not in ("v2", "large"):
        for offset, length in whole:
            assert not any(after[offset : offset + length])
    assert after[3 * 65536 : 14 * 65536] == before[3 * 65536 : 14 * 65536]


@pytest.mark.parametrize("name", IMAGES)
async def test_reserved_zeroes_have_their_space(tmp_path: Path, name: str) -> None:
    """All of it: a write there needs no space any more."""
    path = IMAGES[name](tmp_path)
    file = tmp_path / "x.data" if "data-file" in name else path
    async with writable(path) as node:
        disk = bytearray(await contents(node))
        for offset, length in RANGES:
            disk[offset : offset + length] = bytes(length)
            await reserved(node, offset, length)
        assert await contents(node) == disk
        await reserved(node, 0, node.size)
        await node.flush()
        assert allocated(file) >= node.size
        before = allocated(file)
        for offset in range(0, node.size - 65536, 65536):
            await write(node, offset, b"x" * 65536)
        await node.flush()
        assert allocated(file) - before <= 65536  # perhaps an L2 table
    await sound(path)


@pytest.mark.parametrize(
    "offset, fast",
    [(0, True), (512, False), (2 * KiB, True), (4 * KiB, True), (4 * KiB + 512, False)],
)
@pytest.mark.parametrize("how", [kept, given_back, reserved])
async def test_the_last_cluster_ends_with_the_disk(
    tmp_path: Path, how: Callable[[BlockNode, int, int], Awaitable[None]], offset: int, fast: bool
) -> None:
    """And not with its last subcluster, of which half is on the disk. What is a part of the cluster
    may be reserved by writing bytes.
    """
    path, theirs = tmp_path / "x.qcow2", tmp_path / "theirs.qcow2"
    start, length = MiB + offset, 5 * KiB - offset
    for image in path, theirs:
        create(image, MiB + 5 * KiB, "extended_l2=on")
        qemu_io(image, "write -q -P 1 1M 5k")
    async with writable(path) as node:
        if not fast:
            with pytest.raises(OSError, match="have to be written"):
                await zero(node, start, length, fast=True)
        await how(node, start, length)
    qemu_io(theirs, f"write -q -z {start} {length}")
    if how is not reserved or not offset:
        assert map_of(path) == map_of(theirs)
    assert qemu_contents(path)[MiB:] == b"\1" * offset + bytes(length)
    await sound(path)


@pytest.mark.parametrize("name", IMAGES)
async def test_a_seeded_mix(tmp_path: Path, name: str) -> None:
    """Everything, at any place, several at a time."""
    path = IMAGES[name](tmp_path)
    rng = random.Random(name)
    async with writable(path) as node:
        disk = bytearray(await contents(node))
        for _ in range(12):
            tasks = []
            for part in rng.sample(range(8), 4):
                length = rng.choice([1, 700, 2048, 65536, 100_000])
                offset = part * 131072 + rng.randrange(131072 - length)
                match rng.randrange(4):
                    case 0:
                        disk[offset : offset + length] = data = rng.randbytes(length)
                        tasks.append(write(node, offset, data))
                    case number:
                        disk[offset : offset + length] = bytes(length)
                        how = (kept, given_back, reserved)[number - 1]
                        tasks.append(how(node, offset, length))
            await asyncio.gather(*tasks)
            if rng.random() < 0.3:
                await node.flush()
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk


# Fast, or not at all ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, offset, length, fast",
    [
        ("backing", 65536, 131072, True),
        ("backing", 65536, 131072 + 512, False),
        ("backing", 100, 100, False),
        ("nothing", 100, 100, True),  # all of the cluster is zero anyway
        ("nothing", 6 * 65536 - 100, 200, True),
        ("short", 15 * 65536 + 100, 100, True),
        ("extended", 65536 + 2048, 4096, True),
        ("extended", 65536 + 2048, 4097, False),
        ("v2", 65536, 65536, True),
        ("data-file", 65536, 65536, True),
        ("raw-data-file", 65536, 65536, True),
    ],
)
async def test_fast_zeroes_are_decided_before_anything_is_touched(
    tmp_path: Path, name: str, offset: int, length: int, fast: bool
) -> None:
    path = IMAGES[name](tmp_path)
    async with writable(path) as node:
        await write(node, 14 * 65536, b"x")
        await node.flush()
        before = bytes_of(path)
        disk = bytearray(await contents(node))
        if fast:
            await zero(node, offset, length, fast=True)
            disk[offset : offset + length] = bytes(length)
        else:
            with pytest.raises(OSError, match="zeroes would have to be written") as caught:
                await zero(node, offset, length, fast=True)
            assert caught.value.errno == errno.EOPNOTSUPP
            await node.flush()
            assert bytes_of(path) == before
        assert await contents(node) == disk
    await sound(path)


async def test_fast_zeroes_of_version_2_above_a_backing_file(tmp_path: Path) -> None:
    path = over_raw(tmp_path, MiB, "compat=0.10")
    async with writable(path) as node:
        with pytest.raises(OSError, match="would have to be written"):
            await zero(node, 0, 131072, fast=True)
        await zero(node, 0, 131072)
        assert not any(await node.pread(0, 131072))
    await sound(path)


async def test_a_raw_data_file_without_fallocate(tmp_path: Path) -> None:
    """Zeroes have to be written, so that fast ones are refused; others are written through."""
    path = IMAGES["raw-data-file"](tmp_path)
    with watched() as host:
        host.trouble = lambda call: errno.EOPNOTSUPP * (call.name == "fallocate")
        async with writable(path) as node:
            with pytest.raises(OSError, match="would have to be written"):
                await zero(node, 0, 131072, fast=True)
            assert bytes_of(tmp_path / "x.data")[:300] == b"\7" * 300
            await zero(node, 0, 131072)
            assert not any(bytes_of(tmp_path / "x.data")[:131072])
            await node.discard(131072, 131072)
            assert not any(await node.pread(131072, 131072))


async def reserved_fast(node: BlockNode, offset: int, length: int) -> None:
    await node.write_zeroes(offset, length, may_unmap=False, fast=True, no_hole=True)


async def small_clusters(folder: Path) -> tuple[Path, bytes]:
    """64 clusters a table; the first table's are there, the second's are not."""
    path = create(folder / "small.qcow2", 256 * KiB, "cluster_size=512")
    async with writable(path) as node:
        await write(node, 0, b"x" * 32 * KiB)
        return path, await contents(node)


async def test_fast_zeroes_that_reserve_space_on_a_tmpfs() -> None:
    """It gives space and cannot zero what is there, which nothing needs."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        path, before = await small_clusters(Path(folder))
        async with writable(path) as node:
            await reserved_fast(node, 0, 64 * KiB)
            assert await contents(node) == bytes(64 * KiB) + before[64 * KiB :]
            await node.flush()
            assert allocated(path) >= 64 * KiB
        await sound(path)


async def test_fast_zeroes_where_no_space_can_be_reserved(tmp_path: Path) -> None:
    """Not even those that were zeroed before it showed."""
    path, before = await small_clusters(tmp_path)
    with watched() as host:
        host.trouble = lambda call: errno.EOPNOTSUPP * (call.name == "fallocate")
        async with writable(path) as node:
            with pytest.raises(OSError, match="would have to be written"):
                await reserved_fast(node, 0, 64 * KiB)
            assert await contents(node) == before
            await reserved(node, 0, 64 * KiB)
            assert await contents(node) == bytes(64 * KiB) + before[64 * KiB :]
            await node.flush()
            assert allocated(path) >= 64 * KiB
    await sound(path)


@pytest.mark.parametrize("discard", [False, True])
async def test_zeroes_of_a_raw_data_file_come_after_writes_that_have_begun(
    tmp_path: Path, discard: bool
) -> None:
    """What such a write brings late would stay in the file, where others read it."""
    path = IMAGES["raw-data-file"](tmp_path)
    with watched() as host:
        async with writable(path) as node:
            gate = host.gate(lambda call: b"slow" in call.data)
            slow = asyncio.create_task(write(node, 100, b"slow"))
            await gate.reached()
            change = node.discard(0, 65536) if discard else given_back(node, 0, 65536)
            zeroing = asyncio.ensure_future(change)
            later = asyncio.create_task(write(node, 200, b"later"))
            await write(node, 2 * 65536, b"elsewhere")  # waits for nobody
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert not zeroing.done()
            gate.opened.set()
            await asyncio.gather(slow, zeroing, later)
            disk = await contents(node)
    assert not any(disk[:200])
    assert disk[200:205] == b"later"
    assert bytes_of(tmp_path / "x.data")[: len(disk)] == disk
    await sound(path)


@pytest.mark.parametrize("length", [64, 65536])
async def test_zeroes_reach_a_raw_data_file_whatever_the_entries_say(
    tmp_path: Path, length: int
) -> None:
    """After a crash it may hold what was written there, and the entries may not say so yet."""
    path = IMAGES["raw-data-file"](tmp_path)
    async with writable(path) as node:
        await given_back(node, 65536, 65536)
    with (tmp_path / "x.data").open("r+b") as data:
        data.seek(65536)
        data.write(b"written" * 100)
    async with writable(path) as node:
        await given_back(node, 65536, length)
        disk = await contents(node)
    assert not any(disk[65536 : 65536 * 2])
    assert not any(bytes_of(tmp_path / "x.data")[65536 : 65536 + length])
    await sound(path)


# What is given back -------------------------------------------------------------------------------


@pytest.mark.parametrize("discard", [False, True])
async def test_what_was_given_back_is_used_again(tmp_path: Path, discard: bool) -> None:
    path = create(tmp_path / "x.qcow2", 4 * MiB)
    async with writable(path) as node:
        await write(node, 0, b"a" * MiB)
        await node.flush()
        end, full = node.metadata_file.size(), allocated(path)
        await (node.discard(0, MiB) if discard else given_back(node, 0, MiB))
        await node.flush()
        assert allocated(path) <= full - MiB
        await write(node, 2 * MiB, b"b" * MiB)
        assert node.metadata_file.size() == end
        assert not any(await node.pread(0, MiB))
    await sound(path)


async def test_a_request_that_fails_half_way(tmp_path: Path) -> None:
    """Clusters that were zeroed before it failed read as zeroes, whoever has their place now."""
    path = IMAGES["subclusters"](tmp_path)
    with watched() as host:
        async with writable(path) as node:
            before = await contents(node)  # which is remembered
            host.trouble = lambda call: errno.EIO * (call.name == "write" and len(call.ranges) > 1)
            # Cluster 3 as a whole, and a part of the compressed one, which has to be written.
            with pytest.raises(OSError, match="Input/output error"):
                await zero(node, 3 << 16, 65536 + 2048)
            host.trouble = lambda call: 0
            await node.flush()
            await write(node, 8 << 16, b"new" * 30000)
            assert not any(await node.pread(3 << 16, 65536))
            assert (await node.pread(4 << 16, 65536)) == before[4 << 16 : 5 << 16]
    await sound(path)


async def test_a_punch_that_fails_costs_space_and_nothing_else(tmp_path: Path) -> None:
    """The clusters are used again, with what they hold."""
    path = create(tmp_path / "x.qcow2", 4 * MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * MiB)
            await node.flush()
            host.trouble = lambda call: errno.EIO * (call.name == "fallocate")
            await node.discard(0, MiB)
            await node.flush()
            end = node.metadata_file.size()
            await write(node, 2 * MiB + 100, b"b" * (MiB - 100))
            assert node.metadata_file.size() == end
    assert qemu_contents(path)[: 3 * MiB] == bytes(2 * MiB + 100) + b"b" * (MiB - 100)
    await sound(path)


# A lot --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discard", [False, True])
async def test_a_huge_range_does_not_hold_the_loop(tmp_path: Path, discard: bool) -> None:
    """1 TiB, with data here and there, above a backing file that shows nowhere afterwards."""
    path = over_raw(tmp_path, MiB, "", 1024 * GiB)
    with watched() as host:
        async with writable(path) as node:
            for offset in range(0, 1024 * GiB, 64 * GiB):
                await write(node, offset, b"x" * 65536)
            await node.flush()
            host.calls.clear()
            if discard:
                task = asyncio.ensure_future(node.discard(0, node.size))
            else:
                task = asyncio.ensure_future(given_back(node, 0, node.size))
            longest, turns = 0.0, 0
            while not task.done():
                began = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - began)
                turns += 1
            await task
            assert turns > 50
            assert longest < 0.1  # of this thread's own time; a step is about a millisecond
            for offset in range(0, 1024 * GiB, 64 * GiB):
                assert not any(await node.pread(offset, 65536))
    await sound(path)


async def test_much_that_gathers_is_committed_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was changed does not pile up in memory."""
    monkeypatch.setattr(commit, "MAX_CHANGED_PAGES", 8)
    path = create(tmp_path / "x.qcow2", 64 * MiB, "preallocation=metadata,cluster_size=4k")
    with watched() as host:
        async with writable(path) as node:
            await given_back(node, 0, node.size)
            assert host.count("sync") >= 2
    await sound(path)
