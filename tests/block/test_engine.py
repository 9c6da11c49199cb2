"""HostFile on real files: what stays in the loop, what goes to the pool, what is remembered.

No system call is replaced. A disk that fails is a descriptor that refuses (/dev/full, a pipe), a
disk that is full is a limit on the file size.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.engine import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    NOWAIT_MAX,
    Buffer,
    Engine,
    HostFile,
)
from pynbd.block.pool import Lane
from tests.block.devices import loop_device
from tests.block.reading import eventually

PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
ZERO = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
DATA = random.Random(1).randbytes(1 << 20)


class CountingEngine(Engine):
    """An engine that counts its hops."""

    def __init__(self) -> None:
        super().__init__(2)
        self.hops = 0

    def start(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self.hops += 1
        return super().start(call, *args)

    def start_in_lane(
        self, lane: Lane, call: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        return self.start(call, *args)


class HeldEngine(Engine):
    """An engine of one thread, whose calls wait in the pool until they are let go."""

    def __init__(self) -> None:
        super().__init__(1)
        self.quick_writes = None
        self.entered = threading.Event()
        self._go_on = threading.Semaphore(0)

    def start(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return super().start(self._held, call, *args)

    def start_in_lane(
        self, lane: Lane, call: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        return self.start(call, *args)

    def _held(self, call: Callable[..., Any], *args: Any) -> Any:
        self.entered.set()
        assert self._go_on.acquire(timeout=10)
        return call(*args)

    def let_go(self, calls: int) -> None:
        self._go_on.release(calls)


@pytest.fixture
def engine() -> Iterator[CountingEngine]:
    engine = CountingEngine()
    yield engine
    engine.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def file(engine: CountingEngine, path: Path) -> Iterator[HostFile]:
    file = HostFile.open(engine, str(path), writable=True)
    yield file
    file.close()


def content(path: Path) -> bytes:
    return path.read_bytes()


@contextmanager
def descriptor(engine: Engine, path: str) -> Iterator[HostFile]:
    """A file that `HostFile.open` would refuse, to see it fail."""
    file = HostFile(engine, path, os.open(path, os.O_RDWR | os.O_CLOEXEC), writable=True)
    yield file
    file.close()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows past ``size``: the write that would is short, the next
    fails.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def evict(path: Path) -> None:
    """Drop a file from the page cache, which tmpfs cannot; a file beside it shows that."""
    beside = path.with_name("beside")
    beside.write_bytes(DATA)
    drop(beside)
    with beside.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:  # which made the kernel begin to read
            drop(path)
            return
        except OSError:
            pass
    pytest.skip("this file system keeps its pages")


async def steps_of(awaitable: Awaitable[object]) -> int:
    """How often a coroutine waits."""
    steps = 0
    iterator = awaitable.__await__()
    while True:
        try:
            future = next(iterator)
        except StopIteration:
            return steps
        steps += 1
        if future is not None:
            future._asyncio_future_blocking = False
            await asyncio.wait([future])


# Reading -----------------------------------------------------------------------------------------


async def test_a_hit_never_leaves_the_loop(file: HostFile, engine: CountingEngine) -> None:
    view = bytearray(NOWAIT_MAX)
    assert await steps_of(file.read(memoryview(view), 4096)) == 0
    assert engine.hops == 0
    assert view == DATA[4096 : 4096 + NOWAIT_MAX]


async def test_a_miss_goes_to_the_pool(file: HostFile, engine: CountingEngine, path: Path) -> None:
    view = bytearray(4096)
    for _ in range(20):  # the look into the page cache begins to read, and the disk may be quick
        evict(path)
        assert await file.read(memoryview(view), 8192) == 4096
        assert view == DATA[8192:12288]
        if engine.hops:
            break
    assert engine.hops == 1
    # And now it is a hit.
    assert await file.read(memoryview(view), 8192) == 4096
    assert engine.hops == 1


async def test_a_long_read_does_not_hold_the_loop(file: HostFile, engine: CountingEngine) -> None:
    view = bytearray(NOWAIT_MAX + 1)
    assert file.read_now(view, 0) == 0
    assert await file.read(memoryview(view), 0) == len(view)
    assert engine.hops == 1
    assert view == DATA[: len(view)]


async def test_the_end_of_the_file(file: HostFile) -> None:
    view = bytearray(b"\xaa" * 100)
    assert await file.read(memoryview(view), len(DATA) - 60) == 60
    assert view == DATA[-60:] + b"\xaa" * 40
    assert await file.read(memoryview(view), len(DATA) + 5) == 0
    assert await file.read_bytes(100, len(DATA) - 1) == DATA[-1:]
    assert await file.read_bytes(4, 4) == DATA[4:8]


async def test_a_partial_hit_is_completed_in_the_pool(
    file: HostFile, engine: CountingEngine, path: Path
) -> None:
    evict(path)
    half = len(DATA) // 2
    os.pread(file.fd, len(DATA), 0)
    os.posix_fadvise(file.fd, half, half, os.POSIX_FADV_DONTNEED)
    start = half - NOWAIT_MAX // 2
    view = bytearray(NOWAIT_MAX)
    if not 0 < file.read_now(view, start) < NOWAIT_MAX:
        pytest.skip("this file system keeps its pages")
    assert await file.read(memoryview(view), start) == NOWAIT_MAX
    assert engine.hops == 1
    assert view == DATA[start : start + NOWAIT_MAX]


async def test_without_nowait_everything_goes_to_the_pool(engine: CountingEngine) -> None:
    """Not every file system takes RWF_NOWAIT; procfs does not."""
    path = "/proc/version"
    file = HostFile(engine, path, os.open(path, os.O_RDONLY), writable=False)
    for hops in (1, 2):
        view = bytearray(5)
        assert file.read_now(view, 0) == 0
        assert await file.read(memoryview(view), 0) == 5
        assert view == b"Linux"
        assert engine.hops == hops
    file.close()


async def test_resident(file: HostFile, path: Path) -> None:
    if not file.resident(0, 4096):
        pytest.skip("cachestat needs Linux 6.5")
    assert file.resident(0, len(DATA))
    assert file.resident(5000, 10)
    evict(path)
    assert not file.resident(0, 4096)
    os.pread(file.fd, len(DATA), 0)
    half = len(DATA) // 2
    os.posix_fadvise(file.fd, half, half, os.POSIX_FADV_DONTNEED)
    assert file.resident(half - 8192, 8192)
    assert file.resident(half - 5000, 5000)
    assert not file.resident(half - 4096, 8192)
    assert not file.resident(0, len(DATA))


async def test_nothing_is_resident_past_the_end(engine: Engine, tmp_path: Path) -> None:
    """The last page is in the cache whole, but send-file stops where the file does."""
    short = tmp_path / "short"
    short.write_bytes(DATA[:10_000])
    file = HostFile.open(engine, str(short), writable=False)
    if not file.resident(0, 10_000):
        pytest.skip("cachestat needs Linux 6.5")
    assert not file.resident(0, 10_001)
    assert not file.resident(0, 12_288)
    assert not file.resident(8192, 4096)
    file.close()


async def test_reading_ahead(engine: CountingEngine, file: HostFile, path: Path) -> None:
    if not file.resident(0, 4096):
        pytest.skip("cachestat needs Linux 6.5")
    evict(path)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)  # only what is asked for
    await file.will_need([(0, 300_000), (500_000, 1), (600_000, 200_000)])
    assert engine.hops == 1
    await eventually(lambda: file.resident(0, 300_000) and file.resident(600_000, 200_000))
    await eventually(lambda: file.resident(500_000, 1))
    assert not file.resident(300_000, 200_000)
    assert not file.resident(800_000, 100_000)


async def test_pages_that_are_being_read_are_not_resident(file: HostFile, path: Path) -> None:
    """The page cache has them, but a send-file would wait for the disk."""
    if not file.resident(0, 4096):
        pytest.skip("cachestat needs Linux 6.5")
    for _ in range(20):
        evict(path)
        os.posix_fadvise(file.fd, 0, len(DATA), os.POSIX_FADV_WILLNEED)
        while not file.resident(0, len(DATA)):
            pass
        for offset in range(0, len(DATA), NOWAIT_MAX):
            assert file.read_now(bytearray(NOWAIT_MAX), offset) == NOWAIT_MAX


async def test_a_page_that_could_not_be_read_is_not_resident(engine: Engine, path: Path) -> None:
    """It stays in the page cache, and the next who needs it asks the disk again."""
    with loop_device(path) as device:
        file = HostFile.open(engine, device, writable=False)
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        half = len(DATA) // 2
        await file.read_unless_hole(half, 0, sparse=False)
        if not file.resident(0, half):
            pytest.skip("cachestat needs Linux 6.5")
        os.truncate(path, half)
        os.posix_fadvise(file.fd, half, half, os.POSIX_FADV_DONTNEED)
        error = await refused(file.read_unless_hole(4096, half, sparse=False))
        assert error.errno == errno.EIO
        assert not file.resident(half, 4096)
        assert not file.resident(half - 8192, 8192 + 4096)
        file.close()


async def test_a_file_whose_pages_cannot_be_told(engine: Engine, file: HostFile) -> None:
    """Huge pages are not told: nobody asks again. Any other trouble passes."""
    if not file.resident(0, 4096):
        pytest.skip("cachestat needs Linux 6.5")
    try:
        huge = HostFile(engine, "huge", os.memfd_create("huge", os.MFD_HUGETLB), writable=True)
    except OSError:
        pytest.skip("this kernel has no huge pages")
    assert not huge.resident(0, 4096)
    assert not huge._cachestat
    huge.close()
    number, file.fd = file.fd, -1
    assert not file.resident(0, 4096)
    file.fd = number
    assert file.resident(0, 4096)


async def test_tmpfs_has_no_disk_to_wait_for(engine: Engine, file: HostFile) -> None:
    """It takes no RWF_NOWAIT, and needs none."""
    if not file.resident(0, 4096):
        pytest.skip("cachestat needs Linux 6.5")
    memory = HostFile(engine, "memory", os.memfd_create("memory"), writable=True)
    await memory.write(DATA, 0)
    assert memory.resident(0, len(DATA))
    assert not memory.resident(0, len(DATA) + 1)
    memory.close()


# Holes -------------------------------------------------------------------------------------------

K = 1 << 10


def sparse(path: Path, pieces: Sequence[int], size: int) -> None:
    """A file with 64 KiB of data at each offset."""
    with path.open("wb") as file:
        for offset in pieces:
            file.seek(offset)
            file.write(b"\x55" * (64 * K))
        file.truncate(size)
        os.fsync(file.fileno())


async def test_data_runs(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    sparse(path, [64 * K, 256 * K], 1024 * K)
    file = HostFile.open(engine, str(path), writable=False)
    if await file.data_runs(0, K, 9) == [(K, True)]:
        pytest.skip("this file system has no SEEK_DATA")
    everything = [
        (64 * K, False),
        (64 * K, True),
        (128 * K, False),
        (64 * K, True),
        (704 * K, False),
    ]
    assert await file.data_runs(0, 1024 * K, 9) == everything
    assert await file.data_runs(0, 1024 * K, 3) == everything[:3]
    # Clipped at both ends, and no data past the end of the file.
    assert await file.data_runs(100 * K, 60 * K, 9) == [(28 * K, True), (32 * K, False)]
    assert await file.data_runs(300 * K, 8 * K, 9) == [(8 * K, True)]
    assert await file.data_runs(1000 * K, 100 * K, 9) == [(100 * K, False)]
    assert await file.data_runs(2000 * K, K, 9) == [(K, False)]
    assert file.allocated_size() in range(128 * K, 256 * K)
    assert file.size() == 1024 * K
    file.close()


async def test_a_read_looks_for_a_hole_first(engine: CountingEngine, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    sparse(path, [64 * K], 256 * K)
    file = HostFile.open(engine, str(path), writable=False)
    if await file.data_runs(0, K, 9) == [(K, True)]:
        pytest.skip("this file system has no SEEK_DATA")
    whole = bytes(64 * K) + b"\x55" * (64 * K) + bytes(128 * K)
    engine.hops = 0
    assert await file.read_unless_hole(64 * K, 0, sparse=True) is None
    assert engine.hops == 1
    for offset, length in ((0, 64 * K + 1), (100 * K, 100 * K), (0, 256 * K)):
        read = await file.read_unless_hole(length, offset, sparse=True)
        assert read == whole[offset : offset + length]
    assert engine.hops == 4
    assert await file.read_unless_hole(64 * K, 0, sparse=False) == bytes(64 * K)
    # Up to the end of the file, and not past it.
    assert await file.read_unless_hole(128 * K, 128 * K, sparse=True) is None
    assert await file.read_unless_hole(129 * K, 128 * K, sparse=True) == bytes(128 * K)
    assert await file.read_unless_hole(10, 300 * K, sparse=True) == b""
    file.close()


async def test_a_file_without_seek_data_is_all_data(engine: Engine) -> None:
    reading, writing = os.pipe()
    file = HostFile(engine, "a pipe", reading, writable=False)
    assert await file.data_runs(0, 5000, 9) == [(5000, True)]
    file.close()
    os.close(writing)


# Writing -----------------------------------------------------------------------------------------


async def test_a_batch_is_one_hop(file: HostFile, engine: CountingEngine, path: Path) -> None:
    pieces: list[tuple[Buffer, int]] = [
        (b"one", 0),
        (memoryview(b"-two-")[1:4], 4096),
        (bytearray(b"three"), 1 << 21),
    ]
    assert await file.write_batch(pieces, fua=True) == [None, None, None]
    assert engine.hops == 2  # one for the bytes, one for the flush
    assert len(content(path)) == (1 << 21) + 5
    assert await file.read_bytes(3, 0) == b"one"
    assert await file.read_bytes(3, 4096) == b"two"
    assert await file.read_bytes(5, 1 << 21) == b"three"


async def test_a_full_disk(engine: CountingEngine) -> None:
    with descriptor(engine, "/dev/full") as file:
        errors = await file.write_batch([(b"x", 0), (b"y", 1)])
        assert [error and error.errno for error in errors] == [errno.ENOSPC] * 2
        with pytest.raises(OSError, match="No space left") as caught:
            await file.write(b"x", 0)
        assert caught.value.errno == errno.ENOSPC


async def test_a_short_write_goes_on(engine: Engine, tmp_path: Path) -> None:
    """Of one piece some bytes fit, and the rest is an error; the pieces beside it are not hurt."""
    path = tmp_path / "limited"
    path.touch()
    file = HostFile.open(engine, str(path), writable=True)
    with largest_file(10_000):
        errors = await file.write_batch([(DATA[:8192], 4096), (b"first", 0), (b"last", 20_000)])
    assert [error and error.errno for error in errors] == [errno.EFBIG, None, errno.EFBIG]
    assert len(content(path)) == 10_000
    assert content(path)[4096:] == DATA[:5904]
    assert content(path)[:5] == b"first"
    file.close()


async def test_a_file_that_cannot_be_written(engine: Engine, path: Path) -> None:
    file = HostFile.open(engine, str(path), writable=False)
    (error,) = await file.write_batch([(b"x", 0)])
    assert error is not None
    assert error.errno == errno.EBADF
    await file.flush()  # there is nothing to flush
    assert content(path) == DATA
    file.close()


# Flushing ----------------------------------------------------------------------------------------


async def refused(call: Awaitable[object]) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await call
    return caught.value


@contextmanager
def failing_sync(file: HostFile) -> Iterator[None]:
    """The descriptor is a pipe for a while: fdatasync(2) of a pipe fails."""
    kept = os.dup(file.fd)
    reading, writing = os.pipe()
    os.dup2(writing, file.fd)
    try:
        yield
    finally:
        os.dup2(kept, file.fd)
        for fd in (kept, reading, writing):
            os.close(fd)


async def test_a_failed_flush_is_remembered(engine: Engine, file: HostFile, path: Path) -> None:
    await file.flush()
    with failing_sync(file):
        await refused(file.flush())
    # The descriptor would flush again, but pages may be lost.
    os.fdatasync(file.fd)
    for call in (file.flush(), file.write(b"x", 0), file.fallocate(PUNCH, 0, 4096)):
        error = await refused(call)
        assert error.errno == errno.EIO
        assert "an earlier flush failed" in str(error)
        assert str(path) in str(error)
    assert len(await file.write_batch([(b"x", 0), (b"y", 1)], fua=True)) == 2
    assert content(path) == DATA
    # What was read stays readable, and whoever opens the file anew starts anew.
    assert await file.read_bytes(16, 0) == DATA[:16]
    again = HostFile.open(engine, str(path), writable=True)
    await again.flush()
    again.close()


async def test_a_failed_fua_fails_every_write_of_its_batch(engine: Engine) -> None:
    with descriptor(engine, "/dev/null") as file:  # takes every write, and cannot be flushed
        assert await file.write_batch([(b"x", 0), (b"y", 9)]) == [None, None]
        assert not file.sync_failed
        errors = await file.write_batch([(b"x", 0), (b"y", 9)], fua=True)
        assert [error and error.errno for error in errors] == [errno.EINVAL] * 2
        assert file.sync_failed


async def test_a_failed_flush_fails_those_that_wait(path: Path) -> None:
    """Linux tells of lost pages once: the flushes after the one that was told would succeed."""
    engine = HeldEngine()
    file = HostFile.open(engine, str(path), writable=True)
    with failing_sync(file):
        first = asyncio.ensure_future(file.flush())
        others = [
            asyncio.ensure_future(call)
            for call in (file.flush(), file.write(b"x", 0), file.write(b"y", 1, fua=True))
        ]
        await asyncio.sleep(0)  # every one has gone to the pool, which has one thread
        engine.let_go(1)
        await refused(first)
    engine.let_go(3)
    for other in others:
        assert (await refused(other)).errno == errno.EIO
    assert content(path) == DATA
    file.close()
    engine.close()


async def test_flushes_that_wait_share_one(path: Path) -> None:
    engine = Engine(8)
    file = HostFile.open(engine, str(path), writable=True)
    with file._sync_lock:  # as if one were under way
        flushes = [asyncio.ensure_future(file.flush()) for _ in range(8)]
        await asyncio.sleep(0.1)
    await asyncio.gather(*flushes)
    assert file._syncs in (1, 2)
    await file.flush()
    assert file._syncs in (2, 3)
    file.close()
    engine.close()


async def test_fua_of_writes_that_all_failed_flushes_nothing(engine: Engine) -> None:
    with descriptor(engine, "/dev/full") as file:
        errors = await file.write_batch([(b"x", 0)], fua=True)
        assert [error and error.errno for error in errors] == [errno.ENOSPC]
        assert not file.sync_failed


# fallocate ---------------------------------------------------------------------------------------


async def test_fallocate(file: HostFile, path: Path) -> None:
    if not await file.fallocate(PUNCH, 4096, 8192):
        pytest.skip("this file system punches no holes")
    assert content(path) == DATA[:4096] + bytes(8192) + DATA[12288:]
    assert await file.data_runs(4096, 8192, 2) == [(8192, False)]
    await file.fallocate(PUNCH, 1 << 21, 4096)  # past the end: the size stays
    assert len(content(path)) == len(DATA)


async def test_what_a_file_cannot_do_is_asked_once(engine: CountingEngine) -> None:
    with descriptor(engine, "/dev/full") as file:
        assert not await file.fallocate(PUNCH, 0, 4096)
        assert not await file.fallocate(ZERO, 0, 4096)
        assert engine.hops == 2
        assert not await file.fallocate(PUNCH, 0, 4096)
        assert not await file.fallocate(ZERO, 8192, 4096)
        assert engine.hops == 2


async def test_a_failing_fallocate_is_not_remembered(engine: CountingEngine, path: Path) -> None:
    file = HostFile.open(engine, str(path), writable=False)
    for _ in range(2):
        error = await refused(file.fallocate(PUNCH, 0, 4096))
        assert (error.errno, error.filename) == (errno.EBADF, str(path))
    assert engine.hops == 2
    file.close()


# Opening -----------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_directory_a_pipe_and_a_character_device_are_refused(
    engine: Engine, tmp_path: Path
) -> None:
    """A pipe without a writer would block; a terminal or /dev/zero is no disk."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = open_files()
    for path in (tmp_path, pipe, Path("/dev/zero")):
        for writable in (False, True):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                HostFile.open(engine, str(path), writable=writable)
            assert caught.value.errno in (errno.EINVAL, errno.EISDIR), path
            assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError):
        HostFile.open(engine, str(tmp_path / "missing"), writable=False)
    assert open_files() == before


