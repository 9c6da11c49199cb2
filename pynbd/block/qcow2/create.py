"""A new qcow2 image (docs/interop/qcow2.rst; what goes with what is as in ``qemu-img create``).

1. The first sector is written last, and what it names is on stable storage before: whatever a
   crash leaves of an image that is being made is no qcow2 image.
2. What can be known to be wrong is refused before anything is touched.
3. Every part is one contiguous range: header, refcount table, refcount blocks, L1 table, and of a
   preallocated image L2 tables and guest clusters. Tables are made as arrays, a piece at a time.
4. Preallocated guest clusters read as zeroes; with extended L2 entries they have their places, but
   no subcluster is allocated yet, so that what is below is seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pynbd.block.cache_modes import Cache, CacheMode
from pynbd.block.engine import Engine, HostFile
from pynbd.block.new_file import Preallocation, empty, new_file, preallocate
from pynbd.block.qcow2.format import (
    COPIED,
    FEATURE_NAMES,
    L1E_SIZE,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_OFFSET,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_CLUSTER_BITS_EXTENDED,
    REFCOUNT_ORDER_V2,
    SECTOR,
    SUBCLUSTERS,
    Autoclear,
    Compatible,
    CompressionType,
    Incompatible,
)
from pynbd.block.qcow2.header import Header, encode
from pynbd.block.qcow2.widths import encode as encode_entries
from pynbd.block.window import round_up
from pynbd.errors import UsageError

# Entries of a table that are made and written at once: 2 MiB of 64 bits.
_ENTRIES_PER_STEP = 1 << 18
# Smaller first clusters are kept for names; QEMU leaves the feature name table out of them, too.
_MIN_CLUSTER_OF_FEATURE_NAMES = 8 << 10
# Host offsets of clusters have bits 9 to 55.
_MAX_HOST_END = 1 << 56
# compression_type and the padding behind it, as QEMU always writes them.
_PADDING = bytes(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage:
    """What `create` makes. The names are those of ``qemu-img create -o``, with the defaults of
    QEMU; ``size`` is rounded up to whole sectors of 512 bytes.

    ``backing_file`` and ``data_file`` are recorded as they are. ``compat``: "0.10" or "1.1",
    version 2 or 3 of the format.
    """

    size: int
    compat: str = "1.1"
    cluster_size: int = 65536
    extended_l2: bool = False
    compression_type: CompressionType = CompressionType.ZLIB
    refcount_bits: int = 1 << REFCOUNT_ORDER_V2
    lazy_refcounts: bool = False
    preallocation: Preallocation = Preallocation.OFF
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False

    @property
    def granule(self) -> int:
        """Bytes of the smallest piece that is allocated: a cluster, or a subcluster."""
        return self.cluster_size // (SUBCLUSTERS if self.extended_l2 else 1)

    def check(self) -> None:
        """Raise `UsageError`, which names the option, for what the format or QEMU forbid."""
        for allowed, otherwise in self._rules():
            if not allowed:
                raise UsageError(otherwise)

    def _rules(self) -> Iterator[tuple[bool, str]]:
        yield 0 <= self.size <= MAX_OFFSET - SECTOR, f"size: {self.size} is not 0 to 2^63 - 513"
        low, high = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS
        yield (
            low <= self.cluster_size <= high and self.cluster_size.bit_count() == 1,
            f"cluster_size: {self.cluster_size} is not a power of two, 512 to 2M",
        )
        yield (
            1 <= self.refcount_bits <= 1 << MAX_REFCOUNT_ORDER
            and self.refcount_bits.bit_count() == 1,
            f"refcount_bits: {self.refcount_bits} is not a power of two, 1 to 64",
        )
        yield (
            not self.extended_l2 or self.cluster_size >= 1 << MIN_CLUSTER_BITS_EXTENDED,
            f"extended_l2: it needs a cluster_size of 16k or more, not {self.cluster_size}",
        )
        yield self.compat in ("0.10", "1.1"), f"compat: {self.compat!r} is not 0.10 or 1.1"
        if self.compat == "0.10":
            for option, wanted in (
                ("extended_l2", self.extended_l2),
                ("compression_type", bool(self.compression_type)),
                ("refcount_bits", self.refcount_bits != 1 << REFCOUNT_ORDER_V2),
                ("lazy_refcounts", self.lazy_refcounts),
                ("data_file", self.data_file is not None),
            ):
                yield not wanted, f"{option}: with compat=0.10 only the default is allowed"
        yield self.data_file != "", "data_file: the name of a file is expected"
        yield not self.data_file_raw or self.data_file is not None, "data_file_raw: needs data_file"
        if self.backing_file is not None:
            length = len(os.fsencode(self.backing_file))
            yield (
                0 < length <= MAX_BACKING_NAME,
                f"backing_file: its name has {length} bytes; 1 to {MAX_BACKING_NAME} are allowed",
            )
            yield (
                self.backing_fmt is not None,
                "backing_fmt: needed, raw or qcow2",
            )
            yield not self.data_file_raw, "data_file_raw: not allowed with backing_file"
            yield (
                self.preallocation is Preallocation.OFF or self.extended_l2,
                "preallocation: with backing_file only off is allowed, or extended_l2",
            )
        yield (
            self.backing_file is not None or self.backing_fmt is None,
            "backing_fmt: needs backing_file",
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """How many clusters each part of an image file has, in the order of the file; and its guest
    clusters, wherever they are.
    """

    refcount_table: int
    refcount_blocks: int
    l1: int
    l2: int
    guest: int  # none where guest clusters are in a data file

    @property
    def metadata(self) -> int:
        """Clusters of all parts but the guest's, and of the header."""
        return 1 + self.refcount_table + self.refcount_blocks + self.l1 + self.l2

    @property
    def total(self) -> int:
        return self.metadata + self.guest


