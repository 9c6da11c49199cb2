"""Locks against the real QEMU, and the ways to zero and to discard.

What a lock forbids is QEMU's word: qemu-io opens an image that we hold, or holds one that we want.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from pynbd.block.engine import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    Engine,
    HostFile,
)
from pynbd.block.file import discard, open_host_file, write_zeroes
from pynbd.errors import ImageError, ImageLocked

PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
ZERO = FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE
SIZE = 1 << 20
DATA = random.Random(2).randbytes(SIZE)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(2)
    yield engine
    engine.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """An image on which qemu-io insists as other QEMU programs do; raw files it shares."""
    path = tmp_path / "image.qcow2"
    peers.require("qemu-img", "qemu-io")
    peers.run("qemu-img", "create", "-f", "qcow2", path, str(SIZE))
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def opened(
    engine: Engine, path: Path, *, writable: bool, force_share: bool = False
) -> Iterator[HostFile]:
    file = open_host_file(engine, str(path), writable=writable, force_share=force_share)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def held_by_qemu(path: Path, *options: str) -> Iterator[None]:
    """qemu-io keeps the image open."""
    line = [*peers.command("qemu-io"), "-f", "qcow2", *options, str(path)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        said = process.stdout.readline()
        assert b"1 MiB" in said, said
        try:
            yield
        finally:
            process.stdin.close()
            assert process.wait(20) == 0


def qemu_opens(path: Path, *options: str) -> bool:
    """Whether qemu-io may open the image; if not, it must be for the lock."""
    done = peers.run("qemu-io", "-f", "qcow2", *options, "-c", "length", path, check=False)
    assert done.returncode == 0 or "lock" in done.stderr, done.stderr
    return done.returncode == 0


# Locks -------------------------------------------------------------------------------------------


def test_qemu_writes_it(engine: Engine, qcow2: Path, caplog: pytest.LogCaptureFixture) -> None:
    with held_by_qemu(qcow2):
        before = open_files()
        for writable in (False, True):
            with pytest.raises(ImageLocked) as caught:
                open_host_file(engine, str(qcow2), writable=writable)
            assert str(caught.value).startswith(f"{qcow2}: another process ")
            assert "--force-share" in str(caught.value)
        assert open_files() == before
        with opened(engine, qcow2, writable=False, force_share=True):
            pass
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "pynbd")
    assert str(qcow2) in record.getMessage()
    assert "may be inconsistent" in record.getMessage()
    with opened(engine, qcow2, writable=True):
        pass


def test_qemu_reads_it(engine: Engine, qcow2: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any number read; who reads without sharing forbids writing."""
    with held_by_qemu(qcow2, "-r"):
        with opened(engine, qcow2, writable=False):
            pass
        with pytest.raises(ImageLocked, match=r"to write it \(-r serves it read-only\)"):
            open_host_file(engine, str(qcow2), writable=True)
        with opened(engine, qcow2, writable=False, force_share=True):
            pass
    with held_by_qemu(qcow2, "-r", "-U"), opened(engine, qcow2, writable=True):
        pass
    assert not caplog.records  # nobody wrote


def test_we_write_it(engine: Engine, qcow2: Path) -> None:
    with opened(engine, qcow2, writable=True):
        assert not qemu_opens(qcow2)
        assert not qemu_opens(qcow2, "-r")
        assert qemu_opens(qcow2, "-r", "-U")
    assert qemu_opens(qcow2)


def test_we_read_it(engine: Engine, qcow2: Path) -> None:
    with opened(engine, qcow2, writable=False):
        assert not qemu_opens(qcow2)
        assert qemu_opens(qcow2, "-r")


def test_we_read_it_by_force(engine: Engine, qcow2: Path) -> None:
    """Who shares by force forbids nothing."""
    with opened(engine, qcow2, writable=False, force_share=True):
        assert qemu_opens(qcow2)


@pytest.mark.parametrize("second", [False, True], ids=["reader", "writer"])
def test_two_of_us(engine: Engine, path: Path, second: bool) -> None:
    """A writer meets nobody, whoever came first; the locks belong to the open file, not to us."""
    with opened(engine, path, writable=True), pytest.raises(ImageLocked):
        open_host_file(engine, str(path), writable=second)
    with opened(engine, path, writable=second), pytest.raises(ImageLocked):
        open_host_file(engine, str(path), writable=True)


def test_any_number_of_readers(engine: Engine, path: Path) -> None:
    with opened(engine, path, writable=False), opened(engine, path, writable=False):
        pass


