"""SliceNode: guest bytes of an image from an offset on, as a disk of its own.

It is QEMU's raw driver on top of an image (``qemu-nbd --offset``), and is seen as QEMU shows it:
`map` says that what the image itself holds is at depth 1, and what lies below it at depth 0: the
layers below an image are the image's own affair. Its bitmaps are not seen at all.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pynbd.block.engine import Buffer, HostFile
from pynbd.block.extent import ZERO, Extent, Runs, concatenate
from pynbd.block.node import BlockNode
from pynbd.block.window import check_window, round_up


class SliceNode(BlockNode):
    """Bytes [start, start + size) of ``image``; without ``size``, to its end.

    The size is rounded up to whole sectors of 512 bytes; what is past the end of the image reads as
    zeroes. Raises `ImageError` if the slice is not inside the image.
    """

    def __init__(self, image: BlockNode, start: int, size: int | None = None) -> None:
        check_window(image.name, image.size, start, size)
        self.backing = image
        self.name, self.format = image.name, image.format
        self.read_only = image.read_only
        self.file = image.file
        self.pins = image.pins
        self.start = start
        if size is None:
            size = round_up(image.size - start)
        self.size = size
        image.resolved.listener = self._forget

    @property
    def image(self) -> BlockNode:
        """What it is a slice of."""
        assert self.backing is not None
        return self.backing

    def chain(self) -> Iterator[BlockNode]:
        """The layers of the image: the slice is none of them."""
        return self.image.chain()

    def bitmap_layers(self) -> Iterator[BlockNode]:
        return iter(())

    def files(self) -> Sequence[HostFile]:
        return ()

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        return await self.map(offset, length, want_zero=want_zero)

    async def map(self, offset: int, length: int, *, want_zero: bool = True) -> Runs:
        runs = await self._moved(offset, length, want_zero=want_zero)
        own = (runs.depth == 1).astype(np.int16)
        return Runs(runs.offset, runs.ends, runs.kind, runs.host, own)

    async def lookup(self, offset: int, length: int) -> Runs:
        return await self._moved(offset, length, want_zero=False)

    async def _moved(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        """The map of the image, in our guest offsets."""
        inside = self._inside(offset, length)
        if not inside:
            return Runs.single(offset, length, ZERO)
        # For I/O depths are places in the chain, also where the image is itself a slice.
        if want_zero:
            runs = await self.image.map(self.start + offset, inside)
        else:
            runs = await self.image.lookup(self.start + offset, inside)
        runs = Runs(offset, runs.ends - self.start, runs.kind, runs.host, runs.depth)
        if runs.end == offset + inside and inside < length:
            tail = Runs.single(runs.end, length - inside, ZERO)
            runs = concatenate([runs, tail])
        return runs

    async def fetch(self, extent: Extent, offset: int, view: memoryview) -> None:
        if extent.file is not None or extent.kind == ZERO:
            await super().fetch(extent, offset, view)
            return
        await self.image.fetch(self._in_image(extent), offset + self.start, view)

    def decompressed_now(self, depth: int, descriptor: int, offset: int, view: memoryview) -> bool:
        return self.image.decompressed_now(depth, descriptor, self.start + offset, view)

    async def decompressed(self, extents: Sequence[Extent]) -> list[Buffer]:
        return await self.image.decompressed([self._in_image(extent) for extent in extents])

    def _in_image(self, extent: Extent) -> Extent:
        return replace(extent, offset=extent.offset + self.start, end=extent.end + self.start)

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        # Nothing but a part of the last sector can be past the end of the image.
        fits = [self._inside(offset, len(data)) == len(data) for offset, data in pieces]
        moved = [
            (self.start + offset, data)
            for fit, (offset, data) in zip(fits, pieces, strict=True)
            if fit
        ]
        errors = iter(await self.image.pwrite_batch(moved, fua=fua))
        return [next(errors) if fit else self._past_end() for fit in fits]

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
        inside = self._inside(offset, length)
        if inside:
            await self.image.write_zeroes(
                self.start + offset,
                inside,
                may_unmap=may_unmap,
                fast=fast,
                fua=fua,
                no_hole=no_hole,
            )

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        inside = self._inside(offset, length)
        if inside:
            await self.image.discard(self.start + offset, inside, fua=fua)

    async def flush(self) -> None:
        await self.image.flush()

    def _inside(self, offset: int, length: int) -> int:
        """How many bytes of a range are inside the image; the rest are past its end."""
        return max(min(length, self.image.size - self.start - offset), 0)

    def _forget(self, offset: int, end: int) -> None:
        if end > self.start:
            self.resolved.forget(max(offset - self.start, 0), min(end - self.start, self.size))

    def _past_end(self) -> OSError:
        return OSError(errno.ENOSPC, "past the end of the image", self.name)
