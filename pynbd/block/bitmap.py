"""DirtyBitmap: which parts of a disk were written (docs/interop/qcow2.rst, "Bitmaps", "Dirty
tracking bitmaps").

One bit for each granule of guest range, the least significant bit of each byte first, as on disk.
The bits of a persistent bitmap stay on disk until somebody asks for them, and whoever only looks at
them borrows them for that moment: an image may have 65535 bitmaps.

`DirtyBitmap.runs` is bounded by the runs that it returns and by the bits that it looks at. It goes
through them in stretches that a processor's cache holds, and unpacks only those in which something
changes.
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

# What one call looks at, in stretches of so many words: about a millisecond's worth, whether the
# bits are all alike or all different.
_BITS_PER_STEP = 1 << 23
_RUNS_PER_STEP = 1 << 17
_STRETCH = 1 << 11


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
        edges, seen = _edges(bits, first, min(last, first + _BITS_PER_STEP), limit)
        dirty = bits[first]
        count = sum(map(len, edges))
        tail = [end if seen == last else seen * self.granularity]
        if seen == last and end > self.size and dirty ^ count & 1:
            tail.insert(0, self.size)
        ends = np.concatenate((*edges, np.array(tail, np.int64)))
        ends[:count] *= self.granularity
        ends = ends[:limit]
        by_turns = np.empty(len(ends), np.uint8)
        by_turns[::2], by_turns[1::2] = dirty, 1 - dirty
        return DirtyRuns(offset, ends, by_turns)


def _edges(bits: bitarray, first: int, last: int, limit: int) -> tuple[list[Int64s], int]:
    """The bits in (first, last) that differ from the bit before, or the first of them, about
    ``limit``, and where looking ended.
    """
    words = np.frombuffer(memoryview(bits), "<u8")[: -(-last // _WORD_BITS)]
    found: list[Int64s] = []
    left = min(limit, _RUNS_PER_STEP)
    for start in range(first // _WORD_BITS, len(words), _STRETCH):
        stretch = words[start : start + _STRETCH]
        # Each bit against the one before it, which for the least significant is in the word before.
        changes = stretch ^ stretch << _ONE
        changes[1:] ^= stretch[:-1] >> _LAST_BIT
        if start:
            changes[0] ^= words[start - 1] >> _LAST_BIT
        if not changes.any():
            continue
        unpacked = np.unpackbits(changes.view(np.uint8), bitorder="little")
        edges = np.flatnonzero(unpacked.view(np.bool_))  # of bytes it would take ten times as long
        edges += start * _WORD_BITS
        if edges[0] <= first:
            edges = edges[np.searchsorted(edges, first, "right") :]
        if len(edges) and edges[-1] >= last:
            edges = edges[: np.searchsorted(edges, last)]
        found.append(edges)
        left -= len(edges)
        if left <= 0:
            return found, min((start + _STRETCH) * _WORD_BITS, last)
    return found, last
