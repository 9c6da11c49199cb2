"""Dirty tracking: every change of guest data is recorded in the enabled bitmaps, which are stored
when the image is closed.

docs/interop/qcow2.rst, "Bitmaps": a bitmap that is in use is marked so, on stable storage, before
the first change that its bits on disk do not know of; whoever finds the mark knows that they are
out of date. Then they may be overwritten, and the mark goes once the new ones are on stable
storage. Disabled bitmaps, and those that were in use already, are left as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.engine import Buffer, HostFile
from pynbd.block.qcow2.bitmaps import Stored, read_bitmap_table
from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.commit import Commits, Rule
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.format import BITMAP_TABLE_OFFSET_MASK, BitmapFlags
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.places import Places
from pynbd.block.qcow2.refcounts import Refcounts
from pynbd.errors import CorruptImage

_FLAGS = struct.Struct(">I")


@dataclass(slots=True)
class _Tracked:
    """A bitmap that records: its bits are in memory, and so is its table."""

    stored: Stored
    bitmap: DirtyBitmap
    table: Table = field(init=False)


class Tracking:
    """The bitmaps of one image that is written."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        stored: Sequence[Stored],
        refcounts: Refcounts,
        commits: Commits,
        places: Places,
    ) -> None:
        self._file = file
        self._header = header
        self._refcounts = refcounts
        self._commits = commits
        self._places = places
        self._tracked = [
            _Tracked(each, each.bitmap) for each in stored if each.bitmap and each.bitmap.enabled
        ]
        self._in_use = False

    @classmethod
    async def open(
        cls,
        file: HostFile,
        header: Header,
        stored: Sequence[Stored],
        refcounts: Refcounts,
        commits: Commits,
        places: Places,
    ) -> Tracking:
        """Read the bitmap tables: all of them have their places."""
        tracking = cls(file, header, stored, refcounts, commits, places)
        tables: dict[str, Table] = {}
        for each in stored:
            values = await read_bitmap_table(file, header, each.table)
            table = tables[each.name] = Table(each.table.offset, values)
            places.add(table.host_offset, table.length, f"the table of bitmap {each.name!r}")

            def host_offsets(table: Table = table) -> UInt64s:
                return table.values & np.uint64(BITMAP_TABLE_OFFSET_MASK)

            places.add_tables(f"bits of bitmap {each.name!r}, part", host_offsets)
        for tracked in tracking._tracked:
            tracked.table = tables[tracked.stored.name]
        return tracking

    def record(self, offset: int, length: int) -> None:
        """Guest bytes are about to change."""
        for tracked in self._tracked:
            tracked.bitmap.mark(offset, length)

    async def begin(self) -> None:
        """Before the first change: have the bits in memory, and tell so on disk."""
        for tracked in self._tracked:
            await tracked.bitmap.load()
        if self._tracked:
            await self._set_flags(BitmapFlags.IN_USE)
            await self._commits.barrier(Rule.IN_USE)
            self._in_use = True

    async def store(self) -> None:
        """Bring the bits onto stable storage, and then tell so."""
        if not self._in_use:
            return
        for tracked in self._tracked:
            await self._write_bits(tracked)
        await self._commits.commit()
        await self._commits.barrier(Rule.STORED)
        await self._set_flags(BitmapFlags.NONE)
        await self._file.flush()
        self._in_use = False

    async def _set_flags(self, in_use: BitmapFlags) -> None:
        pieces: list[tuple[Buffer, int]] = []
        for tracked in self._tracked:
            flags = tracked.stored.flags & ~BitmapFlags.IN_USE | in_use
            pieces.append((_FLAGS.pack(flags), tracked.stored.flags_offset))
        for error in filter(None, await self._file.write_batch(pieces)):
            raise error

    async def _write_bits(self, tracked: _Tracked) -> None:
        size, table = self._header.cluster_size, tracked.table
        pieces: list[tuple[Buffer, int]] = []
        with memoryview(tracked.bitmap.bits) as bits:
            for index, entry in enumerate(table.values.tolist()):
                part = bytes(bits[index * size : (index + 1) * size])
                host_offset = entry & BITMAP_TABLE_OFFSET_MASK
                if not any(part):
                    self._commits.free([(host_offset, size)] if host_offset else [])
                    host_offset = 0
                elif host_offset:
                    self._check(host_offset)
                else:
                    (run,) = await self._refcounts.allocate(1)
                    host_offset = run.host_offset
                    self._places.mark(host_offset)
                if host_offset != entry:
                    table.values[index] = host_offset
                    self._commits.link(table, index, index + 1)
                if host_offset:
                    pieces.append((part.ljust(size, b"\0"), host_offset))
        for error in filter(None, await self._file.write_batch(pieces)):
            raise error

    def _check(self, host_offset: int) -> None:
        there = self._places.names(host_offset)
        if len(there) > 1:
            raise CorruptImage(f"{self._file.path}: {' and '.join(there)} are in one cluster")
