"""WindowFile: a part of a host file that is used as if it were a file of its own.

An image may lie inside another file: an archive that was never unpacked. What is before and after
the window belongs to somebody else: reading ends with the window, and writing does not leave it.
"""

from __future__ import annotations

import os

from pynbd.block.engine import Buffer, HostFile
from pynbd.errors import ImageError

SECTOR = 512


def round_up(length: int, step: int = SECTOR) -> int:
    """The least multiple of ``step`` that is not below ``length``."""
    return -(-length // step) * step


def check_window(name: str, file_size: int, offset: int, size: int | None) -> None:
    """Raise `ImageError` unless a window lies in a file of ``file_size`` bytes, rounded up to whole
    sectors of 512 bytes.
    """
    whole = round_up(file_size)
    if not 0 <= offset <= whole:
        raise ImageError(f"{name}: it has {whole} bytes; the offset {offset} is outside of them")
    if size is not None and offset + size > whole:
        raise ImageError(
            f"{name}: it has {whole} bytes; {size} bytes from offset {offset} reach beyond its end"
        )


class WindowFile(HostFile):
    """Bytes [start, start + size) of a host file; offsets count from ``start``. It is only read."""

    _size = 0

    @classmethod
    def of(cls, file: HostFile, start: int, size: int | None = None) -> WindowFile:
        """A window of ``file``, which is closed: the window has its locks. Raises `ImageError`."""
        check_window(file.path, file.size(), start, size)
        # The locks belong to the open file description, which the copy shares.
        window = cls(
            file.engine, file.path, os.dup(file.fd), writable=file.writable, cache=file.cache
        )
        window.start = start
        window._size = max(file.size() - start, 0) if size is None else size
        file.close()
        return window

    def size(self) -> int:
        return self._size

    def read_now(self, view: Buffer, offset: int) -> int:
        room = max(self._size - offset, 0)
        return super().read_now(memoryview(view)[:room], self.start + offset)

    async def read(self, view: memoryview, offset: int) -> int:
        room = max(self._size - offset, 0)
        return await super().read(view[:room], offset)

    async def read_unless_hole(self, length: int, offset: int, *, sparse: bool) -> bytes | None:
        length = max(min(length, self._size - offset), 0)
        return await super().read_unless_hole(length, offset, sparse=sparse)

    async def data_runs(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        room = max(self._size - offset, 0)
        if length <= room:
            return await super().data_runs(offset, length, limit)
        inside = await super().data_runs(offset, room, limit) if room else []
        return [*inside, (length - room, False)] if len(inside) < limit else inside

    def resident(self, offset: int, length: int) -> bool:
        """False: whoever sends from the descriptor does not know of the window."""
        return False