async def create(
    path: str, new: NewImage, *, engine: Engine, cache: CacheMode = Cache.WRITEBACK.mode
) -> None:
    """Make the image file ``path``, or the image on that block device, over whatever is there; and
    its data file, whose name is taken from the current directory, as QEMU takes it.

    Raises `UsageError` for what is not allowed, else `ImageError` or ``OSError``; a file that was
    made goes away again then.
    """
    new.check()
    header, parts = _planned(new)
    head = encode(header).rstrip(b"\0")  # names may be too long for it
    if new.data_file is None:
        with new_file(engine, path, cache) as file:
            await _write(file, header, parts, head, new.preallocation)
        return
    with new_file(engine, path, cache) as file, new_file(engine, new.data_file, cache) as data_file:
        await empty(data_file, header.size)
        await preallocate(data_file, header.size, new.preallocation)
        await data_file.flush()
        await _write(file, header, parts, head, Preallocation.METADATA)


async def _write(
    file: HostFile, header: Header, parts: _Parts, head: bytes, how: Preallocation
) -> None:
    """Rule 1."""
    size = parts.total * header.cluster_size
    await empty(file, size)
    await file.flush()
    await preallocate(file, size, how)
    await _write_tables(file, header, parts)
    await file.write(head[SECTOR:], SECTOR)
    await file.flush()
    await file.write(head[:SECTOR], 0)
    await file.flush()


def _planned(new: NewImage) -> tuple[Header, _Parts]:
    """The header, and what is behind it. Raises `UsageError` for a size that is too large."""
    header = _without_places(new)
    cluster_size, layout = header.cluster_size, header.layout
    guest = -(-header.size >> header.cluster_bits)
    l2 = -(-guest >> layout.l2_bits)
    largest = MAX_L1_BYTES // L1E_SIZE << layout.l2_bits + layout.cluster_bits
    if header.size > largest:
        raise UsageError(
            f"size: {header.size} bytes; with cluster_size={cluster_size} at most {largest}"
        )
    l1 = -(-l2 * L1E_SIZE >> header.cluster_bits)
    if not _has_tables(new):
        parts = _with_refcounts(_Parts(0, 0, l1, 0, 0), header)
    else:
        parts = _with_refcounts(_Parts(0, 0, l1, l2, 0 if header.has_data_file else guest), header)
        most = MAX_REFCOUNT_TABLE_BYTES >> header.cluster_bits
        if parts.refcount_table > most or parts.total << header.cluster_bits > _MAX_HOST_END:
            raise UsageError(
                f"preallocation: {header.size} bytes are too many for it; a larger cluster_size"
                " or fewer refcount_bits may do"
            )
    l1_table = 1 + parts.refcount_table + parts.refcount_blocks
    return replace(
        header,
        l1_size=l2,
        l1_table_offset=l1_table * cluster_size if l2 else 0,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=parts.refcount_table,
    ), parts