@pytest.mark.parametrize("name", ["mem", "environ", "maps"])
def test_what_is_of_a_process_is_no_image(engine: Engine, name: str) -> None:
    """It says that it is a regular file. An image may name the memory of who serves it."""
    before = open_files()
    with pytest.raises(OSError, match="not a regular file or a block device"):
        HostFile.open(engine, f"/proc/self/{name}", writable=False)
    assert open_files() == before


def test_a_file_by_its_descriptor(engine: Engine, path: Path) -> None:
    """/proc has names for what is elsewhere, too."""
    with path.open("rb") as there:
        file = HostFile.open(engine, f"/proc/self/fd/{there.fileno()}", writable=False)
        assert file.size() == len(DATA)
        file.close()


def test_what_is_known_of_a_file(engine: Engine, path: Path) -> None:
    before = open_files()
    file = HostFile.open(engine, str(path), writable=False)
    status = path.stat()
    assert file.identity == (status.st_dev, status.st_ino)
    assert (file.size(), file.is_device) == (len(DATA), False)
    assert not os.get_inheritable(file.fd)
    file.close()
    file.close()  # once is enough
    assert open_files() == before


async def test_a_block_device(engine: Engine, path: Path) -> None:
    with loop_device(path) as device:
        file = HostFile.open(engine, device, writable=True)
        assert (file.is_device, file.size()) == (True, len(DATA))
        assert await file.read_bytes(512, 4096) == DATA[4096 : 4096 + 512]
        await file.write(b"x" * 512, 512, fua=True)
        # The device takes whole sectors only: this says nothing about the next range.
        assert not await file.fallocate(PUNCH, 100, 1000)
        assert await file.fallocate(PUNCH, 8192, 8192)
        file.close()


