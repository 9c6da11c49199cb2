"""Trouble with the host: no space, I/O errors, short writes. The request that meets it gets its
errno, the metadata stays consistent, and the next request works.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Compressed, Image
from tests.block.qcow2.images import IMAGES, over_raw
from tests.block.qcow2.writing import (
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

C = 65536


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Files of this process become no longer: a write up to there is short, one beyond fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[Path]:
    """A folder with so many bytes of space."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "pynbd-test", folder],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


async def attempt(node: BlockNode, disk: bytearray, rng: random.Random) -> int:
    """One random request; the errno with which it failed, or 0. Of one that failed each sector
    may have what it wrote or not.
    """
    length = rng.choice([512, 4096, 69_632])
    offset = rng.randrange(0, len(disk) - length) // 512 * 512
    kind = rng.randrange(4)
    data = rng.randbytes(length) if kind < 2 else bytes(length)
    try:
        if kind < 2:
            await write(node, offset, data)
        else:
            await zero(node, offset, length, unmap=kind == 2)
    except OSError as error:
        there = await node.pread(offset, length)
        for at in range(0, length, 512):
            assert there[at : at + 512] in (
                disk[offset + at : offset + at + 512],
                data[at : at + 512],
            )
        disk[offset : offset + length] = there
        return error.errno or -1
    disk[offset : offset + length] = data
    return 0


# Each call in turn --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    "name", ["nothing", "backing", "extended", "zlib", "snapshot", "data-file"]
)
async def test_any_write_may_fail(tmp_path: Path, name: str, code: int) -> None:
    """Now this one, now that one: one request fails, with that errno, and nothing is lost."""
    path = IMAGES[name](tmp_path)
    rng = random.Random(name)
    with watched() as host:
        async with writable(path) as node:
            disk = bytearray(await contents(node))
            for _ in range(40):
                host.fail(rng.randrange(4), code, "write")
                codes = [await attempt(node, disk, rng) for _ in range(3)]
                assert set(codes) <= {0, code}
                assert codes.count(0) >= 2
                host.fail(-1, 0)
                if rng.random() < 0.3:
                    await node.flush()
            assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk


async def test_a_flush_without_space_can_be_repeated(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * C)
            for _ in range(3):
                host.fail(0, errno.ENOSPC, "write")
                with pytest.raises(OSError, match="No space left"):
                    await node.flush()
            (error,) = await node.pwrite_batch([(2 * C, b"x")], fua=True)
            assert error is None
    await sound(path)
    assert qemu_contents(path)[:C] == b"a" * C


async def test_a_file_that_cannot_be_made_longer_at_once(tmp_path: Path) -> None:
    """Room that is only for later is no reason to fail."""
    path = create(tmp_path / "x.qcow2", 4 * MiB)
    with watched() as host:
        host.trouble = lambda call: errno.EFBIG * (call.name == "resize")
        async with writable(path) as node:
            await write(node, 0, b"a" * MiB)
            await write(node, 2 * MiB, b"b" * C)
    await sound(path)


async def test_a_close_without_space(tmp_path: Path) -> None:
    """It says so; the files are closed, and what was flushed before is there."""
    path = create(tmp_path / "x.qcow2", MiB)
    with watched() as host:
        node = await open_image(path, read_only=False)
        await write(node, 0, b"a" * C)
        await node.flush()
        await write(node, C, b"b" * C)
        host.trouble = lambda call: errno.ENOSPC * (call.name == "write")
        with pytest.raises(OSError, match="No space left"):
            await node.close()
    assert node.file is not None
    assert node.file.fd == -1
    report = await report_on(path)
    assert (report.corruptions, report.check_errors) == (0, 0)
    assert qemu_contents(path)[:C] == b"a" * C


