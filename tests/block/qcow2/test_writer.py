"""Writer: who does what with a request. Pins, FUA, the first change, long writes, the end."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pynbd.block import quick_writes
from pynbd.block.extent import Runs
from pynbd.block.qcow2.builder import Bitmap, Image, poke
from pynbd.block.qcow2.cow import CopyOnWrite
from pynbd.block.qcow2.format import AUTOCLEAR_OFFSET, Autoclear, Compatible
from pynbd.block.qcow2.writer import CLUSTERS_PER_STEP
from tests.block.qcow2.writing import (
    KiB,
    MiB,
    bytes_of,
    create,
    header_of,
    sound,
    watched,
    writable,
    write,
    zero,
)
from tests.block.reading import contents, qemu_contents

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

CLUSTER = 65536


# Pins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discard", [False, True])
async def test_a_late_write_hits_nobody_else(tmp_path: Path, discard: bool) -> None:
    """It is held in the engine; its cluster is given back, that is committed, and room is wanted by
    many; then it is let go.
    """
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * CLUSTER)
            await node.flush()
            gate = host.gate(lambda call: b"late" * 100 in call.data)
            late = asyncio.create_task(write(node, 4096, b"late" * 100))
            await gate.reached()
            await (node.discard(0, CLUSTER) if discard else zero(node, 0, CLUSTER))
            await node.flush()
            for number in range(1, 9):
                await write(node, number * CLUSTER, bytes([number]) * CLUSTER)
                await node.flush()
            gate.opened.set()
            await late
            for number in range(1, 9):
                assert await node.pread(number * CLUSTER, CLUSTER) == bytes([number]) * CLUSTER
            # Now it is free.
            await node.flush()
            await node.flush()
            end = node.metadata_file.size()
            await write(node, 10 * CLUSTER, b"b" * CLUSTER)
            assert node.metadata_file.size() == end
    await sound(path)
    assert qemu_contents(path)[CLUSTER : 2 * CLUSTER] == b"\1" * CLUSTER


async def test_what_comes_while_a_batch_is_written_shares_the_next(tmp_path: Path) -> None:
    """The kernel makes the writes of a file one after the other: one is written, one is next."""
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    with watched() as host:
        async with writable(path) as node:
            await node.flush()
            assert node.file is not None
            node.file.writes_in_turn = True
            gate = host.gate(lambda call: call.name == "write")
            first = asyncio.create_task(write(node, 0, b"\0first" * 100))
            await gate.reached()
            others = [
                asyncio.create_task(write(node, number * CLUSTER, bytes([number]) * 4096))
                for number in range(1, 9)
            ]
            await asyncio.sleep(0)
            others[0].cancel()  # what was begun is finished
            gate.opened.set()
            await first
            await asyncio.gather(*others, return_exceptions=True)
            assert len([call for call in host.calls if call.name == "write"]) == 3
            for number in range(1, 9):
                assert await node.pread(number * CLUSTER, 4096) == bytes([number]) * 4096
    await sound(path)


async def test_a_late_read_sees_nobody_else(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * CLUSTER)
            await node.flush()
            assert node.file is not None
            node.file._nowait = False  # as if the page cache did not have it
            gate = host.gate(lambda call: call.name == "read")
            late = asyncio.create_task(node.pread(0, CLUSTER))
            await gate.reached()
            host.gates.clear()
            await node.discard(0, CLUSTER)
            await node.flush()
            for number in range(1, 9):
                await write(node, number * CLUSTER, bytes([number]) * CLUSTER)
                await node.flush()
            gate.opened.set()
            assert await late == b"a" * CLUSTER
            assert not any(await node.pread(0, CLUSTER))
    await sound(path)


async def test_copy_on_write_does_not_wait_for_a_write_in_place(tmp_path: Path) -> None:
    """And a write in place not for one that allocates elsewhere."""
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * CLUSTER)
            gate = host.gate(lambda call: b"slow" in call.data)
            slow = asyncio.create_task(write(node, 10, b"slow"))
            await gate.reached()
            await write(node, CLUSTER, b"quick")
            await write(node, 100, b"quick too")
            gate.opened.set()
            await slow
            assert bytes(await node.pread(10, 4)) == b"slow"
    await sound(path)


async def test_a_read_does_not_look_again_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's clusters are allocated whenever it has looked something up."""
    path = create(tmp_path / "x.qcow2", 64 * MiB)
    async with writable(path) as node:
        await write(node, 0, b"a" * CLUSTER)
        lookup, others = node.lookup, iter(range(1, 100))

        async def busy(offset: int, length: int) -> Runs:
            runs = await lookup(offset, length)
            await write(node, next(others) * CLUSTER, b"x")
            return runs

        monkeypatch.setattr(node, "lookup", busy)
        assert await node.pread(0, 10) == b"a" * 10
        assert next(others) <= 4
        monkeypatch.undo()
        assert bytes(await node.pread(CLUSTER, 2)) == b"x\0"
    await sound(path)


