"""Whether an image was preallocated with metadata only: a guess from its refcounts, as QEMU makes
it (docs/interop/qcow2.rst, "Host cluster management").
"""

from __future__ import annotations

import asyncio

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.cache import read_table
from pynbd.block.qcow2.format import MAX_OFFSET, REFT_OFFSET_MASK
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.widths import decode
from pynbd.errors import CorruptImage

# Refcount blocks that are counted at most, about a second's worth; with the usual clusters and
# refcounts they speak of 8 TiB.
MAX_BLOCKS = 1 << 14
MAX_BLOCK_BYTES = 256 << 20
# Table entries that are read between two turns of the loop.
_ENTRIES_PER_STEP = 1 << 16


class Usage:
    """How much of the image in ``file`` is in use, by its refcount blocks on disk."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header

    async def count_in_use(self, clusters: int, threshold: int) -> int:
        """How many of the first ``clusters`` host clusters are in use. Counting ends soon after
        ``threshold``, and with the last block that the bounds above allow.

        Raises `CorruptImage` if a refcount block is misplaced.
        """
        header = self._header
        in_block = header.cluster_size * 8 // header.refcount_bits
        blocks = -(-clusters // in_block)
        entries = min(blocks, header.refcount_table_clusters * header.cluster_size // 8)
        left = min(MAX_BLOCKS, MAX_BLOCK_BYTES // header.cluster_size)
        found = 0
        for first in range(0, entries, _ENTRIES_PER_STEP):
            count = min(_ENTRIES_PER_STEP, entries - first)
            table = await read_table(self._file, header.refcount_table_offset + first * 8, count)
            named = np.flatnonzero(table & np.uint64(REFT_OFFSET_MASK))[:left]
            for index in named.tolist():
                rest = clusters - (first + index) * in_block
                found += await self._count_block(first + index, int(table[index]), rest)
                if found >= threshold:
                    return found
            left -= len(named)
            await asyncio.sleep(0)
        return found

    async def _count_block(self, index: int, entry: int, clusters: int) -> int:
        """How many of the first ``clusters`` of refcount block ``index`` are in use."""
        header = self._header
        host_offset = entry & REFT_OFFSET_MASK
        if host_offset % header.cluster_size or host_offset > MAX_OFFSET - header.cluster_size:
            raise CorruptImage(
                f"{self._file.path}: refcount block {index} is at {host_offset:#x}, "
                "not a cluster of the file"
            )
        block = bytearray(header.cluster_size)
        await self._file.read(memoryview(block), host_offset)
        return await self._file.engine.run(_count, block, header.refcount_bits, clusters)

    async def metadata_preallocated(self) -> bool:
        """Whether the image seems to be preallocated with holes: more clusters in use than the host
        has allocated.

        It is the guess that QEMU makes (``qcow2_detect_metadata_preallocation``), with its
        tolerance of a ninth, or two clusters, for other holes. Then holes in the file are worth
        looking for.
        """
        size = self._header.cluster_size
        allocated = self._file.allocated_size() // size
        threshold = max(allocated * 10 // 9, allocated + 2)
        try:
            return await self.count_in_use(-(-self._file.size() // size), threshold) >= threshold
        except CorruptImage:
            return False


def _count(block: bytearray, refcount_bits: int, clusters: int) -> int:
    return int(np.count_nonzero(decode(block, refcount_bits)[:clusters]))
