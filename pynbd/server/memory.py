"""A disk in memory: for tests, and the shortest example of a `Disk` that does all that it can."""

from __future__ import annotations

from pynbd.errors import UsageError
from pynbd.server.disk import Disk


class MemoryDisk(Disk):
    """``content``, or as many zeroes; it grows and shrinks no more. ``data`` is what it holds."""

    def __init__(self, content: bytes | bytearray | int) -> None:
        if isinstance(content, int) and content < 0:
            raise UsageError(f"size: {content} is not a number of bytes, 0 or more")
        self.data = bytearray(content)
        self.size = len(self.data)

    async def pread(self, offset: int, length: int) -> memoryview:
        return memoryview(self.data)[offset : offset + length]

    async def pwrite(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    async def discard(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        self.data[offset : offset + length] = bytes(length)
