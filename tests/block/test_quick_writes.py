"""Short writes are made in the loop while nothing can make them wait."""

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from pynbd.block import quick_writes
from pynbd.block.cache_modes import CacheMode
from pynbd.block.engine import WRITE_CALL, WRITE_NOW_MAX, Buffer, Engine, HostFile
from pynbd.block.pool import Lane
from pynbd.block.quick_writes import COUNTED_EVERY, SLOW, QuickWrites, writers_run_free
from tests.block.reading import eventually

PAGE = os.sysconf("SC_PAGE_SIZE")
DATA = random.Random(1).randbytes(64 * PAGE)
# Asking for a page that is not cached begins to read it, and a fast disk is done while one asks.
TRIES = 100


class TalliedEngine(Engine):
    """An engine that knows which calls went to the pool."""

    def __init__(self) -> None:
        super().__init__(2)
        self.calls: list[str] = []

    def start(self, call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self.calls.append(call.__name__)
        return super().start(call, *args)

    def start_in_lane(
        self, lane: Lane, call: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        return self.start(call, *args)


@pytest_asyncio.fixture
async def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HostFile]:
    """On a machine that is never slow, and has few dirty pages."""
    monkeypatch.setattr(quick_writes, "SLOW", 60.0)
    monkeypatch.setattr(quick_writes, "writers_run_free", lambda _: True)
    (tmp_path / "file").write_bytes(DATA)
    engine = TalliedEngine()
    file = HostFile.open(engine, str(tmp_path / "file"), writable=True)
    yield file
    file.close()
    engine.close()


def hops(file: HostFile) -> list[str]:
    assert isinstance(file.engine, TalliedEngine)
    return file.engine.calls


def drop_cache(file: HostFile) -> None:
    os.fsync(file.fd)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)


async def test_a_short_batch_takes_no_hop(file: HostFile) -> None:
    assert await file.write_batch([(b"a" * PAGE, 0), (b"b" * PAGE, 5 * PAGE)]) == [None, None]
    assert hops(file) == []
    assert await file.read_bytes(PAGE, 5 * PAGE) == b"b" * PAGE


@pytest.mark.parametrize("length", [WRITE_NOW_MAX, WRITE_NOW_MAX + PAGE])
async def test_a_long_buffer_goes_to_the_pool(file: HostFile, length: int) -> None:
    await file.write_batch([(bytes(length), 0)])
    assert hops(file) == ["_write_batch"] * (length > WRITE_NOW_MAX)


async def test_a_write_that_has_to_be_stable_is_flushed(file: HostFile) -> None:
    await file.write_batch([(b"x" * PAGE, 0)], fua=True)
    assert hops(file) == ["_sync"]


