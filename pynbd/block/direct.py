"""Files past the page cache (O_DIRECT): any bytes, by whole blocks of memory that is aligned.

Rules:

1. A system call moves whole blocks: offset and length are multiples of the alignment, and the
   memory begins on a page. Bytes go through a buffer of the calling thread.
2. A write that is not of whole blocks reads those at its edges first. Between that read and its
   write nobody else may write there: such a write has its blocks for itself, and waits for all
   others that touch them. Writes of whole blocks do not wait for one another.
3. The end of a file that is not at the end of a block stays where it was, or where the bytes end.

The system calls are the engine's: it hands them in.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

_BUFFER = 1 << 20
_local = threading.local()
_FOR_EVER = 1 << 63

# Alignments to try, from the smallest. A file that takes single bytes has not told anything: it is
# empty, or its file system looks after that itself.
_ALIGNMENTS = (512, 1024, 2048, 4096)


class Calls(NamedTuple):
    """System calls on a descriptor, each of which may do less than is asked, or fail."""

    read: Callable[[int, memoryview, int], int]
    write: Callable[[int, memoryview, int], int]
    size: Callable[[int], int]
    truncate: Callable[[int, int], None]


def alignment_of(fd: int, calls: Calls) -> int:
    """What offsets and lengths have to be multiples of, found by trying."""
    with mmap.mmap(-1, _ALIGNMENTS[-1]) as memory, memoryview(memory) as view:
        if _reads(fd, view[:1], calls):
            return _ALIGNMENTS[-1]
        return next(
            (length for length in _ALIGNMENTS if _reads(fd, view[:length], calls)), _ALIGNMENTS[-1]
        )


def _reads(fd: int, view: memoryview, calls: Calls) -> bool:
    with view:
        try:
            calls.read(fd, view, 0)
        except OSError:
            return False
        return True


def _buffer(length: int) -> memoryview:
    """The first ``length`` bytes of the buffer of this thread, until it asks again."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(mmap.mmap(-1, _BUFFER))
    buffer: memoryview = _local.buffer
    return buffer[:length]


class DirectAccess:
    """The bytes of one file, whose offsets and lengths have to be multiples of ``alignment``."""

    def __init__(self, alignment: int, calls: Calls) -> None:
        self.alignment = alignment
        self._calls = calls
        self._changed = threading.Condition()
        self._writes: list[tuple[int, int, bool]] = []

    def read(self, fd: int, view: memoryview, offset: int) -> int:
        """Fill ``view``; how many bytes there were before the end of the file."""
        end = offset + len(view)
        at = offset
        while at < end:
            first = self._down(at)
            blocks = _buffer(min(self._up(end), first + _BUFFER) - first)
            stop = min(first + self._read_fully(fd, blocks, first), end)
            if stop <= at:
                break
            view[at - offset : stop - offset] = blocks[at - first : stop - first]
            at = stop
        return at - offset

    def write(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of ``data``."""
        end = offset + len(data)
        with self.changing(fd, offset, end) as old_size:
            at = offset
            while at < end:
                first = self._down(at)
                last = min(self._up(end), first + _BUFFER)
                stop = min(last, end)
                blocks = _buffer(last - first)
                if at > first:
                    self._fill(fd, blocks[: self.alignment], first)
                if stop < last and (at == first or last - first > self.alignment):
                    self._fill(fd, blocks[-self.alignment :], last - self.alignment)
                blocks[at - first : stop - first] = data[at - offset : stop - offset]
                self._write_fully(fd, blocks, first)
                at = stop
            if old_size is not None and self._up(end) > max(old_size, end):
                self._calls.truncate(fd, max(old_size, end))

    @contextmanager
    def changing(self, fd: int, offset: int, end: int) -> Iterator[int | None]:
        """Rule 2, while bytes [offset, end) change. Gives the size of the file if the change is not
        one of whole blocks and may move its end.
        """
        first, last = self._down(offset), self._up(end)
        alone = (first, last) != (offset, end)
        with self._changed:
            while True:
                # Asked anew after each wait: those who were before may have moved the end.
                moves_end = last > end and last > self._calls.size(fd)
                # Whoever makes the file longer waits, too.
                mine = (first, _FOR_EVER if moves_end else last, alone)
                if not self._conflicts(mine):
                    break
                self._changed.wait()
            self._writes.append(mine)
        try:
            yield self._calls.size(fd) if moves_end else None
        finally:
            with self._changed:
                self._writes.remove(mine)
                self._changed.notify_all()

    def _conflicts(self, mine: tuple[int, int, bool]) -> bool:
        first, last, alone = mine
        return any(
            (alone or other_alone) and other_first < last and first < other_last
            for other_first, other_last, other_alone in self._writes
        )

    def _fill(self, fd: int, block: memoryview, offset: int) -> None:
        """What a block holds; past the end of the file, zeroes."""
        count = self._read_fully(fd, block, offset)
        block[count:] = bytes(len(block) - count)

    # What moved less than it was asked goes on with the whole block in which it stopped.

    def _read_fully(self, fd: int, blocks: memoryview, offset: int) -> int:
        """Fill ``blocks``; how many bytes there were before the end of the file."""
        done = 0
        while done < len(blocks):
            first = self._down(done)
            count = self._calls.read(fd, blocks[first:], offset + first)
            if first + count <= done:
                break
            done = first + count
        return done

    def _write_fully(self, fd: int, blocks: memoryview, offset: int) -> None:
        done = 0
        while done < len(blocks):
            first = self._down(done)
            count = self._calls.write(fd, blocks[first:], offset + first)
            if first + count <= done:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done = first + count

    def _down(self, offset: int) -> int:
        return offset - offset % self.alignment

    def _up(self, offset: int) -> int:
        return -(-offset // self.alignment) * self.alignment
