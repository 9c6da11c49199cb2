"""The header of a qcow2 file and its extensions (docs/interop/qcow2.rst, "Header" to "Bitmaps extension"; pure).

`parse` refuses what the specification or QEMU's limits forbid, with one line that names the file, the field, its
value and what is allowed. What it lets through can be trusted: tables are aligned, bounded and end
below 2^63. `encode` is the way back; it keeps extensions that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pynbd.block.qcow2.entries import Layout
from pynbd.block.qcow2.format import (
    MAGIC,
    SECTOR,
    SUBCLUSTERS,
    Autoclear,
    Compatible,
    CompressionType,
    Incompatible,
)

PROBE = MAGIC


def is_qcow2(first_bytes: bytes) -> bool:
    """Whether a file that begins with ``first_bytes`` (4 or more) says that it is qcow2."""
    return first_bytes[:4] == PROBE


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the bitmap directory is: its offset and size in bytes, and its number of entries."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class Extension:
    """A header extension as stored: its type and its data without padding."""

    type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A header that obeys the rules. Names as in the specification; offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int  # as stored; see virtual_size
    l1_size: int  # entries
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    header_length: int
    backing_file: str | None = None
    backing_format: str | None = None
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = Incompatible.NONE
    compatible: Compatible = Compatible.NONE
    autoclear: Autoclear = Autoclear.NONE
    refcount_order: int = 4
    compression_type: CompressionType = CompressionType.ZLIB
    data_file: str | None = None
    bitmaps: BitmapsExtension | None = None
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    extensions: tuple[Extension, ...] = ()  # all but the final one, in their order

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def virtual_size(self) -> int:
        """What a guest sees: ``size`` without the part of a last sector, as QEMU shows it."""
        return self.size // SECTOR * SECTOR

    @property
    def extended_l2(self) -> bool:
        return Incompatible.EXTENDED_L2 in self.incompatible

    @property
    def has_data_file(self) -> bool:
        """Guest clusters are in another file, at the host offset that equals their guest offset."""
        return Incompatible.EXTERNAL_DATA_FILE in self.incompatible

    @property
    def raw_data_file(self) -> bool:
        """The data file can be read as a raw image, without this file's tables."""
        return Autoclear.RAW_EXTERNAL_DATA in self.autoclear

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_bits(self) -> int:
        """Of a guest cluster's number: how many low bits index its L2 table."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    @property
    def subclusters(self) -> int:
        return SUBCLUSTERS if self.extended_l2 else 1

    @property
    def subcluster_size(self) -> int:
        return self.cluster_size // self.subclusters

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def layout(self) -> Layout:
        """What it takes to read this image's L2 tables."""
        return Layout(self.cluster_bits, self.extended_l2, self.version, self.has_data_file)


def parse(data: bytes, *, name: str, file_size: int) -> Header:
    """The header at the beginning of the image file ``name``, which is ``file_size`` bytes long.

    ``data``: the first cluster, or more, or as much of it as exists; min(2 MiB, file) is always enough.
    Raises `CorruptImage` or `UnsupportedFeature`.
    """
    raise NotImplementedError


def encode(header: Header) -> bytes:
    """The first cluster of a file with ``header``: header, extensions, backing file name; zeroes to its end.

    ``extensions`` are written in their order; those that ``backing_format``, ``data_file``, ``bitmaps`` and
    ``feature_names`` speak of get their data from these fields, and are added where they are missing.
    """
    raise NotImplementedError
