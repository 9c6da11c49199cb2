"""DirtyBitmap: which parts of a disk were written (docs/interop/qcow2.rst, "Bitmaps", "Dirty
tracking bitmaps").

One bit for each granule of guest range, the least significant bit of each byte first, as on disk.
The bits of a persistent bitmap stay on disk until somebody asks for them, and whoever only looks at
them borrows them for that moment: an image may have 65535 bitmaps.

`DirtyBitmap.runs` is bounded by the runs that it returns and by the bits that it looks at, and it
unpacks only words in which something changes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from bitarray import bitarray
from bitarray.util import intervals

from pynbd.block.extent import Int64s, UInt8s

_WORD_BITS = 64
_LAST_BIT = np.uint64(_WORD_BITS - 1)
_ONE = np.uint64(1)

# What one call looks at: about a millisecond's worth, be the bits all alike or all different.
_BITS_PER_STEP = 1 << 23
_WORDS_PER_STEP = 1 << 11


@dataclass(slots=True, eq=False)
class DirtyRuns:
    """Runs from guest offset ``offset``, clean and dirty by turns; ``ends`` are exclusive."""

    offset: int
    ends: Int64s
    dirty: UInt8s

    @property
    def end(self) -> int:
        return int(self.ends[-1])

    def __len__(self) -> int:
        return len(self.ends)


def blank(size: int, granularity: int) -> bitarray:
    """The bits of a clean bitmap: one a granule, then clean ones up to a whole 64-bit word."""
    granules = -(-size // granularity)
    # The host gives memory to an array of zeroes only where something is written.
    words = np.zeros(-(-granules // _WORD_BITS), np.uint64)
    return bitarray(buffer=words, endian="little")


class DirtyBitmap:
    """A dirty bitmap of ``size`` guest bytes, with a bit for each ``granularity`` bytes (a power of
    two).

    ``enabled``: writes are to be recorded (the auto flag of a persistent bitmap). ``source`` brings
    the bits of a persistent bitmap each time they are needed; they are laid out as those of
    `blank`.
    """

    def __init__(
        self,
        name: str,
        size: int,
        granularity: int,
        *,
        enabled: bool = True,
        source: Callable[[], Awaitable[bitarray]] | None = None,
    ) -> None:
        self.name = name
        self.size = size
        self.granularity = granularity
        self.enabled = enabled
        self.persistent = source is not None
        self._granules = -(-size // granularity)
        self._source = source
        self._bits = None if source else blank(size, granularity)

    async def load(self) -> None:
        """Have the bits in memory, to be changed. ``OSError`` if they cannot be read."""
        if self._bits is None and self._source:
            bits = await self._source()
            if self._bits is None:  # else somebody was faster, and may have marked his
                self._bits = bits

    async def _borrowed(self) -> bitarray:
        """The bits for one step, without keeping them."""
        if self._bits is None and self._source:
            return await self._source()
        return self.bits

    @property
    def bits(self) -> bitarray:
        """The bits of a loaded bitmap."""
        assert self._bits is not None
        return self._bits

    def mark(self, offset: int, length: int) -> None:
        """A guest range is dirty, and so is all that shares a granule with it."""
        if length:
            last = -(-(offset + length) // self.granularity)
            self.bits[offset // self.granularity : min(last, self._granules)] = 1

    def clear(self, offset: int, length: int) -> None:
        """A guest range is clean; a granule that is covered only in part stays as it was."""
        end = offset + length
        last = self._granules if end >= self.size else end // self.granularity
        first = -(-offset // self.granularity)
        if first < last:
            self.bits[first:last] = 0

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty in ``other``, loaded and of the same size, is dirty here too."""
        if other.granularity == self.granularity:
            self.bits[:] |= other.bits
            return
        for dirty, first, last in intervals(other.bits):
            if dirty:
                self.mark(first * other.granularity, (last - first) * other.granularity)

    def dirty_bytes(self) -> int:
        """How many guest bytes are dirty, in a loaded bitmap."""
        count: int = self.bits.count() * self.granularity
        if self._granules and self.bits[self._granules - 1]:
            count -= self._granules * self.granularity - self.size
        return count

    async def runs(self, offset: int, length: int, limit: int) -> DirtyRuns:
        """The runs from guest offset ``offset``, at most ``limit`` of them, within the next
        ``length`` bytes (> 0).

        The answer may be shorter than what was asked for, never empty. Edges are at multiples of
        the granularity; what lies past the end of the bitmap is clean. ``OSError`` if the bits
        cannot be read.
        """
        end = offset + length
        if offset >= self.size:
            return DirtyRuns(offset, np.array([end], np.int64), np.zeros(1, np.uint8))
        bits = await self._borrowed()
        first = offset // self.granularity
        last = -(-min(end, self.size) // self.granularity)
        edges, seen = _edges(bits, first, min(last, first + _BITS_PER_STEP))
        dirty = bits[first]
        ends = edges * self.granularity
        if seen < last:
            horizon = seen * self.granularity
        else:
            horizon = end
            if end > self.size and dirty ^ len(ends) & 1:
                ends = np.append(ends, np.int64(self.size))
        ends = np.append(ends, np.int64(horizon))[:limit]
        return DirtyRuns(offset, ends, (np.arange(dirty, dirty + len(ends)) & 1).astype(np.uint8))


def _edges(bits: bitarray, first: int, last: int) -> tuple[Int64s, int]:
    """The bits in (first, last) that differ from the bit before, and where looking ended."""
    start = first // _WORD_BITS
    words = np.frombuffer(memoryview(bits), "<u8")[start : -(-last // _WORD_BITS)]
    # Each bit against the one before it, which for the least significant is in the word before.
    changes = words ^ words << _ONE
    changes[1:] ^= words[:-1] >> _LAST_BIT
    rows = np.flatnonzero(changes)
    if len(rows) > _WORDS_PER_STEP:
        last = (start + int(rows[_WORDS_PER_STEP])) * _WORD_BITS
        rows = rows[:_WORDS_PER_STEP]
    found = np.flatnonzero(np.unpackbits(changes[rows].view(np.uint8), bitorder="little"))
    edges = (rows[found // _WORD_BITS] + start) * _WORD_BITS + found % _WORD_BITS
    return edges[np.searchsorted(edges, first, "right") : np.searchsorted(edges, last)], last
