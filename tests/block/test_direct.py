"""Files past the page cache: what is read and written there, by many at the same time."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from pynbd.block.cache_modes import Cache
from pynbd.block.direct import Calls, DirectAccess, alignment_of
from pynbd.block.engine import Engine, HostFile
from pynbd.block.file import discard, open_host_file, write_zeroes
from pynbd.errors import ImageError

SIZE = (3 << 20) + 1000


@contextmanager
def opened(path: Path, *, writable: bool = True, cache: Cache = Cache.NONE) -> Iterator[HostFile]:
    engine = Engine(8)
    try:
        file = HostFile.open(engine, str(path), writable=writable, cache=cache.mode)
    except OSError as error:
        engine.close()
        if error.errno == errno.EINVAL:
            pytest.skip("no O_DIRECT here")
        raise
    try:
        yield file
    finally:
        file.close()
        engine.close()


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, bytearray]:
    content = bytearray(random.Random(7).randbytes(SIZE))
    path = tmp_path / "disk"
    path.write_bytes(content)
    return path, content


async def test_reads_of_all_kinds(disk: tuple[Path, bytearray]) -> None:
    path, content = disk
    chance = random.Random(1)
    with opened(path, writable=False) as file:
        assert file.read_now(bytearray(512), 0) == 0
        assert not file.resident(0, 4096)
        for _ in range(100):
            offset = chance.randrange(SIZE + 5000)
            length = chance.choice([1, 511, 512, 4096, 70000, 2 << 20])
            wanted = content[offset : offset + length]
            assert await file.read_bytes(length, offset) == wanted
            assert await file.read_unless_hole(length, offset, sparse=False) == wanted


async def test_unaligned_writers_beside_one_another(disk: tuple[Path, bytearray]) -> None:
    """Each writes its own bytes, which share blocks with those of its neighbours."""
    path, content = disk
    chance = random.Random(2)
    with opened(path) as file:
        for _ in range(12):
            cuts = sorted(chance.sample(range(40000), 60))
            base = chance.choice([0, 100_000, SIZE - 40000])

            async def change(first: int, last: int, kind: int) -> None:
                length = last - first
                if kind == 0:
                    content[first:last] = bytes(length)
                    await write_zeroes(file, first, length, may_unmap=True, fast=False)
                elif kind == 1:
                    content[first:last] = bytes(length)
                    await discard(file, first, length)
                else:
                    data = chance.randbytes(length)
                    content[first:last] = data
                    await file.write(data, first)

            edges = [base + cut for cut in cuts]
            await asyncio.gather(
                *(change(first, last, chance.randrange(6)) for first, last in pairwise(edges))
            )
            assert file.size() == SIZE
    assert path.read_bytes() == content


async def test_whole_blocks_beside_parts_of_them(disk: tuple[Path, bytearray]) -> None:
    path, content = disk
    chance = random.Random(3)
    with opened(path) as file:
        for _ in range(20):
            edges = [0, 4096, 4096 + chance.randrange(1, 4096), 8192, 16384, 16384 + 77, 20480]
            pieces = []
            for first, last in pairwise(edges):
                data = chance.randbytes(last - first)
                content[first:last] = data
                pieces.append(file.write(data, first))
            await asyncio.gather(*pieces)
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1000, 4096, 5000])
@pytest.mark.parametrize("offset, length", [(0, 10), (900, 100), (1000, 24), (4000, 3000)])
async def test_where_the_file_ends(tmp_path: Path, size: int, offset: int, length: int) -> None:
    """As a write of the same bytes through the page cache leaves it."""
    path = tmp_path / "disk"
    path.write_bytes(b"o" * size)
    with opened(path) as file:
        await file.write(b"n" * length, offset)
    expected = bytearray(b"o" * size)
    expected.extend(bytes(max(offset + length - size, 0)))
    expected[offset : offset + length] = b"n" * length
    assert path.read_bytes() == expected


async def test_two_that_make_it_longer(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    for _ in range(30):
        path.write_bytes(b"")
        with opened(path) as file:
            await asyncio.gather(file.write(b"a" * 100, 50), file.write(b"b" * 8192, 4096))
        assert path.read_bytes() == bytes(50) + b"a" * 100 + bytes(3946) + b"b" * 8192


async def test_several_within_the_last_block(tmp_path: Path) -> None:
    """The file ends where the last of them ends, whoever comes last."""
    path = tmp_path / "disk"
    for _ in range(150):
        path.write_bytes(b"o" * 1000)
        with opened(path) as file:
            await asyncio.gather(*(file.write(b"new", 1000 + 4 * place) for place in range(5)))
        assert path.read_bytes() == b"o" * 1000 + b"new\0" * 4 + b"new"


def test_alignments() -> None:
    """As QEMU finds it: the first length that can be read; 4096 if one byte can, or none."""
    for wanted, found in ((512, 512), (2048, 2048), (4096, 4096), (1, 4096), (1 << 20, 4096)):

        def read(fd: int, view: memoryview, offset: int, wanted: int = wanted) -> int:
            if len(view) % wanted or offset % wanted:
                raise OSError(errno.EINVAL, "")
            return 0

        calls = Calls(read, os.pwrite, lambda fd: 0, os.ftruncate)
        assert alignment_of(0, calls) == found


@pytest.mark.parametrize("alignment", [512, 4096])
def test_system_calls_move_whole_blocks(alignment: int) -> None:
    disk = bytearray(random.Random(4).randbytes(3 << 20))
    shadow = bytearray(disk)

    def check(view: memoryview, offset: int) -> None:
        assert not offset % alignment
        assert not len(view) % alignment

    def read(fd: int, view: memoryview, offset: int) -> int:
        check(view, offset)
        count = min(len(view), alignment * 3)  # calls may do less than they were asked for
        view[:count] = disk[offset : offset + count]
        return count

    def write(fd: int, view: memoryview, offset: int) -> int:
        check(view, offset)
        count = min(len(view), alignment * 3)
        disk[offset : offset + count] = view[:count]
        return count

    access = DirectAccess(alignment, Calls(read, write, lambda fd: len(disk), os.ftruncate))
    chance = random.Random(5)
    for _ in range(60):
        offset, length = chance.randrange(1 << 20), chance.choice([1, 600, 4096, 9000, 1500000])
        data = chance.randbytes(length)
        shadow[offset : offset + length] = data
        access.write(0, memoryview(data), offset)
        assert disk == shadow
        back = bytearray(length + 100)
        assert access.read(0, memoryview(back), offset - min(offset, 50)) == len(back)
        assert back == shadow[offset - min(offset, 50) :][: len(back)]


def test_a_file_system_without_it() -> None:
    """/proc has no O_DIRECT; tmpfs has it since Linux 6.6."""
    engine = Engine(1)
    try:
        with pytest.raises(ImageError) as caught:
            open_host_file(engine, "/proc/version", writable=False, cache=Cache.NONE.mode)
    finally:
        engine.close()
    assert "/proc/version: cannot be opened: " in str(caught.value)
    assert "O_DIRECT" in str(caught.value)


@pytest.mark.parametrize("alignment", [512, 4096])
def test_calls_that_move_less_than_they_are_asked(alignment: int) -> None:
    """They may stop in the middle of a block, which then is moved again; all of it is moved."""
    content = bytearray(random.Random(alignment).randbytes(5 * alignment + 100))
    expected = bytearray(content)
    chance = random.Random(1)

    def part(length: int, offset: int) -> int:
        assert not length % alignment
        assert not offset % alignment
        return chance.randrange(alignment, length + 1)  # a whole block, once it is at its front

    def read(fd: int, view: memoryview, offset: int) -> int:
        data = content[offset : offset + part(len(view), offset)]
        view[: len(data)] = data
        return len(data)

    def write(fd: int, view: memoryview, offset: int) -> int:
        count = part(len(view), offset)
        content[offset : offset + count] = view[:count]
        return count

    def truncate(fd: int, size: int) -> None:
        del content[size:]

    access = DirectAccess(alignment, Calls(read, write, lambda fd: len(content), truncate))
    for _ in range(200):
        offset = chance.randrange(len(expected))
        view = memoryview(bytearray(chance.randrange(1, 4 * alignment)))
        count = access.read(-1, view, offset)
        assert view[:count] == expected[offset : offset + len(view)]
        data = chance.randbytes(min(len(view), len(expected) - offset))
        access.write(-1, memoryview(data), offset)
        expected[offset : offset + len(data)] = data
        assert content == expected


def test_a_write_that_writes_nothing() -> None:
    """There is no room: it ends."""
    calls = Calls(lambda *_: 0, lambda *_: 0, lambda _: 8192, lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        DirectAccess(512, calls).write(-1, memoryview(bytes(1024)), 0)
