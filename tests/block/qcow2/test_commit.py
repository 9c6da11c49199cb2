"""Commits: in which order metadata is written, what a failure leaves, who shares one.

The order is that of `pynbd.block.qcow2.commit`; that it is enough is what the crash tests show
(`interop/soak`). Here a file is watched call by call: at every call, and with every piece that is
written since the last barrier alone, the image has no corruption.
"""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import commit
from pynbd.block.qcow2.builder import Data, Image, InternalSnapshot
from pynbd.block.qcow2.format import Incompatible
from tests.block.qcow2.writing import (
    Call,
    Host,
    KiB,
    MiB,
    bytes_of,
    create,
    header_of,
    report_on,
    sound,
    watched,
    writable,
    write,
    zero,
)
from tests.block.reading import contents, qemu_contents

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


class Crashes:
    """The images that a crash could leave, of one file that is watched: at each call, and with one
    piece of those since the last barrier.
    """

    def __init__(self, path: Path, host: Host) -> None:
        self.path = path
        self.host = host
        self.images: set[bytes] = set()
        self._stable = bytes_of(path)
        self._then = host.trouble
        host.trouble = self.watch

    def fail(self, number: int, code: int, *names: str) -> None:
        self.host.fail(number, code, *names)
        self._then, self.host.trouble = self.host.trouble, self.watch

    def watch(self, call: Call) -> int:
        code = self._then(call)
        now = bytes_of(self.path)
        self.images.add(now)
        if call.name == "sync":
            self._stable = now
        for (offset, _), data in zip(call.ranges, call.data, strict=False):
            image = bytearray(self._stable.ljust(offset + len(data), b"\0"))
            image[offset : offset + len(data)] = data
            self.images.add(bytes(image))
        return code

    async def judge(self) -> None:
        copy = self.path.with_name("crashed.qcow2")
        for image in self.images:
            put(copy, image)
            if Incompatible.DIRTY not in (await header_of(copy)).incompatible:
                report = await report_on(copy)
                assert not report.corruptions, report.findings


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def shared_l2(path: Path) -> None:
    clusters = {number << 9: Data(bytes([number + 1]) * 512) for number in range(8)}
    Image(
        size=64 * KiB,
        cluster_bits=9,
        clusters=clusters,
        snapshots=[InternalSnapshot("s", clusters)],
    ).write(path)


def tables_grow(path: Path) -> None:
    create(path, 256 * KiB, "cluster_size=512,refcount_bits=64")


def lazy(path: Path) -> None:
    create(path, 256 * KiB, "cluster_size=512,lazy_refcounts=on")


def plain(path: Path) -> None:
    create(path, 256 * KiB, "cluster_size=512,refcount_bits=1")


MAKERS: list[Callable[[Path], None]] = [plain, tables_grow, shared_l2, lazy]


async def change(node: BlockNode, disk: bytearray, seed: int) -> None:
    """Some requests that allocate, copy and free."""
    rng = random.Random(seed)
    for _ in range(6):
        length = rng.choice([100, 512, 3000])
        offset = rng.randrange(0, len(disk) - length)
        if rng.random() < 0.3:
            disk[offset : offset + length] = bytes(length)
            await zero(node, offset, length)
        else:
            disk[offset : offset + length] = data = rng.randbytes(length)
            await write(node, offset, data)


