"""Host clusters of an image that is being built: which is the next one, how many refer to each.

docs/interop/qcow2.rst, "Host cluster management". Nothing is freed; refcounts are written last.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from pynbd.block.qcow2.widths import encode
from pynbd.errors import UsageError


class HostClusters:
    """A new image file, cluster by cluster; the first one, the header's, is taken."""

    def __init__(self, file: BinaryIO, cluster_bits: int, refcount_order: int) -> None:
        self.file = file
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.refcount_order = refcount_order
        self.most_references = (1 << (1 << refcount_order)) - 1
        self.references = [1]

    @property
    def end(self) -> int:
        return len(self.references) << self.cluster_bits

    def allocate(self, length: int, references: int = 1) -> int:
        """Host offset of new contiguous clusters for ``length`` bytes; they read as zeroes."""
        offset = self.end
        self.references += [references] * -(-length >> self.cluster_bits)
        return offset

    def put(self, offset: int, data: bytes) -> None:
        self.file.seek(offset)
        self.file.write(data)

    def append(self, data: bytes) -> int:
        """Host offset of ``data`` in clusters of its own."""
        offset = self.allocate(len(data))
        self.put(offset, data)
        return offset

    def refer(self, offset: int, length: int = 1) -> None:
        """Count one more reference to each cluster that ``length`` bytes at ``offset`` touch."""
        for cluster in self.touched(offset, length):
            self.references[cluster] += 1

    def touched(self, offset: int, length: int) -> range:
        """Numbers of the clusters that ``length`` host bytes at ``offset`` touch."""
        return range(offset >> self.cluster_bits, (offset + length - 1 >> self.cluster_bits) + 1)

    def finish(self) -> tuple[int, int]:
        """Write the refcounts of all clusters, their own included, and give the file its length.

        Returns the offset of the refcount table, and its length in clusters. Raises `UsageError`
        if a refcount is too large.
        """
        most = max(self.references)
        if most > self.most_references:
            raise UsageError(
                f"a refcount of {most} needs more than {1 << self.refcount_order} bits"
            )
        per_block = self.cluster_size * 8 >> self.refcount_order
        blocks = table_clusters = 0
        # Refcount blocks count themselves and the table: grow both until they suffice.
        while (total := len(self.references) + blocks + table_clusters) > blocks * per_block:
            blocks = -(-total // per_block)
            table_clusters = -(-blocks * 8 >> self.cluster_bits)
        table = self.allocate(table_clusters << self.cluster_bits)
        first_block = self.allocate(blocks << self.cluster_bits)
        counts = np.zeros(blocks * per_block, np.uint64)
        counts[: len(self.references)] = self.references
        self.put(first_block, encode(counts, 1 << self.refcount_order))
        entries = np.arange(blocks, dtype=">u8") * self.cluster_size + first_block
        self.put(table, entries.astype(">u8").tobytes())
        self.file.truncate(self.end)
        return table, table_clusters