@pytest.mark.parametrize("which", ["x.qcow2", "x.data"])
async def test_a_flush_that_fails_of_either_file(tmp_path: Path, which: str) -> None:
    path = create(tmp_path / "x.qcow2", MiB, f"data_file={tmp_path}/x.data")
    with watched() as host:
        node = await open_image(path, read_only=False)
        await write(node, 0, b"a" * C)
        host.trouble = lambda call: errno.EIO * (call.name == "sync" and call.file == which)
        for _ in range(2):
            with pytest.raises(OSError, match=r"Input/output error|earlier flush failed"):
                await node.flush()
        for request in (write(node, 0, b"x"), zero(node, 0, C), node.discard(0, C)):
            with pytest.raises(OSError, match="earlier flush failed"):
                await request
        assert bytes(await node.pread(0, 2)) == b"aa"
        with pytest.raises(OSError, match=r"Input/output error|earlier flush failed"):
            await node.close()


# Real ones ----------------------------------------------------------------------------------------


async def test_short_writes(tmp_path: Path) -> None:
    """The limit is in the middle of a write: what is before it is written, then comes EFBIG. (At
    a sector: of one that was written in part nothing can be said.)
    """
    path = create(tmp_path / "x.qcow2", 4 * MiB)
    rng = random.Random(3)
    disk = bytearray(4 * MiB)
    async with writable(path) as node:
        failed = 0
        for room in (100_352, 333_312, 700_416):
            with longest_file(len(bytes_of(path)) + room):
                codes = [await attempt(node, disk, rng) for _ in range(25)]
            assert set(codes) <= {0, errno.EFBIG}
            failed += codes.count(errno.EFBIG)
            assert [await attempt(node, disk, rng) for _ in range(3)] == [0, 0, 0]
            await node.flush()
            assert await contents(node) == disk
        assert failed
    await sound(path)
    assert qemu_contents(path) == disk


async def test_reserved_zeroes_without_room(tmp_path: Path) -> None:
    """What cannot be reserved is not there; all that is linked is inside the file."""
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    async with writable(path) as node:
        await write(node, 0, b"a" * C)
        with longest_file(len(bytes_of(path)) + 3 * C):
            with pytest.raises(OSError, match=r"large|space"):
                await zero(node, MiB, 4 * MiB, unmap=False, no_hole=True)
            await zero(node, 0, C, unmap=False, no_hole=True)
    await sound(path)
    assert not any(qemu_contents(path))


async def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    """The image grows until there is no space; then some is given back, and it goes on."""
    with small_file_system(tmp_path / "small", 3 * MiB) as folder:
        path = create(folder / "x.qcow2", 64 * MiB)
        async with writable(path) as node:
            codes = []
            for number in range(80):
                (error,) = await node.pwrite_batch([(number * C, bytes([number + 1]) * C)])
                codes.append(error and error.errno)
            full = codes.index(errno.ENOSPC)
            assert set(codes[full:]) == {errno.ENOSPC}
            for number in range(8):
                await node.discard(number * C, C)
            await node.flush()
            for number in range(100, 104):
                await write(node, number * C, b"again" * 100)
            await node.flush()
            for number in range(8, full):
                assert await node.pread(number * C, C) == bytes([number + 1]) * C
        copy = tmp_path / "copy.qcow2"
        shutil.copyfile(path, copy)
    await sound(copy)


# Reading what is copied ---------------------------------------------------------------------------