@pytest.mark.parametrize("make", MAKERS)
async def test_a_write_of_a_commit_fails(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Each in turn. Nothing is lost, more is changed, and the next commit writes all of it; what a
    crash would leave meanwhile has no corruption.
    """
    template, path = tmp_path / "template.qcow2", tmp_path / "x.qcow2"
    make(template)
    number, failed = 0, True
    while failed:
        shutil.copyfile(template, path)
        with watched() as host:
            async with writable(path) as node:
                disk = bytearray(await contents(node))
                await change(node, disk, 1)
                await node.flush()
                await change(node, disk, 2)
                crashes = Crashes(path, host)
                crashes.fail(number, errno.EIO, "write")
                failed = await flush_fails(node)
                crashes.fail(-1, 0)
                await change(node, disk, 3)
                await node.flush()
                assert await contents(node) == disk
        await crashes.judge()
        await sound(path)
        assert qemu_contents(path) == disk
        number += 1
    assert number > 2


@pytest.mark.parametrize("make", MAKERS)
async def test_a_barrier_of_a_commit_fails(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Each in turn: all fails from then on, and what is on disk has no corruption."""
    template, path = tmp_path / "template.qcow2", tmp_path / "x.qcow2"
    make(template)
    number, failed = 0, True
    while failed:
        shutil.copyfile(template, path)
        with watched() as host:
            node = await open_image(path, read_only=False)
            disk = bytearray(await contents(node))
            await change(node, disk, 1)
            await node.flush()
            await change(node, disk, 2)
            crashes = Crashes(path, host)
            crashes.fail(number, errno.EIO, "sync")
            failed = await flush_fails(node)
            crashes.fail(-1, 0)
            if failed:
                await everything_fails(node)
                assert await contents(node) == disk
                with pytest.raises(OSError, match="earlier flush"):
                    await node.close()
            else:
                await node.close()
        await crashes.judge()
        number += 1
    assert number > 1


async def flush_fails(node: BlockNode) -> bool:
    """Whether it does; with EIO then."""
    try:
        await node.flush()
    except OSError as error:
        if error.errno == errno.EIO:
            return True
        raise
    return False


async def everything_fails(node: BlockNode) -> None:
    """What changes the image, and every flush."""
    for request in (
        node.flush(),
        write(node, 0, b"x"),
        write(node, 0, b"x", fua=True),
        zero(node, 0, 512),
        node.discard(0, 4096),
    ):
        with pytest.raises(OSError, match="earlier flush failed"):
            await request


async def test_the_order_of_one_allocating_write(tmp_path: Path) -> None:
    """Data; the L2 table that is new and the refcounts; a barrier; the L1 entry; a barrier."""
    path = create(tmp_path / "x.qcow2", MiB)
    l1 = (await header_of(path)).l1_table_offset
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"data" * 16 * KiB)
            (data,) = [call for call in host.calls if call.name == "write"]
            host.calls.clear()
            await node.flush()
            calls = list(host.calls)
    assert [call.name for call in calls] == ["write", "sync", "write", "sync"]
    tables, _, links, _ = calls
    assert links.ranges == ((l1, 8 * 2),) or links.touches(l1, 8)
    assert not tables.touches(l1, 8)
    assert len(tables.ranges) >= 2
    assert not tables.touches(*data.ranges[0])


async def test_flushes_that_wait_share_the_next_commit(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * 65536)
            await node.flush()
            host.calls.clear()
            gate = host.gate(lambda call: call.name == "sync")
            first = asyncio.create_task(node.flush())
            await gate.reached()
            others = [asyncio.create_task(node.flush()) for _ in range(5)]
            await asyncio.sleep(0.01)
            gate.opened.set()
            await asyncio.gather(first, *others)
            assert host.count("sync") == 2


async def test_what_is_linked_while_a_commit_runs_belongs_to_the_next(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB)
    copy = tmp_path / "copy.qcow2"
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * 65536)
            gate = host.gate(lambda call: call.name == "sync")
            flush = asyncio.create_task(node.flush())
            await gate.reached()
            await write(node, 65536, b"b" * 65536)  # waits for nobody
            gate.opened.set()
            await flush
            put(copy, bytes_of(path))
            async with await open_image(copy) as then:
                assert bytes(await then.pread(0, 65536)) == b"a" * 65536
                assert not any(await then.pread(65536, 65536))
            await node.flush()
            put(copy, bytes_of(path))
            async with await open_image(copy) as then:
                assert bytes(await then.pread(65536, 65536)) == b"b" * 65536
    await sound(path)


