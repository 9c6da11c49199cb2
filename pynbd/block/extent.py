"""Extents: what a range of a disk is made of (pure values, no I/O).

`Runs` is the answer of one layer or of a whole chain about a guest range, held as numpy columns,
because a map of 1 TiB may have millions of runs. `Extent` is one resolved piece of guest range,
ready for I/O.

Laws of `Runs`: ascending, contiguous from `offset`, every run at least one byte long, ``ends``
exclusive. A `Runs` may be shorter than what was asked for (never empty unless nothing was asked),
never longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt8s = npt.NDArray[np.uint8]
Int16s = npt.NDArray[np.int16]

# What a run is made of. DATA, ZERO and COMPRESSED say that the layer decides these bytes;
# UNALLOCATED defers to the backing node. ZERO | DATA is data known to read as zeroes (a hole in a
# preallocated file).
UNALLOCATED = 0
DATA = 1
ZERO = 2
COMPRESSED = 4 | DATA
CORRUPT = 8  # the metadata is damaged here: a request that touches it fails with EIO

NO_HOST = -1  # in the column of host offsets: the run has no bytes of its own anywhere


@dataclass(slots=True, eq=False)
class Runs:
    """Consecutive runs of a guest range, as columns of equal length.

    ``ends``: exclusive guest end of each run. ``kind``: UNALLOCATED, DATA, ZERO, COMPRESSED or
    CORRUPT.
    ``host``: host offset of the first byte of a DATA run, the L2 descriptor of a COMPRESSED one,
    else `NO_HOST`. ``depth``: which layer decides, 1 for the node that was asked, n for the n-th
    below it, 0 for none; a single layer's answer has 1 for everything but UNALLOCATED.
    """

    offset: int
    ends: Int64s
    kind: UInt8s
    host: Int64s
    depth: Int16s

    @classmethod
    def of(cls, offset: int, rows: list[tuple[int, int, int]]) -> Runs:
        """From rows of (length, kind, host offset)."""
        lengths, kinds, hosts = zip(*rows, strict=True)
        kind = np.array(kinds, np.uint8)
        ends = np.cumsum(np.array(lengths, np.int64)) + offset
        return cls(offset, ends, kind, np.array(hosts, np.int64), (kind != 0).astype(np.int16))

    @classmethod
    def single(cls, offset: int, length: int, kind: int, host: int = NO_HOST) -> Runs:
        """One run."""
        return cls.of(offset, [(length, kind, host)])

    @property
    def end(self) -> int:
        return int(self.ends[-1])

    @property
    def starts(self) -> Int64s:
        return np.concatenate((np.array([self.offset], np.int64), self.ends[:-1]))

    @property
    def lengths(self) -> Int64s:
        return np.diff(self.ends, prepend=np.int64(self.offset))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(start, end, kind, host, depth) of each run, as plain integers."""
        columns = (self.starts, self.ends, self.kind, self.host, self.depth)
        return zip(*(column.tolist() for column in columns), strict=True)

    def clip(self, end: int) -> Runs:
        """The part before guest offset ``end``, which lies inside."""
        if end >= self.end:
            return self
        count = int(np.searchsorted(self.ends, end, "left")) + 1
        ends = self.ends[:count].copy()
        ends[-1] = end
        return Runs(self.offset, ends, self.kind[:count], self.host[:count], self.depth[:count])

    def since(self, start: int) -> Runs:
        """The part from guest offset ``start`` on, which lies inside."""
        if start == self.offset:
            return self
        first = int(np.searchsorted(self.ends, start, "right"))
        _, host, _ = self.at(np.array([start], np.int64))
        hosts = self.host[first:].copy()
        hosts[0] = host[0]
        return Runs(start, self.ends[first:], self.kind[first:], hosts, self.depth[first:])

    def at(self, starts: Int64s) -> tuple[UInt8s, Int64s, Int16s]:
        """Kind, host offset and depth at each of the ascending guest offsets ``starts``."""
        rows = np.searchsorted(self.ends, starts, "right")
        kind, host = self.kind[rows], self.host[rows]
        # Inside a run of plain data the host offset advances with the guest offset; a compressed
        # cluster keeps its descriptor, whichever part of it is asked for.
        moved = np.where((host >= 0) & (kind & 4 == 0), host + starts - self.starts[rows], host)
        return kind, moved, self.depth[rows]

    def over(self, below: Runs) -> Runs:
        """This layer on top of ``below``, which covers the same range one layer deeper.

        Where this layer is UNALLOCATED, the answer is that of ``below``, one deeper.
        """
        end = min(self.end, below.end)
        ends = np.concatenate((self.ends, below.ends))
        ends.sort(kind="stable")  # which merges two ascending columns in one pass
        ends = ends[(ends <= end) & np.append(ends[1:] != ends[:-1], True)]
        starts = np.concatenate((np.array([self.offset], np.int64), ends[:-1]))
        kind, host, depth = self.at(starts)
        lower_kind, lower_host, lower_depth = below.at(starts)
        deeper = np.where(lower_depth > 0, lower_depth + 1, 0).astype(np.int16)
        hole = kind == UNALLOCATED
        return Runs(
            self.offset,
            ends,
            np.where(hole, lower_kind, kind),
            np.where(hole, lower_host, host),
            np.where(hole, deeper, depth),
        ).coalesced()

    def coalesced(self) -> Runs:
        """Equal neighbours merged; plain data only where it goes on at the next host offset."""
        if len(self) < 2:
            return self
        lengths = self.lengths
        same = (self.kind[1:] == self.kind[:-1]) & (self.depth[1:] == self.depth[:-1])
        onward = np.where(self.host[:-1] >= 0, self.host[:-1] + lengths[:-1], NO_HOST)
        same &= self.host[1:] == onward
        compressed = self.kind == COMPRESSED
        same &= ~compressed[1:]
        # Parts of one compressed cluster, cut by another layer's edges, keep one descriptor.
        parts = compressed[1:] & compressed[:-1] & (self.host[1:] == self.host[:-1])
        same |= parts & (self.depth[1:] == self.depth[:-1])
        last = np.concatenate((~same, np.array([True])))
        first = np.concatenate((np.array([True]), ~same))
        return Runs(
            self.offset, self.ends[last], self.kind[first], self.host[first], self.depth[first]
        )


def concatenate(pieces: list[Runs]) -> Runs:
    """Runs that follow one another, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Runs(
        pieces[0].offset,
        np.concatenate([piece.ends for piece in pieces]),
        np.concatenate([piece.kind for piece in pieces]),
        np.concatenate([piece.host for piece in pieces]),
        np.concatenate([piece.depth for piece in pieces]),
    ).coalesced()


@dataclass(slots=True, eq=False)
class Extent:
    """One resolved piece of guest range, for I/O: guest bytes [offset, end).

    ``file`` (a `HostFile`) and ``shift`` (host offset - guest offset) are set for plain data only,
    which may be read and sent straight from the file. ``node`` is the layer that owns the bytes; it
    fetches what is not plain. ``host`` as in `Runs`.
    """

    offset: int
    end: int
    kind: int
    depth: int
    host: int
    node: Any
    file: Any = None
    shift: int = 0
