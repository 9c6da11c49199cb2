"""Small qcow2 images from Python values, for the demo and the tests: good ones and odd ones.

    image = Image(size=1 << 20, clusters={0: Data(b"hello"), 65536: Zero()})
    image.write("disk.qcow2")

What it writes is right in every detail, refcounts and COPIED flags included; `poke` damages it.
This is the one module among the pure ones that writes a file: a new one, which nobody else has
open, without engine and event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pynbd.block.qcow2.builder_bitmaps import Bitmap, write_bitmaps
from pynbd.block.qcow2.builder_host import HostClusters
from pynbd.block.qcow2.compression import compress
from pynbd.block.qcow2.entries import Layout, compressed_entry, compressed_range
from pynbd.block.qcow2.extensions import Extension
from pynbd.block.qcow2.format import (
    COMPRESSED,
    COPIED,
    L2E_OFFSET_MASK,
    SNAPSHOT_ENTRY,
    SNAPSHOT_EXTRA,
    SUBCLUSTERS,
    ZERO,
    Autoclear,
    Compatible,
    CompressionType,
    Incompatible,
)
from pynbd.block.qcow2.header import Header, encode
from pynbd.errors import UsageError

__all__ = [
    "Bitmap",
    "Cluster",
    "Compressed",
    "Data",
    "Image",
    "InternalSnapshot",
    "Subclusters",
    "Written",
    "Zero",
    "large_map",
    "poke",
]

_ALL = (1 << SUBCLUSTERS) - 1
_PREALLOCATED = b"\xee"  # what a preallocated ZERO cluster holds, so that reading it is noticed


@dataclass(frozen=True, slots=True)
class Data:
    """An allocated cluster; ``data`` is padded with zeroes to the cluster's size."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Zero:
    """A cluster that reads as zeroes; ``preallocated``: it has a host cluster all the same."""

    preallocated: bool = False


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed cluster of ``data``, padded with zeroes to the cluster's size.

    ``stream``: bytes to be stored instead, as they are. Data that compression does not make shorter
    becomes a plain cluster, as QEMU has it.
    """

    data: bytes = b""
    stream: bytes | None = None


@dataclass(frozen=True, slots=True)
class Subclusters:
    """A cluster of an image with extended L2 entries.

    Bit n of ``allocated`` and of ``zero`` is for subcluster n; nothing keeps the two from meeting.
    ``data`` is what the host cluster holds (there is none if it is empty), padded with zeroes.
    """

    data: bytes
    allocated: int
    zero: int = 0


Cluster = Data | Zero | Compressed | Subclusters


@dataclass(frozen=True, slots=True)
class InternalSnapshot:
    """An internal snapshot; it shares the cluster objects that other layers have at its offsets."""

    name: str
    clusters: Mapping[int, Cluster]
    id: str = ""  # its number in the table, from 1
    size: int | None = None  # the image's


@dataclass(frozen=True, slots=True)
class Written:
    """Where things are in an image that was written. Offsets are host offsets."""

    header: Header
    l2_tables: Mapping[int, int]  # of the active layer, by L1 index

    def entry_offset(self, guest_offset: int) -> int:
        """Where the L2 entry of the cluster at ``guest_offset`` is; it has to have an L2 table."""
        l1_index, l2_index = divmod(
            guest_offset >> self.header.cluster_bits, self.header.layout.l2_entries
        )
        return self.l2_tables[l1_index] + l2_index * self.header.l2_entry_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image to be written. Sizes in bytes; clusters by guest offset, others are unallocated.

    A ``data_file`` (its name as recorded) is written beside the image. The feature bits are those
    to be set besides the ones that the other fields ask for.
    """

    size: int
    clusters: Mapping[int, Cluster] = field(default_factory=dict)
    version: int = 3
    cluster_bits: int = 16
    refcount_bits: int = 16
    extended_l2: bool = False
    compression_type: CompressionType = CompressionType.ZLIB
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    raw_data_file: bool = False
    snapshots: Sequence[InternalSnapshot] = ()
    bitmaps: Sequence[Bitmap] = ()
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=dict)
    extensions: Sequence[Extension] = ()
    incompatible: Incompatible = Incompatible.NONE
    compatible: Compatible = Compatible.NONE
    autoclear: Autoclear = Autoclear.NONE

    def write(self, path: str | PathLike[str]) -> Written:
        """Write the image file ``path``, and its data file if it has one, over what may be there.

        Raises `UsageError` for what the format has no place for.
        """
        header = self._header()
        path = Path(path)
        with ExitStack() as files:
            host = HostClusters(
                files.enter_context(path.open("wb")), self.cluster_bits, header.refcount_order
            )
            data_file = None
            if self.data_file is not None:
                data_file = files.enter_context((path.parent / self.data_file).open("wb"))
            guest = _GuestClusters(header, host, data_file, layers=len(self.snapshots) + 1)
            # All references first, as the COPIED flags in the tables depend on them.
            for snapshot in self.snapshots:
                guest.store(snapshot.clusters)
            guest.store(self.clusters)
            snapshots_offset = _write_snapshots(self.snapshots, header, guest, host)
            l1_size, l1_table_offset, l2_tables = guest.write_tables(self.clusters, self.size)
            bitmaps = write_bitmaps(self.bitmaps, self.size, host) if self.bitmaps else None
            refcount_table_offset, refcount_table_clusters = host.finish()
            header = replace(
                header,
                l1_size=l1_size,
                l1_table_offset=l1_table_offset,
                refcount_table_offset=refcount_table_offset,
                refcount_table_clusters=refcount_table_clusters,
                nb_snapshots=len(self.snapshots),
                snapshots_offset=snapshots_offset,
                bitmaps=bitmaps,
            )
            host.put(0, encode(header))
            if data_file is not None:
                data_file.truncate(self.size)
        return Written(header, l2_tables)

    def _header(self) -> Header:
        """The header as far as it follows from the fields; the tables are not placed yet."""
        incompatible, autoclear = self.incompatible, self.autoclear
        if self.extended_l2:
            incompatible |= Incompatible.EXTENDED_L2
        if self.data_file is not None:
            incompatible |= Incompatible.EXTERNAL_DATA_FILE
        if self.compression_type:
            incompatible |= Incompatible.COMPRESSION_TYPE
        if self.raw_data_file:
            autoclear |= Autoclear.RAW_EXTERNAL_DATA
        if self.bitmaps:
            autoclear |= Autoclear.BITMAPS
        if self.version < 3 and (incompatible or self.compatible or autoclear):
            raise UsageError("an image of version 2 has no feature bits")
        return Header(
            version=self.version,
            cluster_bits=self.cluster_bits,
            size=self.size,
            l1_size=0,
            l1_table_offset=0,
            refcount_table_offset=0,
            refcount_table_clusters=0,
            header_length=0,
            backing_file=self.backing_file,
            backing_format=self.backing_format,
            incompatible=incompatible,
            compatible=self.compatible,
            autoclear=autoclear,
            refcount_order=self.refcount_bits.bit_length() - 1,
            compression_type=self.compression_type,
            data_file=self.data_file,
            feature_names=self.feature_names,
            extensions=tuple(self.extensions),
        )


