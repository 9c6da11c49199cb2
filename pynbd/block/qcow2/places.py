"""Which host clusters hold metadata, and whose they are.

Before a cluster is allocated, before guest data is written in place, and before a table is changed,
its place is compared with all of these: in a damaged image it may be somebody else's, and the write
would damage the image further. QEMU has the same check (``qcow2_check_metadata_overlap``), with
fewer structures by default.

Whether a cluster is among them costs one bisect through what was there at the beginning and one
look into the set of what came later. Whose it is is looked for only after a hit. What shares its
place with something else did so at the beginning, as nothing new is put where metadata is: those
clusters are known as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.entries import UInt64s
from pynbd.errors import CorruptImage

# So many clusters that came later are put in order with the others.
_LATER_MAX = 1 << 16
# Of what is in one place no more is told: of a damaged image it may be millions of tables.
_MOST_NAMED = 4


class Places:
    """The metadata of one image, as clusters of ``1 << cluster_bits`` bytes; `seal` it before it
    is asked.
    """

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._regions: list[tuple[int, int, str]] = []  # first cluster and last + 1, whose
        # Many tables, named by an array that lives: whose, and the host offsets it has now.
        self._tables: list[tuple[str, Callable[[], UInt64s]]] = []
        # Others, named by an array that nobody changes: whose, the indexes that are not 0, offsets.
        self._unchanging: list[tuple[str, npt.NDArray[np.uint32], UInt64s]] = []
        # In ascending order, once it is sealed: where regions begin, where they and those before
        # them end, the clusters of tables, and those that are not alone in their place.
        self._firsts: Sequence[int] = ()
        self._ends: Sequence[int] = ()
        self._singles: Sequence[int] = ()
        self._shared: Sequence[int] = ()
        self._later: set[int] | None = None  # not before it is sealed

    def add(self, host_offset: int, length: int, what: str) -> None:
        """``length`` bytes of ``what``, with the rest of their last cluster."""
        if length:
            first, end = self._clusters(host_offset, length)
            self._regions.append((first, end, what))
            if self._later is not None:
                self._later.update(range(first, end))

    def remove(self, what: str) -> None:
        """``what`` is not there any more."""
        self._regions = [region for region in self._regions if region[2] != what]

    def add_tables(self, what: str, host_offsets: Callable[[], UInt64s]) -> None:
        """Tables of one cluster each; ``host_offsets`` gives where they are, 0 for none.

        One that comes later is to be told (`mark`).
        """
        self._tables.append((what, host_offsets))

    def add_unchanging(self, what: str, host_offsets: UInt64s) -> None:
        """Tables of one cluster each, which stay where they are; 0 is none."""
        indexes = np.flatnonzero(host_offsets)
        if len(indexes):
            named = indexes.astype(np.uint32), host_offsets[indexes]
            self._unchanging.append((what, *named))

    def seal(self) -> None:
        """Put everything in order. What comes later is told apart from it."""
        regions = np.array(sorted(region[:2] for region in self._regions), np.uint64)
        firsts, ends = regions.reshape(-1, 2).T
        ends = np.maximum.accumulate(ends)
        self._firsts, self._ends = firsts.copy().data, ends.data
        singles = self._all_tables()
        first = np.searchsorted(singles, firsts)
        last = np.searchsorted(singles, ends)
        shared = [singles[:-1][singles[1:] == singles[:-1]]]
        shared += [singles[first[row] : last[row]] for row in np.flatnonzero(first < last)]
        every = np.sort(np.concatenate(shared))
        # As np.unique has it, which imports masked arrays when it is first called.
        self._shared = np.append(every[:1], every[1:][every[1:] != every[:-1]]).data
        self._singles = singles.data
        self._later = set()

    def _all_tables(self) -> UInt64s:
        """The clusters of all tables, in ascending order."""
        living = (host_offsets() for _, host_offsets in self._tables)  # each is gone again
        named = [host_offsets[host_offsets != 0] for host_offsets in living]
        named += [host_offsets for _, _, host_offsets in self._unchanging]
        tables = np.concatenate([np.zeros(0, np.uint64), *named])
        tables >>= np.uint64(self._bits)
        tables.sort()
        return tables

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
        assert self._later is not None
        self._later.add(host_offset >> self._bits)
        if len(self._later) > _LATER_MAX:
            later = np.fromiter(self._later, np.uint64, len(self._later))
            singles = np.concatenate((self._singles, np.sort(later)))
            singles.sort(kind="stable")  # which is fast for what is in order already
            self._singles = singles.data
            self._later.clear()

    def hold(self, host_offset: int, length: int) -> bool:
        """Whether a range of one byte or more touches metadata."""
        assert self._later is not None
        first, end = self._clusters(host_offset, length)
        region = bisect_left(self._firsts, end)
        if (
            (region and self._ends[region - 1] > first)
            or _has(self._singles, first, end)
            or (self._later and not self._later.isdisjoint(range(first, end)))
        ):
            return any(self._names(first, end))  # it may be what was removed
        return False

    def check(self, table: Table, path: str) -> None:
        """Raise `CorruptImage` if ``table`` of the image in ``path`` shares its place with other
        metadata; to be asked before it is changed.
        """
        if not table.checked:
            self.check_range(table.host_offset, table.length, path)
            table.checked = True

    def check_range(self, host_offset: int, length: int, path: str) -> None:
        """`check` for what is not a `Table`."""
        first, end = self._clusters(host_offset, length)
        if _has(self._shared, first, end):
            there = self.names(host_offset, length)
            if len(there) > 1:
                raise CorruptImage(f"{path}: {' and '.join(there)} are in one cluster")

    def names(self, host_offset: int, length: int = 1) -> list[str]:
        """What is in the clusters of a range, and where; of very much the first."""
        return list(islice(self._names(*self._clusters(host_offset, length)), _MOST_NAMED))

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
            for index in np.flatnonzero(inside)[:_MOST_NAMED].tolist():
                yield f"{what} {index} at {int(offsets[index]):#x}"
        for what, indexes, offsets in self._unchanging:
            numbers = offsets >> np.uint64(self._bits)
            inside = (numbers >= first) & (numbers < last)
            for row in np.flatnonzero(inside)[:_MOST_NAMED].tolist():
                yield f"{what} {indexes[row]} at {int(offsets[row]):#x}"


def _has(numbers: Sequence[int], first: int, end: int) -> bool:
    """Whether one of ``numbers``, in ascending order, is in [first, end)."""
    index = bisect_left(numbers, first)
    return index < len(numbers) and numbers[index] < end