# FUA ---------------------------------------------------------------------------------------------


async def test_fua_of_a_write_in_place_is_one_hop(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * CLUSTER)
            await node.flush()
            host.calls.clear()
            await write(node, 100, b"b", fua=True)
            assert [call.name for call in host.calls] == ["write", "sync"]


@pytest.mark.parametrize("allocating", [True, False])
async def test_fua_is_there_after_a_crash(tmp_path: Path, allocating: bool) -> None:
    """Also if only the mapping, of an earlier write, was not on disk."""
    path, copy = create(tmp_path / "x.qcow2", MiB), tmp_path / "copy.qcow2"
    async with writable(path) as node:
        if not allocating:
            await write(node, 0, b"a" * CLUSTER)
        await write(node, 100, b"precious", fua=True)
        put(copy, bytes_of(path))
    async with writable(copy) as node:
        assert bytes(await node.pread(100, 8)) == b"precious"
    await sound(copy)


async def test_nothing_is_written_after_a_flush_that_failed(tmp_path: Path) -> None:
    """In place neither, though the data file has had no failure."""
    path = create(tmp_path / "x.qcow2", MiB, f"data_file={tmp_path}/x.data")
    async with writable(path) as node:
        await write(node, 0, b"x" * CLUSTER)
        node.metadata_file.sync_failed = True
        assert not node.write_now(0, b"y" * 4096)
        (error,) = await node.pwrite_batch([(0, b"y" * 4096)])
        assert error is not None
        assert error.errno == errno.EIO
        node.metadata_file.sync_failed = False
        assert await node.pread(0, 4096) == b"x" * 4096
    await sound(path)


async def test_zeroes_with_fua(tmp_path: Path) -> None:
    path, copy = create(tmp_path / "x.qcow2", MiB), tmp_path / "copy.qcow2"
    async with writable(path) as node:
        await write(node, 0, b"a" * MiB, fua=True)
        await zero(node, 0, CLUSTER, fua=True)
        await node.discard(CLUSTER, CLUSTER, fua=True)
        put(copy, bytes_of(path))
    async with writable(copy) as node:
        assert not any(await node.pread(0, 2 * CLUSTER))
        assert bytes(await node.pread(2 * CLUSTER, 2)) == b"aa"


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


# The first change, and the last -----------------------------------------------------------------


async def test_nothing_is_written_before_the_first_change(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    Image(
        size=MiB,
        bitmaps=[Bitmap("b", CLUSTER)],
        autoclear=Autoclear(1 << 40),
        compatible=Compatible.LAZY_REFCOUNTS,
    ).write(path)
    before = bytes_of(path)
    async with writable(path) as node:
        await node.flush()
        await contents(node)
    assert bytes_of(path) == before
    async with writable(path) as node:
        await write(node, 0, b"x")
        assert (await header_of(path)).autoclear == Autoclear.BITMAPS
    assert (await header_of(path)).autoclear == Autoclear.BITMAPS
    await sound(path)


async def test_unknown_autoclear_bits_go_first(tmp_path: Path) -> None:
    """Cleared and on stable storage before anything else; what is known stays."""
    path = create(tmp_path / "x.qcow2", MiB, f"data_file={tmp_path}/x.data,data_file_raw=on")
    poke(path, AUTOCLEAR_OFFSET, struct.pack(">Q", 1 << 50 | Autoclear.RAW_EXTERNAL_DATA))
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"x")
    assert [call.name for call in host.calls[:2]] == ["write", "sync"]
    assert host.calls[0].ranges == ((AUTOCLEAR_OFFSET, 8),)
    assert (await header_of(path)).autoclear == Autoclear.RAW_EXTERNAL_DATA


