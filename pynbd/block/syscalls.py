"""System calls of the disk, each made whole: what the calls of an `Engine` do in its pool.

A call of Linux may do less than it is asked (pread(2), pwrite(2)), be interrupted (fallocate(2);
those of `os` go on by themselves, PEP 475), or tell one piece at a time (lseek(2) with SEEK_DATA
and SEEK_HOLE). Here each goes on until all is done, or nothing is left. Offsets and lengths are
bytes; failures are ``OSError``, but for those calls that say what they give instead.

The number of a descriptor is not given back before the last call on it has returned: what takes a
`Descriptor` has it for itself; what takes a number trusts its caller to.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SYS_CACHESTAT = 451  # the same number on every architecture (Linux 6.5)

# What Linux reads ahead for one posix_fadvise, unless the device is set to less; it drops the rest.
_WILL_NEED_PIECE = 128 * 1024
# The f_type of statfs(2): tmpfs; proc, whose files say that they are regular, and are a process's;
# and those where a write may wait for a daemon, or another host: FUSE, NFS, 9p, SMB, CIFS, Ceph.
TMPFS = 0x0102_1994
PROC = 0x9FA0
REMOTE = frozenset({0x6573_5546, 0x6969, 0x0102_1997, 0xFE53_4D42, 0xFF53_4D42, 0x00C3_6400})
# struct flock of <fcntl.h>: type, whence, start, length, pid; native alignment and size.
_FLOCK = struct.Struct("hhqqi0q")

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fstatfs = _libc.fstatfs
syscall = _libc.syscall  # syscall(2): -1 is a failure, whose number is ctypes.get_errno()
syscall.restype = ctypes.c_long


class Descriptor:
    """The descriptor of an open file: ``with`` it, a call has the number for itself."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._users = 1  # its file; and each call that is under way
        self._lock = threading.Lock()

    def __enter__(self) -> int:
        with self._lock:
            if not self._users:
                raise OSError(errno.EBADF, "the file was closed")
            self._users += 1
        return self._fd

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """One user less; the last one closes."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            # Whatever close(2) says, the number is given back; and who needs to know that his
            # bytes are stored has asked fdatasync(2).
            with suppress(OSError):
                os.close(self._fd)


def _with_descriptor(
    call: Callable[Concatenate[int, P], T],
) -> Callable[Concatenate[Descriptor, P], T]:
    """A call whose first argument is the number, on a `Descriptor`."""

    @wraps(call)
    def held(descriptor: Descriptor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with descriptor as fd:
            return call(fd, *args, **kwargs)

    return held


# Reading


def read_fully(fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset``; how many bytes there were before the end of the file."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, (view[done:],), offset + done)
        if not count:
            break
        done += count
    return done


def read_bytes(fd: int, length: int, offset: int) -> bytes:
    """Up to ``length`` bytes from ``offset``, fewer only at the end of the file."""
    data = os.pread(fd, length, offset)  # into memory that nobody zeroed before
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


@_with_descriptor
def will_need(fd: int, start: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Ask the host to read each (offset behind ``start``, length) ahead. It may not."""
    for offset, length in ranges:
        end = start + offset + length
        for at in range(start + offset, end, _WILL_NEED_PIECE):
            os.posix_fadvise(fd, at, min(_WILL_NEED_PIECE, end - at), os.POSIX_FADV_WILLNEED)


# What a file is, and where it has data


def file_system(fd: int) -> int:
    """What the file, or the device node, is on: an f_type of statfs(2), or 0."""
    status = (ctypes.c_long * 32)()  # struct statfs, and to spare: f_type comes first
    _fstatfs(fd, status)
    return status[0]


def is_hole(fd: int, length: int, offset: int) -> bool:
    """Whether the file has no data in a range, all of which is inside it."""
    end = offset + length
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= end
    except OSError as error:  # no data from here on, or a file that cannot tell
        return error.errno == errno.ENXIO and os.lseek(fd, 0, os.SEEK_END) >= end


@_with_descriptor
def data_runs(fd: int, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
    """(length, is data) of consecutive pieces from ``offset``, at most ``limit`` of them.

    Past the end of the file is no data. A file system without SEEK_DATA says that all is data.
    """
    runs: list[tuple[int, bool]] = []
    end = offset + length
    while offset < end and len(runs) < limit:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end of the file
                data = end
            else:
                return [*runs, (end - offset, True)]
        if data > offset:
            runs.append((data - offset, False))
        if data < end:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            if hole > data:  # else somebody punched it since
                runs.append((hole - data, True))
            offset = hole
        else:
            offset = end
    return runs[:limit]


# Writing


def write_fully(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data``."""
    done = os.pwrite(fd, data, offset)
    if done < len(data):
        view = memoryview(data)
        while done < len(view):
            count = os.pwrite(fd, view[done:], offset + done)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2); 0, or the number of its error."""
    while _fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0


@_with_descriptor
def empty(fd: int, size: int) -> None:
    """Make a regular file ``size`` bytes that are one hole, whatever it was."""
    os.ftruncate(fd, size)  # a size that it cannot have is refused before anything is lost
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)


# Locks of an open file description, each on one byte


def lock_byte(fd: int, position: int) -> None:
    """Take a shared lock. ``OSError`` if somebody forbids it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, position, 1, 0))


def byte_is_locked(fd: int, position: int) -> bool:
    """Whether another open file description holds any lock."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, position, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
