"""Qcow2Node: an open qcow2 image, one layer of a chain (docs/interop/qcow2.rst).

It owns the image's file, its data file where there is one, the parts that read its structures and,
if it is open for writing, the `Writer`, which owns those that change them.
Damaged metadata that a request does not touch does not trouble it; a cluster that cannot be
decompressed is EIO for those who ask for it, and a line in the log.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.engine import Buffer, HostFile
from pynbd.block.extent import DATA, Runs
from pynbd.block.limits import ChainMemory
from pynbd.block.node import BlockNode
from pynbd.block.pins import Pins
from pynbd.block.qcow2 import bitmaps, check, repair, snapshots, writer, zeroing
from pynbd.block.qcow2 import header as headers
from pynbd.block.qcow2.bitmaps import PersistentBitmaps
from pynbd.block.qcow2.cache import SharedReads, read_table
from pynbd.block.qcow2.compressed import CompressedClusters
from pynbd.block.qcow2.damage import DamageLog
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.format import (
    L1E_OFFSET_MASK,
    L1E_SIZE,
    SECTOR,
    Incompatible,
)
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.holes import with_holes
from pynbd.block.qcow2.mapping import Mapping
from pynbd.block.qcow2.preallocation import Usage
from pynbd.block.qcow2.snapshots import Snapshot
from pynbd.errors import CorruptImage, ImageError

log = logging.getLogger("pynbd")

# A read resolves this many clusters (or subclusters) around it at once, within these limits.
_WINDOW_GRANULES = 1024
_MIN_WINDOW = 1 << 20
_MAX_WINDOW = 1 << 26

_MOST_FIRST_CLUSTERS = 1 << 16


class Qcow2Node(BlockNode):
    """A qcow2 image. `pynbd.block.chain` opens it and what is below it.

    ``metadata_file`` is the image itself; ``file``, where guest clusters are, may be its external
    data file.
    """

    format = "qcow2"
    file: HostFile

    def __init__(
        self,
        metadata_file: HostFile,
        data_file: HostFile | None,
        header: Header,
        mapping: Mapping,
        damage: DamageLog,
        memory: ChainMemory,
        *,
        size: int,
        persistent: PersistentBitmaps,
    ) -> None:
        self.name = metadata_file.path
        self.read_only = True
        self._writer: writer.Writer | None = None
        self.metadata_file = metadata_file
        self.file = data_file or metadata_file
        self.header = header
        self.mapping = mapping
        self.size = size
        granules = header.subcluster_size * _WINDOW_GRANULES
        self.window = min(max(granules, _MIN_WINDOW), _MAX_WINDOW)
        self._damage = damage
        self._persistent = persistent
        usage = Usage(metadata_file, header)
        self._preallocated = SharedReads(lambda _: usage.metadata_preallocated(), 1)
        self.clusters = CompressedClusters(
            metadata_file,
            header.compression_type,
            header.cluster_bits,
            memory.clusters,
            memory.backlog,
        )

    @classmethod
    async def open(
        cls,
        file: HostFile,
        header: Header,
        memory: ChainMemory,
        *,
        data_file: HostFile | None = None,
        snapshot: str | None = None,
        writable: bool = False,
        untrusted: bool = False,
    ) -> Qcow2Node:
        """Open the image in ``file`` that begins with ``header``, with the data file it names.

        ``snapshot``: an internal snapshot to be served in place of the active layer, named as
        `snapshots.find` takes it. ``writable``: for writing, in files that are open for that; an
        image that is marked dirty is repaired first, and an ``untrusted`` one is checked.
        ``memory`` is that of its chain. Raises `ImageError`, and leaves the files to the caller
        then.
        """
        if writable:
            header = await _ready_to_be_written(file, header, snapshot)
            if untrusted:
                await _refuse_corruption(file, header)
        elif Incompatible.CORRUPT in header.incompatible:
            log.warning("%s: the image is marked corrupt; it is only read", file.path)
        table, entries, size = header.l1_table_offset, header.l1_size, header.virtual_size
        persistent = PersistentBitmaps()
        known = await snapshots.load(file, header, memory)
        if snapshot is None:
            persistent = await bitmaps.load(file, header, memory)
        else:
            chosen = _find_snapshot(known, snapshot, file.path)
            chosen.check(header, name=file.path)
            table, entries = chosen.l1_table_offset, chosen.l1_size
            size = chosen.disk_size // SECTOR * SECTOR
        # Where the tables are that it names is kept once more of an image that is written.
        memory.take(entries * L1E_SIZE * (1 + writable), "L1 table", file.path)
        l1 = await read_table(file, table, entries)
        _tell_missing_tables(file, header, table, l1)
        damage = DamageLog(file.path)
        mapping = Mapping(file, l1, header.layout, damage, memory.tables)
        node = cls(
            file, data_file, header, mapping, damage, memory, size=size, persistent=persistent
        )
        if writable:
            pins = node.pins = Pins()
            node._writer = await writer.Writer.open(
                node, file, data_file, header, mapping, persistent, known, pins, memory
            )
            node.read_only = False
            # Guest clusters keep their place in a data file.
            node.file.lends_pages = data_file is not None
        return node

    def files(self) -> Sequence[HostFile]:
        if self.file is self.metadata_file:
            return (self.file,)
        return (self.metadata_file, self.file)

    def bitmaps(self) -> Sequence[DirtyBitmap]:
        return self._persistent.usable

    def inconsistent_bitmaps(self) -> Sequence[str]:
        return self._persistent.inconsistent

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        runs = await self.mapping.runs(offset, length)
        if not want_zero:
            return runs
        self._tell_cut_short(runs)
        preallocated = await self._preallocated.load(0)
        return await with_holes(self.file, runs) if preallocated else runs

    def _tell_cut_short(self, runs: Runs) -> None:
        """Warn of data past the end of the file, which may be taken for holes."""
        ends = (runs.host + runs.lengths)[runs.kind == DATA]
        if int(ends.max(initial=0)) - self.file.size() >= self.header.cluster_size:
            self.past_end(0)

    def fetch_compressed_now(self, descriptor: int, offset: int, view: memoryview) -> bool:
        first = offset & self.header.cluster_size - 1
        if first + len(view) > self.header.cluster_size:
            return False  # neighbours that are the same cluster
        return self.clusters.read_now(descriptor, first, view)

    async def fetch_compressed(self, pieces: Sequence[tuple[int, int, int]]) -> list[Buffer]:
        size = self.header.cluster_size
        content: list[Buffer] = []
        started = self.clusters.start(
            [(host, min(offset % size + length, size)) for host, offset, length in pieces]
        )
        try:
            for cluster, (_, offset, length) in zip(started, pieces, strict=True):
                outcome = await cluster if isinstance(cluster, asyncio.Future) else cluster
                if not isinstance(outcome, memoryview):
                    raise self._not_decompressed(outcome, offset - offset % size)
                first = offset % size
                if first + length > size:  # neighbours that are the same cluster
                    outcome = memoryview(bytes(outcome) * -(-(first + length) // size))
                piece = outcome[first : first + length]
                # A short piece must not keep a whole cluster in memory until the peer takes it.
                content.append(bytes(piece) if length < size // 2 else piece)
        finally:
            for cluster in started:
                if isinstance(cluster, asyncio.Future):
                    cluster.cancel()
        return content

    def _not_decompressed(self, error: CorruptImage | OSError, first: int) -> OSError:
        if isinstance(error, OSError):
            return error
        self._damage.tell(first, partial("compressed cluster: {}".format, error))
        problem = f"the compressed cluster at guest offset {first:#x} is damaged"
        return OSError(errno.EIO, problem, self.name)

    # Writing

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        if self._writer is None:
            return await super().pwrite_batch(pieces, fua=fua)
        return await self._writer.pwrite_batch(pieces, fua=fua or self._write_through)

    def write_now(self, offset: int, data: Buffer) -> bool:
        return self._writer is not None and self._writer.write_now(offset, data)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool,
        fast: bool,
        fua: bool = False,
        no_hole: bool = False,
    ) -> None:
        if self._writer is None:
            raise self._read_only()
        space = zeroing.Space.GIVEN_BACK if may_unmap else zeroing.Space.KEPT
        await self._writer.write_zeroes(
            offset, length, zeroing.Space.RESERVED if no_hole else space, fast=fast
        )
        if fua or self._write_through:
            await self._writer.flush()

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        if self._writer is None:
            raise self._read_only()
        await self._writer.discard(offset, length)
        if fua or self._write_through:
            await self._writer.flush()

    async def flush(self) -> None:
        if self._writer is not None:
            await self._writer.flush()

    @property
    def unfinished(self) -> bool:
        return self._writer is not None and self._writer.unfinished

    async def finish(self) -> None:
        if self._writer is not None:
            await self._writer.finish()

    @property
    def _write_through(self) -> bool:
        return self.metadata_file.cache.write_through


async def _ready_to_be_written(file: HostFile, header: Header, snapshot: str | None) -> Header:
    """The header of an image that can be written; raises `ImageError` if it cannot."""
    if snapshot is not None:
        raise ImageError(f"{file.path}: an internal snapshot cannot be written (-r reads it)")
    if Incompatible.CORRUPT in header.incompatible:
        raise CorruptImage(
            f"{file.path}: the image is marked corrupt, and must not be written before it is"
            " repaired (pynbd check -r all); -r reads it"
        )
    if Incompatible.DIRTY in header.incompatible:
        log.warning("%s: it was not closed properly; its refcounts are repaired", file.path)
        try:
            report = await repair.repair(file, header, fix=repair.Fix.ALL)
        except OSError as error:
            raise ImageError(f"{file.path}: cannot be repaired: {error.strerror}") from None
        if report.corruptions or report.check_errors:
            raise CorruptImage(
                f"{file.path}: it was not closed properly, and cannot be repaired (pynbd check"
                " tells more); -r reads it"
            )
        header = await read_header(file)
    return header


async def _refuse_corruption(file: HostFile, header: Header) -> None:
    """Raise `CorruptImage` if a check finds any. Who writes sees only the damage that he meets: a
    cluster that is in use and not counted he takes for free.
    """
    report = await check.check(file, header)
    if report.corruptions or report.check_errors:
        raise CorruptImage(
            f"{file.path}: it is damaged, and not to be written as it is untrusted (pynbd check"
            " tells more; -r reads it)"
        )


def _tell_missing_tables(file: HostFile, header: Header, l1_offset: int, l1: UInt64s) -> None:
    """Warn of a file that was cut short of its tables: as in QEMU, what they would name is not
    there, and reads as what is below, or as zeroes. An entry that leads to no cluster is no table.
    """
    tables = l1 & np.uint64(L1E_OFFSET_MASK)
    last = int(tables[tables % np.uint64(header.cluster_size) == 0].max(initial=0))
    end = max(l1_offset + l1.nbytes, last + header.cluster_size if last else 0)
    if end > file.size():
        log.warning(
            "%s: the file was cut short, and L2 tables are missing: what they map reads as if it"
            " had never been written",
            file.path,
        )


async def read_header(file: HostFile) -> Header:
    """The header of the image in ``file``. Raises `ImageError`."""
    data = await file.read_bytes(_MOST_FIRST_CLUSTERS, 0)
    if headers.first_cluster(data) > len(data) == _MOST_FIRST_CLUSTERS:
        data = await file.read_bytes(headers.first_cluster(data), 0)
    return headers.parse(data, name=file.path, file_size=file.size())


def _find_snapshot(known: Sequence[Snapshot], wanted: str, path: str) -> Snapshot:
    found = snapshots.find(known, wanted)
    if found is None:
        there = ", ".join(f"{one.name!r} (ID {one.id})" for one in known)
        raise ImageError(
            f"{path}: there is no snapshot {wanted!r}; "
            + (f"there are {there}" if there else "it has none")
        )
    return found