async def test_a_late_call_never_meets_another_file(path: Path, tmp_path: Path) -> None:
    """The request was cancelled and its file is closed, but the call is still in the pool."""
    engine = HeldEngine()
    file = HostFile.open(engine, str(path), writable=True)
    number = file.fd
    punching = asyncio.ensure_future(file.fallocate(PUNCH, 0, len(DATA)))
    await asyncio.to_thread(engine.entered.wait, 10)
    punching.cancel()
    await asyncio.wait([punching])
    file.close()
    next_path = tmp_path / "next"
    next_path.write_bytes(DATA)
    next_file = HostFile.open(engine, str(next_path), writable=True)
    assert next_file.fd == number
    engine.let_go(1)
    engine.close()
    assert content(next_path) == DATA
    next_file.close()


async def test_a_descriptor_is_closed_after_its_last_call(engine: Engine, path: Path) -> None:
    before = open_files()
    file = HostFile.open(engine, str(path), writable=False)
    entered, leave = threading.Event(), threading.Event()

    def call() -> bytes:
        with file._descriptor as fd:
            entered.set()
            leave.wait(10)
            return os.pread(fd, 4, 0)

    reading = asyncio.ensure_future(engine.run(call))
    await asyncio.to_thread(entered.wait, 10)
    file.close()
    assert file.fd < 0
    assert open_files() == before + 1
    leave.set()
    assert await reading == DATA[:4]
    assert open_files() == before
    # And who comes later finds it closed.
    error = await refused(file.read_unless_hole(4, 0, sparse=False))
    assert error.errno == errno.EBADF