async def test_a_backing_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Who would have to copy from it fails, and nothing is allocated; others do not."""
    path = over_raw(tmp_path, MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"x" * C)
            await node.flush()
            end = node.metadata_file.size()
            backing = node.backing
            assert backing is not None
            assert backing.file is not None
            backing.file._nowait = False
            descriptor = backing.file._descriptor
            backing.file._descriptor = broken = type(descriptor)(os.open(tmp_path, os.O_RDONLY))
            (error,) = await node.pwrite_batch([(C + 100, b"new")])
            assert error is not None
            assert error.errno == errno.EISDIR
            errors = await node.pwrite_batch([(2 * C, b"y" * C), (3 * C + 1, b"new")])
            assert errors[0] is None
            assert errors[1] is not None
            backing.file._descriptor = descriptor
            broken.release()
            await write(node, C + 100, b"new")
            assert node.metadata_file.size() <= end + 2 * MiB
            host.calls.clear()
    await sound(path)
    base = bytes_of(tmp_path / "base.raw")
    expected = bytearray(b"x" * C + base[C:])
    expected[C + 100 : C + 103] = b"new"
    expected[2 * C : 3 * C] = b"y" * C
    assert qemu_contents(path) == expected


async def test_a_compressed_cluster_that_is_damaged(tmp_path: Path) -> None:
    """It cannot be copied, but it can be written as a whole, or given back."""
    path = tmp_path / "x.qcow2"
    Image(
        size=MiB,
        clusters={number * C: Compressed(stream=b"\xff" * 100) for number in range(3)},
    ).write(path)
    async with writable(path) as node:
        (error,) = await node.pwrite_batch([(100, b"new")])
        assert error is not None
        assert error.errno == errno.EIO
        await write(node, 0, b"n" * C)
        await zero(node, C, C)
        assert await node.pread(0, C) == b"n" * C
        with pytest.raises(OSError, match="damaged"):
            await node.pread(2 * C, 1)
        assert not (await header_of(path)).incompatible & 2
    await sound(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: write(node, 0, b"x"),
        lambda node: zero(node, 0, C),
        lambda node: node.discard(0, C),
    ],
)
async def test_a_table_that_cannot_be_read(
    tmp_path: Path, change: Callable[[BlockNode], object]
) -> None:
    """The request fails, and is all right once the table can be read again."""
    path = create(tmp_path / "x.qcow2", MiB)
    async with writable(path) as node:
        await write(node, 0, b"a" * C)
    async with writable(path) as node:
        await write(node, 0, b"b")  # so that it has begun
    async with writable(path) as node:
        file = node.metadata_file
        file._nowait = False
        descriptor = file._descriptor
        file._descriptor = broken = type(descriptor)(os.open(tmp_path, os.O_RDONLY))
        with pytest.raises(OSError, match="directory"):
            await change(node)  # type: ignore[misc]
        file._descriptor = descriptor
        broken.release()
        await change(node)  # type: ignore[misc]
    await sound(path)


async def test_half_of_a_batch(tmp_path: Path) -> None:
    """Each request of a batch has its own error."""
    path = create(tmp_path / "x.qcow2", MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a" * 8 * C)
            host.fail(0, errno.EIO, "write")  # the second half of the pieces
            errors = await node.pwrite_batch([(at * C, b"b" * 5000) for at in range(8)])
            assert [error and error.errno for error in errors] == [None] * 4 + [errno.EIO] * 4
            host.fail(0, errno.EIO, "write")
            errors = await node.pwrite_batch([(at * C, b"c" * C) for at in range(8, 16)])
            assert [error and error.errno for error in errors] == [None] * 4 + [errno.EIO] * 4
            host.fail(-1, 0)
            assert await node.pread(8 * C, C) == b"c" * C
            assert not any(await node.pread(12 * C, C))
    await sound(path)


async def test_one_of_a_batch_has_no_space(tmp_path: Path) -> None:
    """It needs a new table; the others are written."""
    path = create(tmp_path / "x.qcow2", 2048 * MiB)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 0, b"a")
            host.trouble = lambda call: errno.ENOSPC * (call.name == "fallocate")
            errors = await node.pwrite_batch([(C, b"b"), (1024 * MiB, b"c"), (2 * C, b"d")])
            assert [error and error.errno for error in errors] == [None, errno.ENOSPC, None]
            host.trouble = lambda call: 0
            assert bytes(await node.pread(C, 1) + await node.pread(2 * C, 1)) == b"bd"
            assert not any(await node.pread(1024 * MiB, C))
    await sound(path)
