"""Which host clusters hold metadata, and whose they are.

Before a cluster is allocated, before guest data is written in place, and before a table is changed,
its place is compared with all of these: in a damaged image it may be somebody else's, and the write
would damage the image further. QEMU has the same check (``qcow2_check_metadata_overlap``), with
fewer structures by default.

Whether a cluster is among them costs one bisect through what was there at the beginning and one
look into the set of what came later. Whose it is is looked for only after a hit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from pynbd.block.qcow2.entries import UInt64s

# So many clusters that came later are put in order with the others.
_LATER_MAX = 1 << 16


class Places:
    """The metadata of one image, as clusters of ``1 << cluster_bits`` bytes; `seal` it before it
    is asked.
    """

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._regions: list[tuple[int, int, str]] = []  # first cluster and last + 1, whose
        # Many tables, named by an array that lives: whose, and the host offsets it has now.
        self._tables: list[tuple[str, Callable[[], UInt64s]]] = []
        # Disjoint ranges of clusters in ascending order.
        self._firsts: Sequence[int] = ()
        self._lasts: Sequence[int] = ()
        self._later: set[int] = set()

    def add(self, host_offset: int, length: int, what: str) -> None:
        """``length`` bytes of ``what``, with the rest of their last cluster."""
        if length:
            first, end = self._clusters(host_offset, length)
            self._regions.append((first, end, what))
            self._later.update(range(first, end))

    def remove(self, what: str) -> None:
        """``what`` is not there any more."""
        self._regions = [region for region in self._regions if region[2] != what]

    def add_tables(self, what: str, host_offsets: Callable[[], UInt64s]) -> None:
        """Tables of one cluster each; ``host_offsets`` gives where they are, 0 for none.

        One that comes later is to be told (`mark`).
        """
        self._tables.append((what, host_offsets))

    def seal(self) -> None:
        """Put everything in order."""
        bits = np.uint64(self._bits)
        regions = np.array([region[:2] for region in self._regions], np.uint64).reshape(-1, 2)
        numbers = [host_offsets() >> bits for _, host_offsets in self._tables]
        single = np.unique(np.concatenate([*numbers, np.zeros(1, np.uint64)]))[1:]
        firsts = np.concatenate((regions[:, 0], single))
        ends = np.concatenate((regions[:, 1], single + np.uint64(1)))
        order = np.argsort(firsts, kind="stable")
        firsts, ends = firsts[order], np.maximum.accumulate(ends[order])
        apart = np.append(True, firsts[1:] > ends[:-1])
        self._firsts = np.ascontiguousarray(firsts[apart]).data
        self._lasts = np.ascontiguousarray(ends[np.append(apart[1:], True)]).data
        self._later.clear()

    def overlaps(self) -> Iterator[str]:
        """Regions that are in one place, two at a time."""
        regions = sorted(self._regions)
        for one, other in pairwise(regions):
            if other[0] < one[1]:
                yield (
                    f"{one[2]} at {one[0] << self._bits:#x} and"
                    f" {other[2]} at {other[0] << self._bits:#x} overlap"
                )

    def mark(self, host_offset: int) -> None:
        """A new table is in this cluster."""
        self._later.add(host_offset >> self._bits)
        if len(self._later) > _LATER_MAX:
            self.seal()

    def hold(self, host_offset: int, length: int) -> bool:
        """Whether a range of one byte or more touches metadata."""
        first, end = self._clusters(host_offset, length)
        index = bisect_left(self._firsts, end)
        old = index > 0 and self._lasts[index - 1] > first
        if not old and (self._later.isdisjoint(range(first, end)) or not self._later):
            return False
        return any(self._names(first, end))  # it may be what was removed

    def names(self, host_offset: int, length: int = 1) -> list[str]:
        """What is in the clusters of a range, and where."""
        return list(self._names(*self._clusters(host_offset, length)))

    def _clusters(self, host_offset: int, length: int) -> tuple[int, int]:
        return host_offset >> self._bits, (host_offset + length - 1 >> self._bits) + 1

    def _names(self, first: int, last: int) -> Iterator[str]:
        for start, end, what in self._regions:
            if start < last and first < end:
                yield f"{what} at {start << self._bits:#x}"
        for what, host_offsets in self._tables:
            offsets = host_offsets()
            numbers = offsets >> np.uint64(self._bits)
            inside = (numbers >= max(first, 1)) & (numbers < last)
            for index in np.flatnonzero(inside).tolist():
                yield f"{what} {index} at {int(offsets[index]):#x}"