# The pool ----------------------------------------------------------------------------------------


async def test_closing_waits_for_the_calls_under_way() -> None:
    engine = Engine(1)
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        entered.set()
        leave.wait(10)
        left.set()

    running = asyncio.ensure_future(engine.run(call))
    waiting = asyncio.ensure_future(engine.run(call))
    await asyncio.sleep(0)
    entered.wait(10)
    threading.Timer(0.05, leave.set).start()
    engine.close()
    assert left.is_set()
    await running
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_pool_is_bounded() -> None:
    engine = Engine(3)
    together = threading.Barrier(3, timeout=10)
    await asyncio.gather(*(engine.run(together.wait) for _ in range(3)))
    names = await asyncio.gather(
        *(engine.run(lambda: threading.current_thread().name) for _ in range(50))
    )
    assert len(set(names)) <= 3
    engine.close()


def test_a_file_of_which_nothing_is_told(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be opened, and its descriptor is closed again."""
    before, real = open_files(), os.fstat
    for good in range(2):  # how many times it answers
        answers = iter([real] * good)

        def fstat(fd: int, answers: Iterator[Callable[[int], Any]] = answers) -> Any:
            for answer in answers:
                return answer(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", fstat)
            with pytest.raises(OSError, match="Input/output"):
                HostFile.open(engine, str(path), writable=False)
        assert open_files() == before


def test_a_close_that_fails_has_closed(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, before = HostFile.open(engine, str(path), writable=True), os.close, open_files()

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        file.close()
    assert open_files() == before - 1