def _has_tables(new: NewImage) -> bool:
    """Whether all guest clusters have their places from the beginning.

    A data file that can be read without the tables may be written without them, too.
    """
    return new.preallocation is not Preallocation.OFF or new.data_file_raw


def _with_refcounts(parts: _Parts, header: Header) -> _Parts:
    """``parts`` with a refcount table and blocks that count themselves."""
    in_block = header.cluster_size * 8 // header.refcount_bits
    while parts.total > parts.refcount_blocks * in_block:
        blocks = -(-parts.total // in_block)
        table = -(-blocks * 8 >> header.cluster_bits)
        parts = replace(parts, refcount_table=table, refcount_blocks=blocks)
    return parts


def _without_places(new: NewImage) -> Header:
    """The header; the tables are not placed yet."""
    incompatible, compatible, autoclear = Incompatible.NONE, Compatible.NONE, Autoclear.NONE
    if new.extended_l2:
        incompatible |= Incompatible.EXTENDED_L2
    if new.compression_type:
        incompatible |= Incompatible.COMPRESSION_TYPE
    if new.data_file is not None:
        incompatible |= Incompatible.EXTERNAL_DATA_FILE
    if new.data_file_raw:
        autoclear |= Autoclear.RAW_EXTERNAL_DATA
    if new.lazy_refcounts:
        compatible |= Compatible.LAZY_REFCOUNTS
    version = 2 if new.compat == "0.10" else 3
    has_names = version >= 3 and new.cluster_size >= _MIN_CLUSTER_OF_FEATURE_NAMES
    return Header(
        version=version,
        cluster_bits=new.cluster_size.bit_length() - 1,
        size=round_up(new.size),
        l1_size=0,
        l1_table_offset=0,
        refcount_table_offset=0,
        refcount_table_clusters=0,
        header_length=0,
        backing_file=new.backing_file,
        backing_format=new.backing_fmt,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=new.refcount_bits.bit_length() - 1,
        compression_type=new.compression_type,
        data_file=new.data_file,
        feature_names=FEATURE_NAMES if has_names else {},
        additional_fields=_PADDING,
    )


async def _write_tables(file: HostFile, header: Header, parts: _Parts) -> None:
    """Rule 3. What is not written is zero."""
    size = header.cluster_size
    blocks = (1 + parts.refcount_table) * size
    await _write_series(file, size, parts.refcount_blocks, blocks, size)
    await _write_refcounts(file, blocks, parts.total, header.refcount_bits)
    l2 = header.l1_table_offset + parts.l1 * size
    await _write_series(file, header.l1_table_offset, parts.l2, l2 | COPIED, size)
    if parts.l2:
        first = 0 if header.has_data_file else parts.metadata * size
        guest = -(-header.size >> header.cluster_bits)
        words = header.layout.entry_words
        await _write_series(file, l2, guest, first | COPIED, size, entry_words=words)


async def _write_series(
    file: HostFile, offset: int, count: int, first: int, step: int, *, entry_words: int = 1
) -> None:
    """Write ``count`` table entries from ``offset`` on: ``first``, ``first + step`` and so on.

    Of an entry of several words the others are zero.
    """
    for at in range(0, count, _ENTRIES_PER_STEP):
        entries = np.zeros((min(_ENTRIES_PER_STEP, count - at), entry_words), np.uint64)
        entries[:, 0] = np.arange(at, at + len(entries), dtype=np.uint64) * np.uint64(step)
        entries[:, 0] += np.uint64(first)
        await file.write(encode_entries(entries, 64), offset + at * entry_words * 8)


async def _write_refcounts(file: HostFile, offset: int, clusters: int, bits: int) -> None:
    """Write a refcount of 1 for each of so many clusters."""
    for at in range(0, clusters, _ENTRIES_PER_STEP):
        count = min(_ENTRIES_PER_STEP, clusters - at)
        ones = np.zeros(round_up(count, 8), np.uint64)  # whole bytes
        ones[:count] = 1
        await file.write(encode_entries(ones, bits), offset + at * bits // 8)
