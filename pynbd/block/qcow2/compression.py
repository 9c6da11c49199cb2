"""Compressed clusters (docs/interop/qcow2.rst, "Compressed Clusters Descriptor", compression_type; pure).

A stream is as long as its last sector, so what follows its end is no error; it must yield exactly
one cluster, and never more than one is kept in memory. The work is done outside the GIL.
"""

from __future__ import annotations

from pynbd.block.qcow2.format import CompressionType


def decompress(compression_type: CompressionType, data: bytes, cluster_size: int) -> bytes:
    """The cluster in ``data``, ``cluster_size`` bytes. Raises `CorruptImage`; its text does not name the file."""
    raise NotImplementedError


def compress(compression_type: CompressionType, data: bytes) -> bytes | None:
    """``data`` (one cluster) compressed, or None if that does not make it shorter."""
    raise NotImplementedError
