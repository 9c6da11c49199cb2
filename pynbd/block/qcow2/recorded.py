"""The refcounts that an image has on disk, all of them, for a check (docs/interop/qcow2.rst, "Host
cluster management").

Rules: where there is no refcount block, or the table ends, refcounts are 0; those of a block that
is not at a cluster of a file are unknown; a block past the end of the file reads as zeroes.
"""

from __future__ import annotations

import asyncio

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.extent import Int64s
from pynbd.block.qcow2.cache import read_table
from pynbd.block.qcow2.entries import Bools, UInt64s
from pynbd.block.qcow2.format import MAX_OFFSET, REFT_OFFSET_MASK, REFT_RESERVED_MASK
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.widths import Values, decode
from pynbd.block.window import round_up

# Refcounts are known of what is in the file and, as far as there are blocks, of so many clusters
# behind it, which a file that was cut short may name.
_BEHIND = 1 << 24
_BYTES_PER_STEP = 1 << 17
_BLOCKS_PER_STEP = 256


class Recorded:
    """``counts`` by cluster, for whole blocks; ``table``, the refcount table's entries; ``blocks``,
    the host offsets in them. ``unknown``: the numbers of blocks that cannot be read. ``shared``: of
    those whose cluster others refer to, once references are counted.
    """

    def __init__(self, header: Header, table: UInt64s, clusters: int) -> None:
        self.table = table
        self.blocks: UInt64s = table & np.uint64(REFT_OFFSET_MASK)
        self.in_block = header.cluster_size * 8 >> header.refcount_order
        self.shared: set[int] = set()
        self.misaligned: Bools = self.blocks & np.uint64(header.cluster_size - 1) != 0
        named = np.flatnonzero(self.blocks)
        covered = (int(named[-1]) + 1) * self.in_block if len(named) else 0
        size = round_up(max(clusters + 1, min(covered, clusters + _BEHIND)), self.in_block)
        self.counts: Values = np.zeros(size, f"u{max(header.refcount_bits // 8, 1)}")
        far = self.blocks > MAX_OFFSET - header.cluster_size
        self.unknown: Int64s = np.flatnonzero(self.misaligned | far)
        self._cluster_bits = header.cluster_bits

    @classmethod
    async def load(cls, file: HostFile, header: Header) -> Recorded:
        """Read all refcounts of the image in ``file``."""
        size = header.cluster_size
        entries = header.refcount_table_clusters * size // 8
        table = await read_table(file, header.refcount_table_offset, entries)
        self = cls(header, table, -(-file.size() >> header.cluster_bits))
        readable = self.blocks != 0
        readable[self.unknown] = False
        readable[len(self.counts) // self.in_block :] = False
        indexes = np.flatnonzero(readable)
        at_once = min(max(_BYTES_PER_STEP // size, 1), _BLOCKS_PER_STEP)
        for first in range(0, len(indexes), at_once):
            some = indexes[first : first + at_once].tolist()
            data = bytearray(len(some) * size)
            with memoryview(data) as view:
                for number, index in enumerate(some):
                    inside = view[number * size : (number + 1) * size]
                    await file.read(inside, int(self.blocks[index]))
            decoded = decode(data, header.refcount_bits).reshape(len(some), -1)
            for index, block in zip(some, decoded, strict=True):
                self.counts[index * self.in_block : (index + 1) * self.in_block] = block
            await asyncio.sleep(0)
        return self

    def contradict(self, places: UInt64s, copied: Bools) -> Bools:
        """Of clusters at these host offsets: whether ``copied`` is not just what their refcounts
        demand: COPIED is set if these are exactly one. False where they are unknown.
        """
        clusters = (places >> self._cluster_bits).view(np.int64)
        counts = self.counts[np.minimum(clusters, len(self.counts) - 1)]
        single = (counts == 1) & (clusters < len(self.counts))
        wrong: Bools = single != copied
        return wrong & self.known(places)

    def known(self, places: UInt64s) -> Bools:
        """Whether the refcounts of clusters at these host offsets can be read."""
        if not len(self.unknown):
            return np.ones(len(places), np.bool_)
        blocks = (places >> self._cluster_bits).view(np.int64) // self.in_block
        return ~np.isin(blocks, self.unknown)

    def bad_entries(self, clusters: int) -> dict[int, str]:
        """Entries of the refcount table that are wrong in an image of ``clusters``: index, why."""
        entry = "{:#018x}: ".format
        found = {}
        reserved = self.table & np.uint64(REFT_RESERVED_MASK) != 0
        outside = self.blocks >> self._cluster_bits >= clusters
        for index in np.flatnonzero(reserved | self.misaligned | outside).tolist():
            if reserved[index]:
                problem = "reserved bits are set"
            elif self.misaligned[index]:
                problem = "the refcount block is not aligned to a cluster"
            else:
                problem = "the refcount block is past the end of the file"
            found[index] = entry(int(self.table[index])) + problem
        return found

    def good_entries(self, clusters: int) -> Int64s:
        """The indexes of the entries that name a block, and rightly so."""
        good = (self.blocks != 0) & (self.table & np.uint64(REFT_RESERVED_MASK) == 0)
        return np.flatnonzero(
            good & ~self.misaligned & (self.blocks >> self._cluster_bits < clusters)
        )