async def test_a_first_change_that_could_not_begin(tmp_path: Path) -> None:
    """It fails, nothing else was changed, and the next one begins again."""
    path = create(tmp_path / "x.qcow2", MiB)
    poke(path, AUTOCLEAR_OFFSET, struct.pack(">Q", 1 << 50))
    before = bytes_of(path)
    with watched() as host:
        async with writable(path) as node:
            host.fail(0, errno.EIO, "write")
            (error,) = await node.pwrite_batch([(0, b"x")])
            assert error is not None
            assert error.errno == errno.EIO
            assert bytes_of(path) == before
            await write(node, 0, b"x")
    assert not (await header_of(path)).autoclear
    await sound(path)


async def test_after_the_end(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB)
    async with writable(path) as node:
        await write(node, 0, b"x")
    (error,) = await node.pwrite_batch([(0, b"y")])
    assert error is not None
    assert error.errno == errno.EBADF
    with pytest.raises(OSError, match="closed"):
        await zero(node, 0, CLUSTER)


async def test_who_is_under_way_ends_first(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB)
    with watched() as host:
        async with writable(path) as node:
            gate = host.gate(lambda call: b"slow" in call.data)
            slow = asyncio.create_task(write(node, 0, b"slow"))
            await gate.reached()
            slow.cancel()
            closing = asyncio.create_task(node.close())
            await asyncio.sleep(0.01)
            gate.opened.set()
            await closing
    assert qemu_contents(path)[:4] == b"slow"
    await sound(path)


# Long writes ------------------------------------------------------------------------------------


async def test_a_write_of_many_steps(tmp_path: Path) -> None:
    """More clusters than one step takes, in one piece and in many."""
    path = create(tmp_path / "x.qcow2", 8 * MiB, "cluster_size=512")
    data = random.Random(1).randbytes(4 * MiB)
    async with writable(path) as node:
        await write(node, 1000, data[: 2 * MiB])
        pieces = [(1000 + at, data[at : at + 5 * KiB]) for at in range(2 * MiB, len(data), 5 * KiB)]
        assert not any(await node.pwrite_batch(pieces))
        await write(node, 1000, data[:MiB])  # in place
    await sound(path)
    assert qemu_contents(path)[1000 : 1000 + len(data)] == data


async def test_others_have_a_turn_between_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody has to be waited for: clusters, counts and tables are there already."""
    monkeypatch.setattr(quick_writes, "SLOW", 60.0)
    monkeypatch.setattr(quick_writes, "writers_run_free", lambda _: True)
    turns: list[str] = []
    link = CopyOnWrite._link

    def told(cow: CopyOnWrite, clusters: Sequence[Any]) -> None:
        turns.append("step")
        asyncio.get_running_loop().call_soon(turns.append, "turn")
        link(cow, clusters)

    path = create(tmp_path / "x.qcow2", 8 * MiB, "cluster_size=512")
    async with writable(path) as node:
        await write(node, 0, b"x" * MiB)
        await node.discard(0, MiB)
        for _ in range(2):  # the clusters are free after the one that ends their references
            await node.flush()
        monkeypatch.setattr(CopyOnWrite, "_link", told)
        await write(node, 0, b"y" * MiB)
        assert await node.pread(0, MiB) == b"y" * MiB
    assert turns.count("step") >= MiB // 512 // CLUSTERS_PER_STEP
    assert ("step", "step") not in pairwise(turns)
    await sound(path)


async def test_one_step_copies_no_more_than_its_bound(tmp_path: Path) -> None:
    """Small writes into 100 clusters of 2 MiB, each copied from a backing file: not 200 MiB."""
    base = create(tmp_path / "base.qcow2", 256 * MiB)
    async with writable(base) as node:
        for number in range(100):
            await write(node, number * 2 * MiB, b"b")
    path = create(
        tmp_path / "x.qcow2", 256 * MiB, "cluster_size=2M", "-b", base.name, "-F", "qcow2"
    )
    with watched() as host:
        async with writable(path) as node:
            host.calls.clear()
            pieces = [(number * 2 * MiB + 99, b"x") for number in range(100)]
            assert not any(await node.pwrite_batch(pieces))
            hops = [sum(size for _, size in call.ranges) for call in host.calls]
    assert max(hops) <= 64 * MiB
    await sound(path)
