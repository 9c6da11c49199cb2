"""L1 and L2 entries: from bits to runs and back (docs/interop/qcow2.rst, "Cluster mapping", "Extended L2 Entries"; pure).

`decode` turns a stretch of an L2 table into runs, all entries at once. An entry that breaks a rule becomes a
run of its own of kind CORRUPT, so that only the requests which touch it fail; `explain` says what is
wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pynbd.block.extent import Runs

UInt64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the header says about L2 tables. ``data_file``: guest clusters are in an external data file."""

    cluster_bits: int
    extended: bool = False
    version: int = 3
    data_file: bool = False

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entry_words(self) -> int:
        """64-bit words of an L2 entry."""
        return 2 if self.extended else 1

    @property
    def l2_bits(self) -> int:
        return self.cluster_bits - (4 if self.extended else 3)

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which is one cluster long."""
        return 1 << self.l2_bits


def decode(table: UInt64s, first: int, count: int, layout: Layout, guest_offset: int) -> Runs:
    """The runs of ``count`` clusters from entry ``first`` of an L2 table, the first of which is at ``guest_offset``.

    ``table``: the whole table in native byte order. Neighbours are coalesced; see `pynbd.block.extent.Runs`.
    """
    raise NotImplementedError


def explain(entry: int, bitmap: int, layout: Layout, guest_offset: int) -> str:
    """What is wrong with the L2 entry of the cluster at ``guest_offset``: a line for the log, "" if nothing is.

    ``bitmap``: the entry's second word with extended L2, else 0.
    """
    raise NotImplementedError


def l2_table_offset(l1_entry: int, layout: Layout) -> int:
    """Host offset of the L2 table that an L1 entry names; 0 if it names none. Raises `CorruptImage` if misaligned."""
    raise NotImplementedError


def compressed_range(descriptor: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, length in bytes) of a compressed cluster's data. Bits 62 and 63 of ``descriptor`` are ignored."""
    raise NotImplementedError


def compressed_entry(host_offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of a compressed cluster whose ``length`` bytes begin at ``host_offset``."""
    raise NotImplementedError
