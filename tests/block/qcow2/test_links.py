"""Links: L2 tables that are made, copied from what a snapshot shares, and read again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pynbd.block.qcow2.builder import Data, Image, InternalSnapshot, poke
from pynbd.block.qcow2.format import COPIED
from tests.block.qcow2.writing import (
    GiB,
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
from tests.block.reading import qemu_contents

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

C = 65536
SPAN = C // 8 * C  # guest bytes of one L2 table


async def entries(path: Path) -> list[int]:
    """The L1 table on disk."""
    header = await header_of(path)
    data = bytes_of(path)[header.l1_table_offset :][: header.l1_size * 8]
    return [int.from_bytes(data[at : at + 8], "big") for at in range(0, len(data), 8)]


async def test_a_table_is_made_once_for_all_who_want_it(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 4 * GiB)
    async with writable(path) as node:
        await asyncio.gather(*(write(node, at * C, bytes([at + 1]) * C) for at in range(8)))
        await asyncio.gather(*(write(node, SPAN + at * C, b"x") for at in range(3)))
    l1 = await entries(path)
    assert [bool(entry & COPIED) for entry in l1] == [True, True] + [False] * 6
    assert not any(l1[2:])
    await sound(path)


async def test_a_shared_table_is_copied_before_its_first_change(tmp_path: Path) -> None:
    """As a whole, though one entry changes; the snapshot keeps the old one."""
    path = tmp_path / "x.qcow2"
    clusters = {number * C: Data(bytes([number + 1]) * C) for number in range(4)}
    Image(size=16 * MiB, clusters=clusters, snapshots=[InternalSnapshot("s", clusters)]).write(path)
    (before, *_) = await entries(path)
    # QEMU shares the table too, when a snapshot is made: the active L1 names that of the snapshot.
    header = await header_of(path)
    snapshot = bytes_of(path)[header.snapshots_offset :][:8]
    shared = int.from_bytes(bytes_of(path)[int.from_bytes(snapshot, "big") :][:8], "big")
    shared &= ~COPIED
    block = int.from_bytes(bytes_of(path)[header.refcount_table_offset :][:8], "big")
    poke(path, header.l1_table_offset, shared.to_bytes(8, "big"))
    poke(path, block + 2 * (shared // C), (2).to_bytes(2, "big"))
    poke(path, block + 2 * ((before & ~COPIED) // C), (0).to_bytes(2, "big"))
    await sound(path)
    old = bytes_of(path)[shared:][:C]
    async with writable(path) as node:
        await zero(node, 3 * C, C)
        await write(node, 0, b"new")
    (after, *_) = await entries(path)
    assert after & COPIED
    assert after & ~COPIED != shared
    assert bytes_of(path)[shared:][:C] == old
    await sound(path)
    data = qemu_contents(path, "-l", "s")
    assert all(data[at * C : (at + 1) * C] == bytes([at + 1]) * C for at in range(4))
    assert qemu_contents(path)[: 4 * C] == (
        b"new" + b"\1" * (C - 3) + b"\2" * C + b"\3" * C + bytes(C)
    )


async def test_a_table_without_copied_that_nobody_shares(tmp_path: Path) -> None:
    """The flag is wrong, and is not trusted the other way: the table is copied, and the place of
    the old one used again, for a table too.
    """
    path = tmp_path / "x.qcow2"
    written = Image(size=4 * SPAN, clusters={0: Data(b"a" * C)}).write(path)
    place = written.header.l1_table_offset
    entry = int.from_bytes(bytes_of(path)[place : place + 8], "big")
    poke(path, place, (entry & ~COPIED).to_bytes(8, "big"))
    async with writable(path) as node:
        for number in range(4):
            await write(node, number * SPAN + C, bytes([number + 1]) * C)
            await node.flush()
            await node.flush()
        places = [value & ~COPIED for value in await entries(path)]
        assert entry & ~COPIED in places[1:]
        for number in range(4):
            assert await node.pread(number * SPAN + C, C) == bytes([number + 1]) * C
        assert await node.pread(0, C) == b"a" * C
    await sound(path)


@pytest.mark.parametrize("cached", [True, False])
async def test_what_was_changed_is_read_back(tmp_path: Path, cached: bool) -> None:
    """More tables than the cache keeps, changed, committed, and changed again."""
    path = create(tmp_path / "x.qcow2", 64 * MiB, "cluster_size=512")
    async with writable(path) as node:
        if not cached:
            node.mapping.tables._limit = 4
        for turn in range(2):
            for number in range(100):
                await write(node, number * 640 * 1024 + turn * 512, bytes([number + 1]) * 512)
            if turn == 0:
                await node.flush()
        node.resolved.forget(0, node.size)
        for number in range(100):
            assert await node.pread(number * 640 * 1024, 1024) == bytes([number + 1]) * 1024
    await sound(path)
    data = qemu_contents(path)
    assert all(data[number * 640 * 1024 + 1023] == number + 1 for number in range(100))


async def test_a_table_without_space_is_not_made(tmp_path: Path) -> None:
    """The request fails, and nothing names what was wanted; the next one makes it."""
    path = create(tmp_path / "x.qcow2", 4 * GiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a")
            host.fail(0, 28, "fallocate")
            (error,) = await node.pwrite_batch([(SPAN, b"b")])
            assert error is not None
            assert error.errno == 28
            assert not any(await node.pread(SPAN, 10))
            host.fail(-1, 0)
            await write(node, SPAN, b"c")
    await sound(path)
    assert [bool(entry) for entry in await entries(path)] == [True, True] + [False] * 6
