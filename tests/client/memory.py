"""Disks in memory that tell what is asked of them, and answer when the test lets them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from itertools import pairwise

from pynbd.block.engine import Buffer
from pynbd.block.extent import DATA, NO_HOST, ZERO, Runs
from pynbd.block.node import BlockNode


class MemoryNode(BlockNode):
    """``holes``: (offset, end) that its map calls zeroes. ``block``: what writes and zeroes must be
    multiples of. ``late``: reads from these offsets are answered last. ``bad``: what fails.
    """

    format = "raw"
    read_only = False

    def __init__(
        self,
        content: bytes,
        *,
        holes: Sequence[tuple[int, int]] = (),
        block: int = 1,
        late: Sequence[int] = (),
        bad: Sequence[int] = (),
    ) -> None:
        self.name = "memory"
        self.content = bytearray(content)
        self.size = len(content)
        self.holes = holes
        self.block = block
        self.late = late
        self.bad = bad
        self.mapped: list[tuple[int, int]] = []
        self.read: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] = []
        self.zeroed: list[tuple[int, int]] = []
        self.kept: list[tuple[int, int]] = []  # of these, what has to be allocated
        self.flushes = 0
        self.in_flight = self.most_in_flight = 0

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        if not want_zero:
            return Runs.single(offset, length, DATA)
        self.mapped.append((offset, offset + length))
        edges = sorted({offset, offset + length, *(e for hole in self.holes for e in hole)})
        edges = [edge for edge in edges if offset <= edge <= offset + length]
        rows = [
            (end - at, ZERO if any(a <= at < b for a, b in self.holes) else DATA, NO_HOST)
            for at, end in pairwise(edges)
        ]
        return Runs.of(offset, rows)

    async def fetch_own(self, offset: int, view: memoryview) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(200 if offset in self.late else 2):
            await asyncio.sleep(0)
        self.in_flight -= 1
        if offset in self.bad:
            raise OSError(errno.EIO, "bad sector", self.name)
        self.read.append((offset, offset + len(view)))
        view[:] = self.content[offset : offset + len(view)]

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        for offset, data in pieces:
            await self._change(offset, bytes(data))
            self.written.append((offset, offset + len(data)))
        return [None] * len(pieces)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool,
        fast: bool,
        fua: bool = False,
        no_hole: bool = False,
    ) -> None:
        await self._change(offset, bytes(length))
        self.zeroed.append((offset, offset + length))
        if no_hole and not may_unmap:
            self.kept.append((offset, offset + length))

    async def _change(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        assert end <= self.size
        assert offset % self.block == 0
        assert end % self.block == 0 or end == self.size
        await asyncio.sleep(0)
        self.content[offset:end] = data

    async def flush(self) -> None:
        self.flushes += 1