class _GuestClusters:
    """Guest clusters in their host clusters, each object stored once, whichever layers have it."""

    def __init__(
        self, header: Header, host: HostClusters, data_file: BinaryIO | None, layers: int
    ) -> None:
        self.header = header
        self.layout: Layout = header.layout
        self.host = host
        self.data_file = data_file
        # By guest offset and identity: L2 entry, with COPIED if it names a host cluster, and
        # subcluster bitmap.
        self.entries: dict[tuple[int, int], tuple[int, int]] = {}
        # Compressed clusters in one host cluster: the refcount fits even if all layers share them.
        self.most_streams = host.most_references // layers
        self.streams_end = 0  # where the last compressed cluster's data end

    def store(self, clusters: Mapping[int, Cluster]) -> None:
        # Compressed ones first: they are packed one behind the other.
        in_order = sorted(clusters.items(), key=lambda at: (type(at[1]) is not Compressed, at[0]))
        for guest_offset, cluster in in_order:
            if guest_offset % self.header.cluster_size:
                raise UsageError(f"guest offset {guest_offset:#x} is not that of a cluster")
            key = guest_offset, id(cluster)
            if key in self.entries:
                self._share(self.entries[key][0])
            else:
                self.entries[key] = self._store(guest_offset, cluster)

    def _share(self, entry: int) -> None:
        if entry & COMPRESSED:
            self.host.refer(*compressed_range(entry, self.header.cluster_bits))
        elif entry & COPIED:
            self.host.refer(entry & L2E_OFFSET_MASK)

    def _store(self, guest_offset: int, cluster: Cluster) -> tuple[int, int]:
        size, extended = self.header.cluster_size, self.header.extended_l2
        match cluster:
            case Compressed(data, stream):
                stream = stream or compress(self.header.compression_type, data.ljust(size, b"\0"))
                if stream is not None:
                    return self._store_stream(stream), 0
                return self._store_data(guest_offset, data), _ALL
            case Data(data):
                return self._store_data(guest_offset, data), _ALL
            case Subclusters(data, allocated, zero):
                entry = self._store_data(guest_offset, data) if data else 0
                return entry, zero << SUBCLUSTERS | allocated
            case Zero(preallocated):
                filler = b"" if self.header.raw_data_file else _PREALLOCATED * size
                entry = self._store_data(guest_offset, filler) if preallocated else 0
                return entry | (0 if extended else ZERO), _ALL << SUBCLUSTERS

    def _store_data(self, guest_offset: int, data: bytes) -> int:
        """L2 entry of a new cluster with ``data``."""
        data = data.ljust(self.header.cluster_size, b"\0")
        if self.data_file is None:
            return self.host.append(data) | COPIED
        self.data_file.seek(guest_offset)
        self.data_file.write(data)
        return guest_offset | COPIED

    def _store_stream(self, stream: bytes) -> int:
        host, bits = self.host, self.header.cluster_bits
        in_last_cluster = 0 < host.end - self.streams_end < host.cluster_size
        if not in_last_cluster or host.references[-1] >= self.most_streams:
            self.streams_end = host.end
        offset = self.streams_end
        entry = compressed_entry(offset, len(stream), bits)
        clusters = host.touched(*compressed_range(entry, bits))
        missing = clusters.stop - len(host.references)
        host.allocate(missing << bits, references=0)
        for cluster in clusters:
            host.references[cluster] += 1
        host.put(offset, stream)
        self.streams_end = offset + len(stream)
        return entry

    def write_tables(
        self, clusters: Mapping[int, Cluster], size: int
    ) -> tuple[int, int, dict[int, int]]:
        """Write the tables of a layer: (size of its L1 in entries, offset, L2 tables by index)."""
        layout = self.layout
        tables: dict[int, np.ndarray[tuple[int], np.dtype[np.uint64]]] = {}
        for guest_offset, cluster in clusters.items():
            l1_index, l2_index = divmod(guest_offset >> layout.cluster_bits, layout.l2_entries)
            if l1_index not in tables:
                tables[l1_index] = np.zeros(layout.cluster_size // 8, ">u8")
            entry, bitmap = self.entries[guest_offset, id(cluster)]
            at = l2_index * layout.entry_words
            tables[l1_index][at] = self._with_copied(entry)
            if layout.extended:
                tables[l1_index][at + 1] = bitmap
        offsets = {index: self.host.append(table.tobytes()) for index, table in tables.items()}
        l1_size = -(-size >> layout.cluster_bits + layout.l2_bits)
        l1 = np.zeros(max(l1_size, 1), ">u8")
        for index, offset in offsets.items():
            l1[index] = offset | COPIED
        return l1_size, self.host.append(l1.tobytes()), offsets

    def _with_copied(self, entry: int) -> int:
        """``entry`` without COPIED if its host cluster is shared."""
        number = (entry & L2E_OFFSET_MASK) >> self.header.cluster_bits
        shared = entry & COPIED and self.data_file is None and self.host.references[number] > 1
        return entry & ~COPIED if shared else entry


def _write_snapshots(
    snapshots: Sequence[InternalSnapshot],
    header: Header,
    guest: _GuestClusters,
    host: HostClusters,
) -> int:
    """Write the tables of ``snapshots``, and the snapshot table: returns its offset, or 0."""
    table = b""
    for number, snapshot in enumerate(snapshots, 1):
        size = header.size if snapshot.size is None else snapshot.size
        l1_size, l1_table_offset, _ = guest.write_tables(snapshot.clusters, size)
        extra = SNAPSHOT_EXTRA.build(
            {"vm_state_size": 0, "disk_size": size, "icount": 0xFFFFFFFFFFFFFFFF}
        )
        identity, name = (snapshot.id or str(number)).encode(), snapshot.name.encode()
        fields = SNAPSHOT_ENTRY.build(
            {
                "l1_table_offset": l1_table_offset,
                "l1_size": l1_size,
                "id_size": len(identity),
                "name_size": len(name),
                "date_sec": 0,
                "date_nsec": 0,
                "vm_clock_nsec": 0,
                "vm_state_size": 0,
                "extra_data_size": len(extra),
            }
        )
        entry = fields + extra + identity + name
        table += entry + bytes(-len(entry) % 8)
    return host.append(table) if table else 0


def poke(path: str | PathLike[str], offset: int, data: bytes) -> None:
    """Overwrite bytes of the file ``path`` from ``offset`` on: how an image is damaged."""
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def large_map(path: str | PathLike[str], size: int = 1 << 40, *, cluster_bits: int = 19) -> Written:
    """An image whose every second cluster is allocated, the first one included.

    By default 1 TiB with 2 Mi clusters: 2^21 extents. Only its tables take disk space.
    """
    image = Image(size=size, cluster_bits=cluster_bits)
    header = image._header()
    entries = header.layout.l2_entries
    clusters = -(-size >> cluster_bits)
    l1_size = -(-clusters // entries)
    with Path(path).open("wb") as file:
        host = HostClusters(file, cluster_bits, header.refcount_order)
        l1_table_offset = host.allocate(l1_size * 8)
        first_table = host.allocate(l1_size << cluster_bits)
        numbers = np.arange((clusters + 1) // 2, dtype=np.uint64) << np.uint64(cluster_bits)
        host.put(
            l1_table_offset, (numbers[:l1_size] + (first_table | COPIED)).astype(">u8").tobytes()
        )
        data = host.allocate(len(numbers) << cluster_bits)
        l2 = np.zeros(l1_size * entries, ">u8")
        l2[:clusters:2] = numbers + (data | COPIED)
        host.put(first_table, l2.tobytes())
        table, table_clusters = host.finish()
        header = replace(
            header,
            l1_size=l1_size,
            l1_table_offset=l1_table_offset,
            refcount_table_offset=table,
            refcount_table_clusters=table_clusters,
        )
        host.put(0, encode(header))
    return Written(header, {i: first_table + (i << cluster_bits) for i in range(l1_size)})
