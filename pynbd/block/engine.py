"""The engine: with `pynbd.block.syscalls`, which nobody else uses, the only place that makes disk
system calls.

Its rules:

1. A page-cache hit never leaves the event loop. ``preadv2(RWF_NOWAIT)`` answers a hit in a few
   microseconds, where one hop through a thread pool costs fifty; only a miss goes to the pool.
2. Everything else that can wait for a disk runs in the pool, in calls that release the GIL; the
   writes of a batch share one hop. Short writes into the page cache are made in the loop while
   nothing can make them wait (`pynbd.block.quick_writes`).
3. What a file or its file system cannot do is found out once and remembered in the `HostFile`.
4. After a failed fsync Linux may report success the next time although pages were lost, and of
   several at the same time it tells only one. A file remembers the failure: from then on flushes
   and writes fail, those that were waiting too, until the image is opened again.
5. A file that is opened past the page cache (O_DIRECT) has nothing in it: all goes to the pool, and
   by whole blocks (`pynbd.block.direct`).
6. A call in the pool outlives a request that is cancelled. The number of its descriptor is not
   given back before it returns: the next file or socket to get the number would get the call
   (`Descriptor`).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from time import monotonic
from typing import Any, ParamSpec, TypeVar

from pynbd.block.cache_modes import CacheMode
from pynbd.block.direct import Calls, DirectAccess, alignment_of
from pynbd.block.pool import Lane, Pool
from pynbd.block.quick_writes import QuickWrites
from pynbd.block.syscalls import (
    PROC,
    REMOTE,
    SYS_CACHESTAT,
    TMPFS,
    Descriptor,
    byte_is_locked,
    data_runs,
    empty,
    fallocate,
    file_system,
    is_hole,
    lock_byte,
    read_bytes,
    read_fully,
    syscall,
    will_need,
    write_fully,
)

P = ParamSpec("P")
T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
Opener = Callable[[str, int], int]  # path and flags, as of open(2); gives the descriptor

# A NOWAIT read copies in the loop's own time: a longer one goes to the pool even on a hit.
NOWAIT_MAX = 256 * 1024
# The same for the writes of a batch, in all; and what each further call is worth in bytes.
WRITE_NOW_MAX = 256 * 1024
WRITE_CALL = 4096

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})
_NO_CACHESTAT = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
# Of a range that the page cache holds, one byte is read in every piece of this size.
_PROBE_STEP = 256 * 1024
_PROBE = bytearray(1)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_IOV_MAX = os.sysconf("SC_IOV_MAX")

_WRITEBACK = CacheMode()

_CALLS = Calls(
    read=lambda fd, view, offset: os.preadv(fd, (view,), offset),
    write=os.pwrite,
    size=lambda fd: os.lseek(fd, 0, os.SEEK_END),
    truncate=os.ftruncate,
)


class Engine:
    """The bounded thread pool for what the page cache does not answer.

    ``quick_writes`` is None in an engine all of whose writes go to the pool.
    """

    quick_writes: QuickWrites | None

    def __init__(self, threads: int = 8) -> None:
        self._pool = Pool(threads, "pynbd-disk")
        self.quick_writes = QuickWrites()

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``call(*args)`` in the pool. Keyword arguments are not taken."""
        assert not kwargs
        return await self.start(call, *args)

    def start(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """``call(*args)`` in the pool. The future is done when it has returned, unless it is
        cancelled.
        """
        return self._pool.start(call, *args)

    def start_in_lane(self, lane: Lane, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """`start`, in turn with the calls of that lane, and never beside them."""
        return self._pool.start_in_lane(lane, call, *args)

    def close(self) -> None:
        """Wait for the system calls under way, then end the threads."""
        self._pool.close()


class HostFile:
    """One open host file or block device, and what is known of its abilities.

    Offsets and lengths are bytes. Failures are ``OSError``.
    """

    start = 0  # where its first byte is behind the descriptor

    def __init__(
        self,
        engine: Engine,
        path: str,
        fd: int,
        *,
        writable: bool,
        cache: CacheMode = _WRITEBACK,
    ) -> None:
        self.engine = engine
        self.path = path
        self.fd = fd
        self._descriptor = Descriptor(fd)
        self.writable = writable
        self.cache = cache
        self.sync_failed = False
        self._sync_lock = threading.Lock()
        self._syncs = self._synced = 0  # how many began, and which of them ended last, and well
        self._flushing = asyncio.Lock()
        self._changing = 0  # calls in the pool that change the file, or flush it
        self._lane = Lane()  # of writes, which the kernel makes one after the other
        # Whether send-file may lend this file's pages to a socket: a page that is overwritten
        # before the peer has taken it reaches the peer with the new bytes. True for files that
        # nothing here writes, and for raw exports, where only overlapping requests can meet.
        self.lends_pages = True
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)
        self.is_device = stat.S_ISBLK(status.st_mode)
        self._direct = DirectAccess(alignment_of(fd, _CALLS), _CALLS) if cache.direct else None
        self._nowait = hasattr(os, "RWF_NOWAIT") and not cache.direct
        self._cachestat = not cache.direct
        # Whether the kernel makes writes one after the other; to devices it does not.
        self.writes_in_turn = not (self._direct or self.is_device)
        # Device nodes are on a file system as well (devtmpfs), of which they tell nothing.
        system = 0 if self.is_device else file_system(fd)
        self._always_read = system == TMPFS  # there is no disk to wait for
        self._writes_wait = cache.direct or cache.write_through or system in REMOTE
        self._fallocate_refused: set[int] = set()

    @classmethod
    def open(
        cls,
        engine: Engine,
        path: str,
        *,
        writable: bool,
        cache: CacheMode = _WRITEBACK,
        opener: Opener | None = None,
    ) -> HostFile:
        """Open a regular file or a block device; anything else is refused, without ever waiting on
        it. ``opener``: what opens it, in place of ``os.open``.
        """
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = (opener or os.open)(path, flags | (os.O_DIRECT if cache.direct else 0))
        except OSError as error:
            if cache.direct and error.errno == errno.EINVAL:
                problem = "its file system does not support O_DIRECT (cache none, directsync)"
                raise OSError(errno.EINVAL, problem, path) from None
            raise
        except ValueError:  # a NUL, or half a surrogate pair: JSON can have both
            raise OSError(errno.EINVAL, "it cannot be the name of a file", path) from None
        try:
            mode = os.fstat(fd).st_mode
            is_image = stat.S_ISBLK(mode) or (stat.S_ISREG(mode) and file_system(fd) != PROC)
            if not is_image:
                raise OSError(errno.EINVAL, "not a regular file or a block device", path)
            return cls(engine, path, fd, writable=writable, cache=cache)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the descriptor, which also drops the locks on it, once no call uses it any more."""
        if self.fd >= 0:
            self.fd = -1
            self._descriptor.release()

    def size(self) -> int:
        """Length in bytes, of a device as well."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def allocated_size(self) -> int:
        """Bytes that the host has allocated to the file."""
        return os.fstat(self.fd).st_blocks * 512

    # Reading

    def read_now(self, view: Buffer, offset: int) -> int:
        """Read from the page cache; how many bytes it had. Fewer than asked for: a miss, or the
        end.
        """
        if not self._nowait or len(view) > NOWAIT_MAX:
            return 0
        try:
            return os.preadv(self.fd, (view,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = False
            return 0  # any other trouble shows again in the pool, where it can be reported

    async def read(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset``; how many bytes there were before the end of the file."""
        done = self.read_now(view, offset)
        if done == len(view):
            return done
        return done + await self.engine.run(
            self._read_into, view[done:], self.start + offset + done
        )

    def read_resident(self, view: memoryview, offset: int) -> int:
        """Read bytes that were `resident` a moment ago; how many there were, 0 at the end of the
        file. What the host has dropped since is waited for, as a send-file does.
        """
        return self.read_now(view, offset) or self._read_into(view, self.start + offset)

    async def read_unless_hole(self, length: int, offset: int, *, sparse: bool) -> bytes | None:
        """Up to ``length`` bytes from ``offset``, fewer only at the end of the file; always in the
        pool.

        None if ``sparse`` and the file has no data in the range, all of which is inside it.
        """
        return await self.engine.run(self._read_unless_hole, length, self.start + offset, sparse)

    async def read_bytes(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes from ``offset``, fewer only at the end of the file."""
        data = bytearray(length)
        count = await self.read(memoryview(data), offset)
        return bytes(data[:count])

    def resident(self, offset: int, length: int) -> bool:
        """Whether the page cache holds all of a range, and a send-file will not wait for a disk.

        False where the kernel cannot tell: before Linux 6.5, or for this file.
        """
        if not self._cachestat:
            return False
        asked = (ctypes.c_uint64 * 2)(offset, length)
        answer = (ctypes.c_uint64 * 5)()
        if syscall(SYS_CACHESTAT, self.fd, asked, answer, 0):
            if ctypes.get_errno() in _NO_CACHESTAT:
                self._cachestat = False
            return False
        end = offset + length
        pages: int = (end + _PAGE - 1) // _PAGE - offset // _PAGE
        # The last page is held whole, also where the file ends in the middle of it.
        if answer[0] < pages or end > self.size():
            return False
        # A page that is still being read is held too, and so is one that could not be read. Reading
        # ahead goes on at the end: look there first.
        return self._always_read or all(
            self.read_now(_PROBE, at) for at in (end - 1, *range(offset, end, _PROBE_STEP))
        )

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """(length, is data) of consecutive pieces from ``offset``, at most ``limit`` of them
        (SEEK_DATA).

        Past the end of the file is no data. A file system without SEEK_DATA says that all is data.
        """
        return await self.engine.run(
            data_runs, self._descriptor, self.start + offset, length, limit
        )

    # Writing

    async def write_batch(
        self, pieces: Sequence[tuple[Buffer, int]], *, fua: bool = False
    ) -> list[OSError | None]:
        """Write each (buffer, offset); what went wrong with each. ``fua``: then `flush`.

        In each turn of the loop as much as `write_now` takes, while it does; the rest in the pool.
        """
        errors: list[OSError | None] = []
        for group in _turns(pieces):
            if errors:
                await asyncio.sleep(0)
            done = self.write_now(group)
            if done is None:
                errors += await asyncio.shield(self.start_write_batch(pieces[len(errors) :]))
                break
            errors += done
        if fua and not all(errors):
            try:
                await self.flush()
            except OSError as failure:
                return [earlier or failure for earlier in errors]
        return errors

    def put_now(self, data: Buffer, offset: int) -> bool:
        """Write one buffer in the loop's own time. False if that might take long, and where
        something went wrong, which is told to who writes it another way.
        """
        quick = self._quick()
        if quick is None:
            return False
        length = len(data)
        if length > WRITE_NOW_MAX or not quick.allow(length):
            return False
        if (offset | length) % _PAGE and not self._has_edges(offset, offset + length):
            return False
        start = monotonic()
        try:
            done = os.pwrite(self.fd, data, offset)
        except OSError:
            return False
        quick.took(monotonic() - start)
        return done == length

    def write_now(self, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None] | None:
        """`write_batch` in the loop's own time; None if that might take long, and nothing was
        written.
        """
        quick = self._quick()
        if quick is None:
            return None
        for data, offset in pieces:
            length = len(data)
            if (offset | length) % _PAGE and not self._has_edges(offset, offset + length):
                return None
        total = sum(_costs(pieces))
        if total > WRITE_NOW_MAX or not quick.allow(total):
            return None
        start = monotonic()
        errors = self._write_batch(pieces)
        quick.took(monotonic() - start)
        return errors

    def _quick(self) -> QuickWrites | None:
        """What says whether the loop may change the file itself; None: it may not."""
        if self._changing or self._writes_wait or self.sync_failed:
            return None
        return self.engine.quick_writes

    def _has_edges(self, offset: int, end: int) -> bool:
        """Whether the page cache has the pages that a write of [offset, end) covers in part."""
        return bool(
            (not offset % _PAGE or self.read_now(_PROBE, offset))
            and (not end % _PAGE or self.read_now(_PROBE, end - 1))
        )

    def start_write_batch(
        self, pieces: Sequence[tuple[Buffer, int]]
    ) -> asyncio.Future[list[OSError | None]]:
        """`write_batch` in the pool, for who has to know when it ends although he does not wait for
        it.
        """
        if not self.writes_in_turn:
            return self._under_way(self.engine.start(self._write_batch, pieces))
        return self._under_way(self.engine.start_in_lane(self._lane, self._write_batch, pieces))

    async def write(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write one buffer."""
        (error,) = await self.write_batch([(data, offset)], fua=fua)
        if error:
            error.filename = self.path
            raise error

    async def flush(self) -> None:
        """Everything written so far onto stable storage (fdatasync). Who comes while one is under
        way shares the next with all who wait: here, as threads that wait would fill the pool.
        """
        if not self.writable or self.cache.no_flush:
            return
        asked_after = self._syncs
        async with self._flushing:
            if self._synced > asked_after and not self.sync_failed:
                return
            await self._change(self._sync)

    async def resize(self, size: int) -> None:
        """Make a regular file ``size`` bytes long; what it gains reads as zeroes."""
        if self.sync_failed:
            raise self._lost()
        quick = self._quick()
        if quick and size >= self.size() and quick.allow(0):  # nothing but the inode is touched
            start = monotonic()
            self._resize(size)
            quick.took(monotonic() - start)
        else:
            await self._change(self._resize, size)

    async def empty(self, size: int) -> None:
        """Make a regular file ``size`` bytes that are one hole, whatever it was."""
        await self._change(empty, self._descriptor, size)

    async def fallocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(2); False if this file or its file system does not do ``mode``, and nothing
        happened.
        """
        if mode in self._fallocate_refused:
            return False
        if self.sync_failed:
            raise self._lost()
        code = await self._change(self._fallocate_errno, mode, offset, length)
        if code in _UNSUPPORTED:
            # A device that refuses part of a sector with EINVAL may take the next range.
            if not (self.is_device and code == errno.EINVAL):
                self._fallocate_refused.add(mode)
            return False
        if code:
            raise OSError(code, os.strerror(code), self.path)
        if self.cache.write_through:
            await self.flush()
        return True

    async def will_need(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask the host to read each (offset, length) ahead."""
        if self._direct is None:
            await self.engine.run(will_need, self._descriptor, self.start, ranges)

    # Locks

    def lock_byte(self, position: int) -> None:
        """Take a shared open-file-description lock on one byte. ``OSError`` if somebody forbids
        it.
        """
        lock_byte(self.fd, position)

    def byte_is_locked(self, position: int) -> bool:
        """Whether another open file description holds any lock on that byte."""
        return byte_is_locked(self.fd, position)

    async def _change(self, call: Callable[..., T], *args: Any) -> T:
        """``call(*args)``, which changes the file or flushes it, in the pool."""
        return await asyncio.shield(self._under_way(self.engine.start(call, *args)))

    def _under_way(self, change: asyncio.Future[T]) -> asyncio.Future[T]:
        """Count a call, which is not to be cancelled: it would go on, and not be counted."""
        self._changing += 1
        change.add_done_callback(self._changed)
        return change

    def _changed(self, change: asyncio.Future[T]) -> None:
        self._changing -= 1
        if not change.cancelled():
            change.exception()  # it was seen, even if nobody waits for it any more

    def _lost(self) -> OSError:
        return OSError(errno.EIO, "an earlier flush failed; data may be lost", self.path)

    def _read_into(self, view: memoryview, offset: int) -> int:
        with self._descriptor as fd:
            if self._direct:
                return self._direct.read(fd, view, offset)
            return read_fully(fd, view, offset)

    def _read_unless_hole(self, length: int, offset: int, sparse: bool) -> bytes | None:
        with self._descriptor as fd:
            if sparse and is_hole(fd, length, offset):
                return None
            if self._direct is None:
                return read_bytes(fd, length, offset)
            data = bytearray(length)
            return bytes(data[: self._direct.read(fd, memoryview(data), offset)])

    def _fallocate_errno(self, mode: int, offset: int, length: int) -> int:
        with self._descriptor as fd:
            alone = self._direct.changing(fd, offset, offset + length) if self._direct else None
            with alone or nullcontext():
                return fallocate(fd, mode, offset, length)

    def _resize(self, size: int) -> None:
        with self._descriptor as fd:
            os.ftruncate(fd, size)

    def _sync(self) -> None:
        with self._sync_lock:  # Linux tells an error once: to one of several at the same time
            if self.sync_failed:
                raise self._lost()
            self._syncs += 1
            try:
                with self._descriptor as fd:
                    os.fdatasync(fd)
            except OSError:
                self.sync_failed = True
                raise
            self._synced = self._syncs

    def _write_batch(self, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        if self.sync_failed:
            return [self._lost() for _ in pieces]
        with self._descriptor as fd:
            if len(pieces) == 1 or self._direct:
                errors = [self._write_piece(fd, data, offset) for data, offset in pieces]
            else:
                errors = []
                for group in _neighbours(pieces):
                    if len(group) > 1 and _write_together(fd, group):
                        errors += [None] * len(group)
                    else:
                        errors += [self._write_piece(fd, data, offset) for data, offset in group]
        if self.cache.write_through and not self.cache.no_flush and not all(errors):
            try:
                self._sync()
            except OSError as error:
                return [earlier or error for earlier in errors]
        return errors

    def _write_piece(self, fd: int, data: Buffer, offset: int) -> OSError | None:
        try:
            if self._direct:
                self._direct.write(fd, memoryview(data), offset)
            else:
                write_fully(fd, data, offset)
        except OSError as error:
            return error
        return None


def _costs(pieces: Sequence[tuple[Buffer, int]]) -> Iterator[int]:
    """What each piece is worth of a turn of the loop: its bytes, and a call of its own unless it
    is the first one or follows the one before it.
    """
    end = pieces[0][1] if pieces else 0
    for data, offset in pieces:
        yield len(data) if offset == end else len(data) + WRITE_CALL
        end = offset + len(data)


def _turns(pieces: Sequence[tuple[Buffer, int]]) -> Iterator[Sequence[tuple[Buffer, int]]]:
    """``pieces`` in groups of what may be written in one turn of the loop, if each of them may."""
    first = total = 0
    for index, cost in enumerate(_costs(pieces)):
        total += cost
        if total > WRITE_NOW_MAX and index > first:
            yield pieces[first:index]
            first, total = index, len(pieces[index][0])
    yield pieces[first:]


def _neighbours(
    pieces: Sequence[tuple[Buffer, int]],
) -> Iterator[Sequence[tuple[Buffer, int]]]:
    """``pieces`` in groups that follow one another in the file without a gap."""
    first, end = 0, -1
    for index, (data, offset) in enumerate(pieces):
        if index > first and (offset != end or index - first == _IOV_MAX):
            yield pieces[first:index]
            first = index
        end = offset + len(data)
    if pieces:
        yield pieces[first:]


def _write_together(fd: int, group: Sequence[tuple[Buffer, int]]) -> bool:
    """Write neighbours with one call; False if that did not write all of them."""
    try:
        buffers = [data for data, _ in group]
        return os.pwritev(fd, buffers, group[0][1]) == sum(map(len, buffers))
    except OSError:
        return False  # whose fault it is shows when each is written by itself