@pytest.mark.parametrize("fails", [False, True])
async def test_the_tables_grow_while_a_commit_runs(tmp_path: Path, fails: bool) -> None:
    """At each call of a commit that moves the refcount table comes a write that moves it again;
    then that call fails, or does not.
    """
    template, path = tmp_path / "template.qcow2", tmp_path / "x.qcow2"
    create(template, 5 * MiB, "cluster_size=512,refcount_bits=64")
    data = random.Random(3).randbytes(5 * MiB)
    for number in range(5):
        shutil.copyfile(template, path)
        with watched() as host:
            async with writable(path) as node:
                await write(node, 0, data[: 2 * MiB])
                host.calls.clear()
                gate = host.gate(lambda call, nth=number + 1: len(host.calls) == nth)  # type: ignore[misc]
                flush = asyncio.create_task(flush_fails(node))
                await gate.reached()
                host.gates.clear()
                held = host.calls[-1]
                await write(node, 2 * MiB, data[2 * MiB :])
                if fails and held.name == "write":
                    host.trouble = lambda call, bad=held: errno.EIO * (call is bad)  # type: ignore[misc]
                gate.opened.set()
                assert await flush is (fails and held.name == "write")
                await node.flush()
                assert (await header_of(path)).refcount_table_clusters > 2
        await sound(path)
        assert qemu_contents(path) == data


@pytest.mark.parametrize("times", [1, 3])
async def test_the_header_cannot_name_the_new_refcount_table(tmp_path: Path, times: int) -> None:
    """However often that fails, nothing is lost, and the commit that can does it."""
    path = create(tmp_path / "x.qcow2", 5 * MiB, "cluster_size=512,refcount_bits=64")
    data = random.Random(3).randbytes(5 * MiB)
    fields = (48, 12)  # refcount_table_offset, refcount_table_clusters
    with watched() as host:
        async with writable(path) as node:
            for step in range(times):
                await write(node, step * MiB, data[step * MiB : 3 * MiB])
                host.trouble = lambda call: (
                    errno.EIO * (call.name == "write" and call.touches(*fields))
                )
                assert await flush_fails(node)
            host.trouble = lambda call: 0
            await write(node, 3 * MiB, data[3 * MiB :])
            await node.flush()
    await sound(path)
    assert qemu_contents(path) == data


async def test_what_was_freed_does_not_wait_for_a_flush_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who flushes has to wait until very many clusters were punched."""
    monkeypatch.setattr(commit, "MAX_FREED", 4)
    path = create(tmp_path / "x.qcow2", MiB, "cluster_size=4k")
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * MiB)
            await node.flush()
            host.calls.clear()
            for offset in range(0, 40 * KiB, 8 * KiB):
                await node.discard(offset, 4 * KiB)
            assert host.count("sync")
            assert host.count("fallocate") == 5
    await sound(path)


# Lazy refcounts -----------------------------------------------------------------------------------


async def test_the_dirty_bit_comes_first_and_goes_last(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB, "lazy_refcounts=on")
    copy = tmp_path / "copy.qcow2"
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * 65536)
            assert not (await header_of(path)).incompatible
            host.calls.clear()
            await node.flush()
            assert [call.name for call in host.calls][:3] == ["write", "sync", "write"]
            assert host.calls[0].ranges == ((72, 8),)
            put(copy, bytes_of(path))
            host.calls.clear()
        assert host.calls[-2].name == "sync" or host.calls[-2].ranges == ((72, 8),)
        bit = max(number for number, call in enumerate(host.calls) if call.ranges == ((72, 8),))
        assert "sync" in [call.name for call in host.calls[:bit]]
        assert [call.name for call in host.calls[bit + 1 :] if call.name != "resize"] == ["sync"]
    await sound(path)
    assert not (await header_of(path)).incompatible
    # As a crash would have left it: marked, and repaired when it is opened for writing.
    assert (await header_of(copy)).incompatible == Incompatible.DIRTY
    async with writable(copy) as node:
        assert bytes(await node.pread(0, 65536)) == b"a" * 65536
    await sound(copy)


async def test_an_image_that_is_only_flushed_is_never_dirty(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB, "lazy_refcounts=on")
    before = bytes_of(path)
    async with writable(path) as node:
        await node.flush()
    assert bytes_of(path) == before
