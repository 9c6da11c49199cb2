"""Raw images: the guest offset is the host offset.

A raw image whose format was guessed is guarded: its first 512 bytes may not become the beginning of
another format, because the next to guess would take the guest's bytes for metadata, with the names
of host files in it. QEMU guards them in the same way.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from pynbd.block import file as host
from pynbd.block.engine import Buffer, HostFile
from pynbd.block.extent import DATA, NO_HOST, ZERO, Runs
from pynbd.block.node import RESOLVE_WINDOW, BlockNode
from pynbd.block.resolved import Window

GUARDED = 512

# Pieces that one look for holes brings, about a millisecond's worth.
_RUNS_PER_STEP = 4096


class RawNode(BlockNode):
    """A raw file or device. ``guard``: what format a first sector looks like, for a guessed
    format.
    """

    format = "raw"
    file: HostFile

    def __init__(
        self, file: HostFile, *, read_only: bool, guard: Callable[[bytes], str] | None = None
    ) -> None:
        self.name = file.path
        self.file = file
        self.read_only = read_only
        self.size = file.size()
        self._guard = guard
        self._first_sector = asyncio.Lock()
        # Plain from end to end: one window holds it all, and reads never ask for a map.
        self.window = max(self.size, RESOLVE_WINDOW)
        if self.size:
            self.resolved.keep(Window(Runs.single(0, self.size, DATA, 0)))

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        if not want_zero:
            return Runs.single(offset, length, DATA, offset)
        pieces = await self.file.data_runs(offset, length, _RUNS_PER_STEP)
        rows = []
        at = offset
        for size, is_data in pieces:
            rows.append((size, DATA, at) if is_data else (size, ZERO, NO_HOST))
            at += size
        runs = Runs.of(offset, rows)
        runs.depth[:] = 1
        return runs

    def past_end(self, length: int) -> bytes:
        raise OSError(errno.EIO, "the file became shorter than the export", self.name)

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        if self._guard is None or all(offset >= GUARDED for offset, _ in pieces):
            return await self.file.write_batch([(data, offset) for offset, data in pieces], fua=fua)
        # One after the other: two harmless pieces can make a magic together.
        errors: list[OSError | None] = []
        for offset, data in pieces:
            try:
                async with self._sector_lock(offset):
                    await self._check_guard(offset, data)
                    await self.file.write(data, offset, fua=fua)
            except OSError as error:
                errors.append(error)
            else:
                errors.append(None)
        return errors

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fast: bool, fua: bool = False
    ) -> None:
        async with self._sector_lock(offset):
            await self._check_guard(offset, bytes(min(length, GUARDED)))
            await host.write_zeroes(self.file, offset, length, may_unmap=may_unmap, fast=fast)
        if fua:
            await self.file.flush()

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        async with self._sector_lock(offset):
            await self._check_guard(offset, bytes(min(length, GUARDED)))
            await host.discard(self.file, offset, length)
        if fua:
            await self.file.flush()

    def _sector_lock(self, offset: int) -> AbstractAsyncContextManager[None]:
        return self._first_sector if self._guard and offset < GUARDED else nullcontext()

    async def _check_guard(self, offset: int, data: Buffer) -> None:
        if self._guard is None or offset >= GUARDED:
            return
        sector = bytearray(await self.file.read_bytes(GUARDED, 0)).ljust(GUARDED, b"\0")
        sector[offset : offset + len(data)] = memoryview(data)[: GUARDED - offset]
        looks_like = self._guard(bytes(sector))
        if looks_like != "raw":
            raise OSError(
                errno.EPERM,
                f"its format was guessed; this would make it look like {looks_like} (try -f raw)",
                self.name,
            )
