"""Disk: one end of a copy or a comparison, an image or a remote export alike.

It adds to a `BlockNode` what both ends of a job need: failures that name the disk, the place and
the reason; and for the end that is written, whole blocks, whatever is asked for.

1. An export may take writes of whole blocks only (the minimum block size of the NBD specification,
   "Block size constraints"). Of a block that is to be written in part the rest is read before; one
   such block at a time.
2. Bytes past the end of a disk read as zeroes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pynbd.block.extent import ZERO, Runs
from pynbd.block.node import BlockNode
from pynbd.errors import DiskError, MapError, PynbdError, ReadError, WriteError


def reason(error: BaseException) -> str:
    """What a failure says, without the name of a file, which stands beside it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def named(kind: type[DiskError], name: str, deed: str, offset: int, length: int) -> Iterator[None]:
    """Any failure becomes a ``kind`` that says what could not be done, and where."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, PynbdError) as error:
        where = f"{length} bytes at offset {offset}"
        raise kind(f"{name}: cannot {deed} {where}: {reason(error)}") from error


class Disk:
    """A disk that is read."""

    def __init__(self, node: BlockNode) -> None:
        self.node = node
        self.name = node.name
        self.size = node.size

    async def map(self, offset: int, length: int) -> Runs:
        """`BlockNode.map`, also past the end."""
        if offset >= self.size:
            return Runs.single(offset, length, ZERO)
        length = min(length, self.size - offset)
        with named(MapError, self.name, "map", offset, length):
            return await self.node.map(offset, length)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; all of it lies inside the disk."""
        end = offset + len(view)
        with named(ReadError, self.name, "read", offset, len(view)):
            for extent in await self.node.resolve(offset, end):
                piece = view[extent.offset - offset : extent.end - offset]
                await self.node.fetch(extent, extent.offset, piece)


class Target(Disk):
    """A disk that is written, in whole multiples of ``block`` bytes, a power of two.

    ``reads_zero``: it reads as zeroes from end to end before the job begins. ``sparse``: so many
    bytes of zeroes, a power of two from 512 on, are written as such; 0 writes data as it comes.
    ``allocated``: zeroes take up space. ``is_new``: it was made for this job, and goes again if
    that fails.
    """

    is_new = False

    def __init__(
        self,
        node: BlockNode,
        *,
        block: int = 1,
        reads_zero: bool = False,
        sparse: int = 4096,
        allocated: bool = False,
    ) -> None:
        super().__init__(node)
        self.block = block
        self.reads_zero = reads_zero and not allocated
        self._sparse = 0 if allocated else max(sparse, block) if sparse else 0
        self._allocated = allocated
        self._edges = asyncio.Lock()

    async def write(self, offset: int, view: memoryview) -> None:
        """Write ``view``, long runs of zeroes in it as zeroes."""
        first, last = self._whole_blocks(offset, offset + len(view))
        await self._patch(offset, view[: max(first - offset, 0)])
        await self._write_blocks(first, view[first - offset : last - offset])
        await self._patch(last, view[last - offset :])

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        if self.reads_zero:
            return
        first, last = self._whole_blocks(offset, offset + length)
        await self._patch(offset, memoryview(bytes(first - offset)))
        await self._zero_blocks(first, last - first)
        await self._patch(last, memoryview(bytes(offset + length - last)))

    def _whole_blocks(self, offset: int, end: int) -> tuple[int, int]:
        """Where the whole blocks of a range begin and end; the last one of a disk may be short.

        A range inside one block has none: both are its end.
        """
        first = min(-(-offset // self.block) * self.block, end)
        last = end if end == self.size else end // self.block * self.block
        return first, max(first, last)

    async def _patch(self, offset: int, view: memoryview) -> None:
        """Write a part of one block: read it, change it, write it."""
        if not view:
            return
        start = offset // self.block * self.block
        async with self._edges:
            block = memoryview(bytearray(min(self.block, self.size - start)))
            await self.read(start, block)
            block[offset - start : offset - start + len(view)] = view
            await self._write_blocks(start, block)

    async def _write_blocks(self, offset: int, view: memoryview) -> None:
        pieces = []
        for start, end, zero in zero_runs(view, offset, self._sparse):
            if zero:
                await self._zero_blocks(start, end - start)
            else:
                pieces.append((start, view[start - offset : end - offset]))
        if pieces:
            with named(WriteError, self.name, "write", offset, len(view)):
                for error in filter(None, await self.node.pwrite_batch(pieces)):
                    raise error

    async def _zero_blocks(self, offset: int, length: int) -> None:
        if length and not self.reads_zero:
            with named(WriteError, self.name, "zero", offset, length):
                await self.node.write_zeroes(
                    offset,
                    length,
                    may_unmap=not self._allocated,
                    no_hole=self._allocated,
                    fast=False,
                )

    async def flush(self) -> None:
        """All that was written onto stable storage."""
        try:
            await self.node.flush()
        except (OSError, PynbdError) as error:
            raise WriteError(f"{self.name}: cannot flush: {reason(error)}") from error


class OverlayTarget(Target):
    """A target that reads as its backing file where nothing was written: it is given what differs
    from that, whole multiples of ``granule`` bytes, a power of two.
    """

    granule = 1 << 16

    async def write(self, offset: int, view: memoryview) -> None:
        there = memoryview(bytearray(len(view)))
        await self.read(offset, there)
        difference = (np.frombuffer(view, np.uint8) ^ np.frombuffer(there, np.uint8)).data
        for start, end, same in zero_runs(difference, offset, self.granule):
            if not same:
                await super().write(start, view[start - offset : end - offset])

    async def zero(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            runs = await self.map(offset, end - offset)
            for start, stop, kind, _, _ in runs:
                if not kind & ZERO:
                    await super().zero(start, stop - start)
            offset = runs.end


def zero_runs(view: memoryview, offset: int, granularity: int) -> Iterator[tuple[int, int, bool]]:
    """(start, end, is zero) of the runs of what ``view`` holds from ``offset`` on.

    They consist of blocks of ``granularity``, a power of two from 8 on, which begin at its
    multiples; the first and the last one may be cut. With 0 all is one run that is not zero.
    """
    start, end = offset, offset + len(view)
    zero = False
    for edge, becomes in _blocks(view, offset, granularity) if granularity else ():
        if becomes != zero and edge > start:
            yield start, edge, zero
            start = edge
        zero = becomes
    if start < end:
        yield start, end, zero


def _blocks(view: memoryview, offset: int, granularity: int) -> Iterator[tuple[int, bool]]:
    """Where runs of zero blocks, and of others, begin; neighbours may be alike."""
    first = min(-offset % granularity, len(view))
    count = (len(view) - first) // granularity
    last = first + count * granularity
    if first:
        yield offset, not np.frombuffer(view[:first], np.uint8).any()
    if count:
        words = np.frombuffer(view[first:last], np.uint64).reshape(count, -1)
        zeroes = words[:, 0] == 0  # most of what is not zero shows it at once
        suspects = np.flatnonzero(zeroes)
        zeroes[suspects] = words[suspects].max(axis=1) == 0
        changes = np.flatnonzero(np.append(True, zeroes[1:] != zeroes[:-1]))
        for row in changes.tolist():
            yield offset + first + row * granularity, bool(zeroes[row])
    if last < len(view):
        yield offset + last, not np.frombuffer(view[last:], np.uint8).any()