async def test_a_file_that_is_written_through_goes_to_the_pool(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    engine = TalliedEngine()
    cache = CacheMode(write_through=True)
    file = HostFile.open(engine, str(tmp_path / "file"), writable=True, cache=cache)
    await file.write(b"x" * PAGE, 0)
    assert hops(file) == ["_write_batch"]
    file.close()
    engine.close()


async def test_a_file_of_another_host_goes_to_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that hangs, it must not take all clients along."""
    monkeypatch.setattr("pynbd.block.engine.file_system", lambda _: 0x6969)  # NFS_SUPER_MAGIC
    (tmp_path / "file").write_bytes(DATA)
    engine = TalliedEngine()
    file = HostFile.open(engine, str(tmp_path / "file"), writable=True)
    assert not file.put_now(b"x" * PAGE, 0)
    await file.write(b"x" * PAGE, 0)
    assert hops(file) == ["_write_batch"]
    file.close()
    engine.close()


async def test_nothing_is_written_in_the_loop_beside_a_flush(file: HostFile) -> None:
    flush = asyncio.ensure_future(file.flush())
    await asyncio.sleep(0)
    assert file.write_now([(b"x" * PAGE, 0)]) is None
    await file.write(b"x" * PAGE, 0)
    await flush
    assert hops(file) == ["_sync", "_write_batch"]
    assert file.write_now([(b"x" * PAGE, 0)]) == [None]


@pytest.mark.parametrize("write", [False, True])
async def test_nothing_is_written_in_the_loop_beside_a_call_that_nobody_waits_for(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, write: bool
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held(*_: Any) -> list[None]:
        begun.set()
        assert go_on.wait(10)
        return [None]

    monkeypatch.setattr(file, "_write_batch" if write else "_sync", held)
    long = file.write(bytes(WRITE_NOW_MAX + PAGE), 0)
    call = asyncio.ensure_future(long if write else file.flush())
    if not write:
        long.close()
    await asyncio.sleep(0)
    assert begun.wait(10)
    call.cancel()
    await asyncio.wait([call])
    assert not file.put_now(b"x" * PAGE, 0)
    go_on.set()
    await eventually(lambda: file.put_now(b"x" * PAGE, 0))


@pytest.mark.parametrize("offset, length", [(100, PAGE - 100), (0, 100), (100, 3 * PAGE)])
async def test_part_of_a_page_that_is_not_cached_goes_to_the_pool(
    file: HostFile, offset: int, length: int
) -> None:
    piece = (b"x" * length, offset)
    await file.write(*piece)
    for _ in range(TRIES):
        drop_cache(file)
        if file.write_now([piece]) is None:
            break
    else:
        pytest.skip("the file system keeps its pages, or has them back before one can ask")
    assert file.write_now([(b"x" * PAGE, 8 * PAGE)]) == [None]  # whole pages need no reading


async def test_a_slow_write_sends_the_next_ones_to_the_pool(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_writes, "SLOW", SLOW)
    clock = iter([0.0, SLOW * 2, SLOW * 2, SLOW * 3, 1e6, 1e6, 1e6])
    for module in ("engine", "quick_writes"):
        monkeypatch.setattr(f"pynbd.block.{module}.monotonic", lambda: next(clock))
    piece = (b"x" * PAGE, 0)
    assert file.write_now([piece]) == [None]  # it took twice what is slow
    assert file.write_now([piece]) is None
    assert file.write_now([piece]) == [None]  # much later


def test_dirty_pages_are_counted_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Path] = []
    free = [True, True, False]
    monkeypatch.setattr(
        quick_writes, "writers_run_free", lambda path: bool(counted.append(path)) or free.pop(0)
    )
    quick = QuickWrites()
    asked = 2 * COUNTED_EVERY // PAGE + 2
    assert [quick.allow(PAGE) for _ in range(asked)] == [True] * asked
    assert len(counted) == 2
    assert not all(quick.allow(PAGE) for _ in range(asked // 2))
    assert not quick.allow(PAGE)
    assert len(counted) == 3


@pytest.mark.parametrize(
    "dirty, writeback, free",
    # Nobody is slowed down below the middle of 1000 and 2000 pages.
    [(0, 0, True), (1499, 0, True), (1500, 0, False), (1000, 499, True), (1000, 500, False)],
)
def test_writers_run_free(tmp_path: Path, dirty: int, writeback: int, free: bool) -> None:
    lines = [
        *("nr_free_pages 9", f"nr_dirty {dirty}", f"nr_writeback {writeback}", "nr_dirtied 9999"),
        *("nr_dirty_threshold 2000", "nr_dirty_background_threshold 1000", "pgpgin 5", ""),
    ]
    (tmp_path / "vmstat").write_text("\n".join(lines))
    assert writers_run_free(tmp_path / "vmstat") is free


@pytest.mark.parametrize("text", [None, "", "nr_free_pages 9\nnr_dirty 1\n"])
def test_who_cannot_tell_does_not_run_free(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "vmstat").write_text(text)
    assert not writers_run_free(tmp_path / "vmstat")


def test_this_host_tells() -> None:
    text = Path("/proc/vmstat").read_text()
    assert "\nnr_dirty_threshold " in text
    assert isinstance(writers_run_free(Path("/proc/vmstat")), bool)


async def test_one_buffer(file: HostFile) -> None:
    assert file.put_now(b"x" * PAGE, 3 * PAGE)
    assert hops(file) == []
    assert await file.read_bytes(PAGE, 3 * PAGE) == b"x" * PAGE
    assert not file.put_now(bytes(WRITE_NOW_MAX + PAGE), 0)
    assert await file.read_bytes(PAGE, 0) == DATA[:PAGE]


async def test_one_buffer_that_cannot_be_written(tmp_path: Path) -> None:
    """Who writes it another way is told why."""
    (tmp_path / "file").write_bytes(DATA)
    engine = TalliedEngine()
    file = HostFile.open(engine, str(tmp_path / "file"), writable=False)
    assert not file.put_now(b"x" * PAGE, 0)
    (error,) = await file.write_batch([(b"x" * PAGE, 0)])
    assert error is not None
    assert error.errno == errno.EBADF
    file.close()
    engine.close()


async def test_many_calls_are_not_one_turn(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes here and there take longer than as many bytes in one place."""
    turns: list[int] = []
    write_batch = HostFile._write_batch

    def told(file: HostFile, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        turns.append(len(pieces))
        return write_batch(file, pieces)

    monkeypatch.setattr(HostFile, "_write_batch", told)
    assert await file.write_batch([(b"x" * 512, at * 1024) for at in range(256)]) == [None] * 256
    assert sum(turns) == 256
    assert max(turns) <= WRITE_NOW_MAX // WRITE_CALL
    assert hops(file) == []
    turns.clear()
    assert await file.write_batch([(b"x" * 512, at * 512) for at in range(256)]) == [None] * 256
    assert turns == [256]


async def test_a_batch_is_written_in_turns(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """So much in one turn of the loop, then others have theirs."""
    turns: list[int | str] = []
    write_batch = HostFile._write_batch

    def told(file: HostFile, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        turns.append(sum(len(data) for data, _ in pieces))
        asyncio.get_running_loop().call_soon(turns.append, "another")
        return write_batch(file, pieces)

    monkeypatch.setattr(HostFile, "_write_batch", told)
    piece = bytes(WRITE_NOW_MAX // 2)
    assert await file.write_batch([(piece, at * len(piece)) for at in range(5)]) == [None] * 5
    assert hops(file) == []
    whole = WRITE_NOW_MAX
    assert turns == [whole, "another", whole, "another", whole // 2]
