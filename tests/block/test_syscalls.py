"""System calls that do less than they are asked, are interrupted, or come to the end of a file."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block import syscalls

K, M = 1 << 10, 1 << 20
DATA = random.Random(6).randbytes(M)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of ``DATA``, and a hole of the same size."""
    path = tmp_path / "disk"
    path.write_bytes(DATA)
    os.truncate(path, 2 * M)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    "offset, length, expected",
    [
        (5, 100, DATA[5:105]),
        (M - 1, 2, DATA[-1:] + b"\0"),
        (2 * M - 3, 9, bytes(3)),
        (3 * M, 1, b""),
    ],
)
def test_reads_go_on_to_the_end(fd: int, offset: int, length: int, expected: bytes) -> None:
    assert syscalls.read_bytes(fd, length, offset) == expected
    into = bytearray(length)
    assert syscalls.read_fully(fd, memoryview(into), offset) == len(expected)
    assert into[: len(expected)] == expected


def test_reads_that_bring_less(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interrupted one does: all the rest is asked for again."""
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 1000), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, (views[0][:1000],), at))
    assert syscalls.read_bytes(fd, 4 * K, 7) == DATA[7 : 7 + 4 * K]
    into = bytearray(4 * K)
    assert syscalls.read_fully(fd, memoryview(into), 7) == 4 * K
    assert into == DATA[7 : 7 + 4 * K]


def test_a_write_that_is_cut_short(fd: int) -> None:
    """Up to the limit on the size of files it writes a part; what is left is refused."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * M + 10, limits[1]))
    try:
        with pytest.raises(OSError) as raised:  # noqa: PT011 (its number is looked at)
            syscalls.write_fully(fd, bytes(range(1, 21)), 2 * M)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert raised.value.errno == errno.EFBIG
    assert os.pread(fd, 20, 2 * M) == bytes(range(1, 11))


def test_holes(fd: int) -> None:
    assert syscalls.is_hole(fd, M, M)
    assert not syscalls.is_hole(fd, M, M - 4 * K)
    held = syscalls.Descriptor(os.dup(fd))
    assert syscalls.data_runs(held, M - 4 * K, 8 * K, 9) == [(4 * K, True), (4 * K, False)]
    syscalls.empty(held, 3 * M)
    assert syscalls.data_runs(held, 0, 4 * M, 9) == [(4 * M, False)]
    assert os.fstat(fd).st_size == 3 * M
    held.release()


def test_an_allocation_is_made_again_after_a_signal(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most file systems take no notice of signals that do not kill: one is made up."""
    real, signals = syscalls._fallocate, [errno.EINTR, errno.EINTR]

    def interrupted(*args: int) -> int:
        if not signals:
            return int(real(*args))
        ctypes.set_errno(signals.pop())
        return -1

    monkeypatch.setattr(syscalls, "_fallocate", interrupted)
    assert syscalls.fallocate(fd, 0, 2 * M, 4 * K) == 0
    assert os.fstat(fd).st_size == 2 * M + 4 * K


def test_what_an_allocation_says(fd: int) -> None:
    assert syscalls.fallocate(fd, 0, 0, 0) == errno.EINVAL
    assert syscalls.fallocate(-1, 0, 0, 1) == errno.EBADF


def test_a_number_is_not_given_back_while_it_is_used(fd: int) -> None:
    number = os.dup(fd)
    held = syscalls.Descriptor(number)
    with held as used:
        assert used == number
        held.release()
        os.fstat(number)
    with pytest.raises(OSError):  # noqa: PT011
        os.fstat(number)
    with pytest.raises(OSError, match="the file was closed"), held:
        pass
