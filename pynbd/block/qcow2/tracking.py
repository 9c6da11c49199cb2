"""Dirty tracking: every change of guest data is recorded in the enabled bitmaps, which are stored
when the image is closed.

docs/interop/qcow2.rst, "Bitmaps": a bitmap that is in use is marked so, on stable storage, before
the first change that its bits on disk do not know of; whoever finds the mark knows that they are
out of date. Then they may be overwritten, and the mark goes once the new ones are on stable
storage. Disabled bitmaps, and those that were in use already, are left as they are.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.engine import Buffer, HostFile
from pynbd.block.limits import ChainMemory
from pynbd.block.qcow2.bitmaps import Stored, read_bitmap_table
from pynbd.block.qcow2.cache import LEAST_READ, Table
from pynbd.block.qcow2.commit import Commits, Rule
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.format import BITMAP_TABLE_OFFSET_MASK, BitmapFlags
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.places import Places
from pynbd.block.qcow2.refcounts import Refcounts

_FLAGS = struct.Struct(">I")

# Of bits that are written in one go.
_BYTES_PER_STEP = 4 << 20
# Tables of the other bitmaps, whose bits have their places known.
_UNTRACKED_TABLE_BYTES = 16 << 20


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
        self.in_use = False  # at least one of them may be marked so

    @classmethod
    async def open(
        cls,
        file: HostFile,
        header: Header,
        stored: Sequence[Stored],
        refcounts: Refcounts,
        commits: Commits,
        places: Places,
        memory: ChainMemory,
    ) -> Tracking:
        """Read the bitmap tables: all of them have their places. Raises `ImageError` if there are
        too many bits to record in.
        """
        tracking = cls(file, header, stored, refcounts, commits, places)
        needed = sum(each.bitmap.size // each.bitmap.granularity for each in tracking._tracked) // 8
        memory.check_bits(needed, "its bitmaps that record every write", file.path)
        tracked = {each.stored.name: each for each in tracking._tracked}
        left = _UNTRACKED_TABLE_BYTES
        for each in stored:
            length = each.table.size * 8
            places.add(each.table.offset, length, f"the table of bitmap {each.name!r}")
            bits = f"bits of bitmap {each.name!r}, part"
            if each.name in tracked:
                values = await read_bitmap_table(file, header, each.table)
                table = tracked[each.name].table = Table(each.table.offset, values)
                places.add_tables(bits, partial(_host_offsets, table))
            elif length <= left:
                left -= max(length, LEAST_READ)
                values = await read_bitmap_table(file, header, each.table)
                places.add_unchanging(bits, values & np.uint64(BITMAP_TABLE_OFFSET_MASK))
            await asyncio.sleep(0)
        return tracking

    def record(self, offset: int, length: int) -> None:
        """Guest bytes are about to change."""
        for tracked in self._tracked:
            tracked.bitmap.mark(offset, length)

    async def begin(self) -> None:
        """Before the first change: have the bits in memory, and tell so on disk."""
        for tracked in self._tracked:
            await tracked.bitmap.load()
            await asyncio.sleep(0)
        if self._tracked:
            self.in_use = True
            await self._set_flags(BitmapFlags.IN_USE)
            await self._commits.barrier(Rule.IN_USE)

    async def store(self) -> None:
        """Bring the bits onto stable storage, and then tell so."""
        if not self.in_use:
            return
        for tracked in self._tracked:
            await self._write_bits(tracked)
        await self._commits.commit()  # Rule.STORED: it ends with a barrier
        await self._set_flags(BitmapFlags.NONE)
        await self._file.flush()
        self.in_use = False

    async def _set_flags(self, in_use: BitmapFlags) -> None:
        pieces: list[tuple[Buffer, int]] = []
        for tracked in self._tracked:
            flags = tracked.stored.flags & ~BitmapFlags.IN_USE | in_use
            pieces.append((_FLAGS.pack(flags), tracked.stored.flags_offset))
        for error in filter(None, await self._file.write_batch(pieces)):
            raise error

    async def _write_bits(self, tracked: _Tracked) -> None:
        entries = len(tracked.table.values)
        step = max(_BYTES_PER_STEP // self._header.cluster_size, 1)
        for first in range(0, entries, step):
            await self._write_step(tracked, first, min(first + step, entries))

    async def _write_step(self, tracked: _Tracked, first: int, last: int) -> None:
        """Write the bits of entries [first, last) of a bitmap table, and then link them."""
        size, table = self._header.cluster_size, tracked.table
        bitmap = f"bitmap {tracked.stored.name!r}"
        self._refcounts.check_there(table.host_offset, table.length, f"the table of {bitmap}")
        self._places.check(table, self._file.path)
        with memoryview(tracked.bitmap.bits) as bits:
            data = bytes(bits[first * size : last * size]).ljust((last - first) * size, b"\0")
        used = [part.any() for part in np.frombuffer(data, np.uint8).reshape(-1, size)]
        old = (table.values[first:last] & np.uint64(BITMAP_TABLE_OFFSET_MASK)).tolist()
        homeless: list[int] = []
        for index, host_offset in enumerate(old):
            if not used[index]:
                continue
            if host_offset:
                self._refcounts.check_there(host_offset, size, f"a part of {bitmap}")
                self._places.check_range(host_offset, size, self._file.path)
            # In a damaged image the cluster may be somebody else's, too.
            if not host_offset or await self._refcounts.shared(host_offset):
                homeless.append(index)
        runs = await self._refcounts.allocate(len(homeless)) if homeless else []
        places = [run.host_offset + at * size for run in runs for at in range(run.clusters)]
        new = [at if wanted else 0 for at, wanted in zip(old, used, strict=True)]
        for index, place in zip(homeless, places, strict=True):
            new[index] = place
        pieces = [
            (data[index * size : (index + 1) * size], at) for index, at in enumerate(new) if at
        ]
        for error in filter(None, await self._file.write_batch(pieces) if pieces else ()):
            await self._refcounts.unallocate(runs)
            raise error
        for place in places:
            self._places.mark(place)
        self._commits.free(
            [(at, size) for at, left in zip(old, new, strict=True) if at != left and at]
        )
        table.values[first:last] = new
        self._commits.link(table, first, last)


def _host_offsets(table: Table) -> UInt64s:
    """Where the bits are that a bitmap table names now."""
    return table.values & np.uint64(BITMAP_TABLE_OFFSET_MASK)