def test_a_lost_race_leaves_no_lock(engine: Engine, path: Path) -> None:
    with opened(engine, path, writable=True):
        with pytest.raises(ImageLocked):
            open_host_file(engine, str(path), writable=True)
        with opened(engine, path, writable=False, force_share=True) as probe:
            # Ours are on these bytes, and on no other: QEMU's bits 0, 1, 3 and 1, 3.
            locked = [byte for byte in range(90, 310) if probe.byte_is_locked(byte)]
    assert locked == [100, 101, 103, 201, 203]


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "missing"])
def test_what_is_no_image_is_refused(engine: Engine, tmp_path: Path, kind: str) -> None:
    makers: dict[str, Callable[[Path], Any]] = {
        "directory": Path.mkdir,
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "missing": lambda path: None,
    }
    path = tmp_path / kind
    makers[kind](path)
    before = open_files()
    with pytest.raises(ImageError) as caught:
        open_host_file(engine, str(path), writable=False)
    assert str(caught.value).startswith(f"{path}: cannot be opened: ")
    assert "\n" not in str(caught.value)
    assert open_files() == before


# Zeroes ------------------------------------------------------------------------------------------


class LessAbleFile(HostFile):
    """A file whose file system does not do some kinds of fallocate."""

    refused: frozenset[int] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[int] = []

    async def fallocate(self, mode: int, offset: int, length: int) -> bool:
        self.asked.append(mode)
        return mode not in self.refused and await super().fallocate(mode, offset, length)


@contextmanager
def less_able(engine: Engine, path: Path, *refused: int) -> Iterator[LessAbleFile]:
    file = LessAbleFile(engine, str(path), os.open(path, os.O_RDWR), writable=True)
    file.refused = frozenset(refused)
    yield file
    file.close()


ZEROED = DATA[:5000] + bytes(300_000) + DATA[305_000:]


@pytest.mark.parametrize(
    "may_unmap, refused, asked",
    [
        (True, (), [PUNCH]),
        (True, (PUNCH,), [PUNCH, ZERO]),
        (True, (PUNCH, ZERO), [PUNCH, ZERO]),
        (False, (), [ZERO]),
        (False, (ZERO,), [ZERO]),
    ],
)
async def test_zeroes_by_the_first_way_there_is(
    engine: Engine, path: Path, may_unmap: bool, refused: tuple[int, ...], asked: list[int]
) -> None:
    with less_able(engine, path, *refused) as file:
        await write_zeroes(file, 5000, 300_000, may_unmap=may_unmap, fast=False)
        assert file.asked == asked
        assert content(path) == ZEROED
        if may_unmap and not refused:
            assert await file.data_runs(8192, 200_000, 2) == [(200_000, False)]
        if not may_unmap:
            assert file.allocated_size() >= SIZE


async def test_zeroes_that_are_written_may_be_many(engine: Engine, path: Path) -> None:
    with less_able(engine, path, PUNCH, ZERO) as file:
        await write_zeroes(file, 4096, 3 << 20, may_unmap=True, fast=False)
    assert content(path) == DATA[:4096] + bytes(3 << 20)


@pytest.mark.parametrize("may_unmap", [False, True])
async def test_fast_zeroes_are_refused_untouched(
    engine: Engine, path: Path, may_unmap: bool
) -> None:
    with less_able(engine, path, PUNCH, ZERO) as file:
        with pytest.raises(OSError, match="zeroes would have to be written") as caught:
            await write_zeroes(file, 5000, 300_000, may_unmap=may_unmap, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert content(path) == DATA
    with less_able(engine, path, PUNCH) as file:
        await write_zeroes(file, 5000, 300_000, may_unmap=may_unmap, fast=True)
    assert content(path) == ZEROED


async def test_discard(engine: Engine, path: Path) -> None:
    with less_able(engine, path) as file:
        await discard(file, 5000, 300_000)
        assert content(path) == ZEROED
        assert file.allocated_size() < SIZE


async def test_discard_is_a_hint(engine: Engine, path: Path) -> None:
    """It never zeroes by force, and never fails for what the host does not have."""
    with less_able(engine, path, PUNCH) as file:
        await discard(file, 5000, 300_000)
        assert file.asked == [PUNCH]
    assert content(path) == DATA


@pytest.mark.parametrize("command", [fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK], ids=["take", "look"])
@pytest.mark.parametrize("writable", [False, True], ids=["reader", "writer"])
def test_locks_that_fail(
    engine: Engine,
    path: Path,
    command: int,
    writable: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody holds it: it is the host, which says why; where it has no locks, it goes on."""
    before, real = open_files(), fcntl.fcntl

    def failing(code: int) -> Callable[..., Any]:
        def called(fd: int, asked: int, argument: bytes) -> Any:
            if asked == command:
                raise OSError(code, os.strerror(code))
            return real(fd, asked, argument)

        return called

    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO))
    with pytest.raises(ImageError) as caught:
        open_host_file(engine, str(path), writable=writable)
    assert str(caught.value) == f"{path}: cannot be locked: Input/output error"
    assert type(caught.value) is ImageError
    assert open_files() == before
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.ENOLCK))
    open_host_file(engine, str(path), writable=writable).close()
    assert caplog.messages == [f"{path}: the file system has no locks: No locks available"]
