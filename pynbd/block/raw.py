"""Raw images: the guest offset is the host offset, or is at a fixed distance from it.

A disk of whole sectors of 512 bytes, as QEMU makes it of every raw file, may be longer than its
file: the rest of the last sector reads as zeroes, and a write there makes the file longer.

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
from pynbd.block.window import SECTOR, check_window, round_up

GUARDED = 512

# Pieces that one look for holes brings, about a millisecond's worth.
_RUNS_PER_STEP = 4096


class RawNode(BlockNode):
    """A raw file or device. ``guard``: what format a first sector looks like, for a guessed
    format. ``start``, ``size``: the part of it that is the disk. ``whole_sectors``: the end of the
    file is rounded up to a multiple of 512. Raises `ImageError` if the part is not in the file.
    """

    format = "raw"
    file: HostFile

    def __init__(
        self,
        file: HostFile,
        *,
        read_only: bool,
        guard: Callable[[bytes], str] | None = None,
        start: int = 0,
        size: int | None = None,
        whole_sectors: bool = False,
    ) -> None:
        self.name = file.path
        self.file = file
        self.read_only = read_only
        self.start = start
        file_size = file.size()
        check_window(self.name, file_size, start, size)
        if size is None:
            # In QEMU both are of whole sectors, the file and what is left of it.
            sector = SECTOR if whole_sectors else 1
            end = round_up(file_size, sector)
            size = round_up(max(end - start, 0), sector)
        self.size = size
        self._guard = guard
        self._first_sector = asyncio.Lock()
        # Plain from end to end: one window holds it all, and reads never ask for a map.
        self.window = max(self.size, RESOLVE_WINDOW)
        self._find_end()

    def _find_end(self) -> None:
        """Find out how far the file holds the disk, and remember how that is mapped."""
        self._end = max(min(self.file.size() - self.start, self.size), 0)
        if self.size:
            self.resolved.keep(Window(self._plain(0, self.size)))

    def _plain(self, offset: int, length: int) -> Runs:
        inside = max(min(self._end - offset, length), 0)
        rows = [(inside, DATA, self.start + offset), (length - inside, ZERO, NO_HOST)]
        return Runs.of(offset, [row for row in rows if row[0]])

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        if not want_zero:
            return self._plain(offset, length)
        pieces = await self.file.data_runs(self.start + offset, length, _RUNS_PER_STEP)
        rows = []
        at = self.start + offset
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
            start = self.start
            errors = await self.file.write_batch(
                [(data, start + offset) for offset, data in pieces], fua=fua
            )
            self._longer(pieces)
            return errors
        # One after the other: two harmless pieces can make a magic together.
        errors = []
        for offset, data in pieces:
            try:
                async with self._sector_lock(offset):
                    await self._check_guard(offset, data)
                    await self.file.write(data, self.start + offset, fua=fua)
            except OSError as error:
                errors.append(error)
            else:
                errors.append(None)
        self._longer(pieces)
        return errors

    def write_now(self, offset: int, data: Buffer) -> bool:
        if (self._guard and offset < GUARDED) or offset + len(data) > self._end:
            return False
        return self.file.put_now(data, self.start + offset)

    def _longer(self, pieces: Sequence[tuple[int, Buffer]]) -> None:
        """The file may have grown into its last sector."""
        if self._end < self.size and any(at + len(data) > self._end for at, data in pieces):
            self.resolved.forget(0, self.size)
            self._find_end()

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
        async with self._sector_lock(offset):
            await self._check_guard(offset, bytes(min(length, GUARDED)))
            await host.write_zeroes(
                self.file,
                self.start + offset,
                length,
                may_unmap=may_unmap and not no_hole,
                fast=fast,
            )
        if fua:
            await self.file.flush()

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        async with self._sector_lock(offset):
            await self._check_guard(offset, bytes(min(length, GUARDED)))
            await host.discard(self.file, self.start + offset, length)
        if fua:
            await self.file.flush()

    def _sector_lock(self, offset: int) -> AbstractAsyncContextManager[None]:
        return self._first_sector if self._guard and offset < GUARDED else nullcontext()

    async def _check_guard(self, offset: int, data: Buffer) -> None:
        if self._guard is None or offset >= GUARDED:
            return
        sector = bytearray(await self.file.read_bytes(GUARDED, self.start)).ljust(GUARDED, b"\0")
        sector[offset : offset + len(data)] = memoryview(data)[: GUARDED - offset]
        looks_like = self._guard(bytes(sector))
        if looks_like != "raw":
            raise OSError(
                errno.EPERM,
                f"its format was guessed; this would make it look like {looks_like} (try -f raw)",
                self.name,
            )
