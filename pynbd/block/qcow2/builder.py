"""Small qcow2 images from Python values, for the demo and the tests: correct ones and odd ones.

The one module of the format's pure half that writes a file; it needs no event loop and no engine.

    Image(size=1 << 20, cluster_bits=16, clusters={0: Data(b"hello"), 65536: Zero()}).write(path)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike

from pynbd.block.qcow2.format import (
    Autoclear,
    BitmapFlags,
    Compatible,
    CompressionType,
    Incompatible,
)


@dataclass(frozen=True, slots=True)
class Data:
    """An allocated cluster; ``data`` is padded with zeroes to the cluster's size."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Zero:
    """A cluster that reads as zeroes. ``preallocated``: it has a host cluster all the same, filled with 0xEE."""

    preallocated: bool = False


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed cluster; ``data`` is padded with zeroes to the cluster's size. ``stream``: bytes to store as they are."""

    data: bytes = b""
    stream: bytes | None = None


@dataclass(frozen=True, slots=True)
class Subclusters:
    """A cluster with an extended L2 entry: which of its 32 subclusters are allocated, and which read as zeroes."""

    data: bytes  # of the whole cluster; only the allocated subclusters are seen
    allocated: int
    zero: int = 0


Cluster = Data | Zero | Compressed | Subclusters


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent dirty bitmap. ``dirty``: (guest offset, length) ranges."""

    name: str
    granularity: int = 65536
    dirty: Sequence[tuple[int, int]] = ()
    flags: BitmapFlags = BitmapFlags.AUTO


@dataclass(frozen=True, slots=True)
class InternalSnapshot:
    """An internal snapshot. Its clusters are those of ``clusters``; equal objects in the active layer are shared."""

    name: str
    clusters: Mapping[int, Cluster]
    id: str = ""  # default: its number, from 1
    size: int | None = None  # default: the image's


@dataclass(slots=True)
class Image:
    """An image to be written; guest contents by guest offset of the cluster."""

    size: int
    clusters: Mapping[int, Cluster] = field(default_factory=dict)
    version: int = 3
    cluster_bits: int = 16
    refcount_bits: int = 16
    extended_l2: bool = False
    compression_type: CompressionType = CompressionType.ZLIB
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None  # its name as recorded; it is written beside the image
    raw_data_file: bool = False
    snapshots: Sequence[InternalSnapshot] = ()
    bitmaps: Sequence[Bitmap] = ()
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    extra_incompatible: Incompatible = Incompatible.NONE
    extra_compatible: Compatible = Compatible.NONE
    extra_autoclear: Autoclear = Autoclear.NONE
    pokes: list[tuple[int, bytes]] = field(default_factory=list)

    def poke(self, offset: int, data: bytes) -> Image:
        """Overwrite host bytes at ``offset`` once all is written: for damaged images."""
        self.pokes.append((offset, data))
        return self

    def write(self, path: str | PathLike[str]) -> None:
        """Write the image file ``path``, and its data file if there is one."""
        raise NotImplementedError


def large_map(path: str | PathLike[str], size: int = 1 << 40, *, cluster_bits: int = 18) -> int:
    """An image whose every other cluster is allocated (sparse: it takes little disk); returns its number of runs."""
    raise NotImplementedError
