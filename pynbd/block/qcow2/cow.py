"""Writes that change the mapping: new clusters, with what was there before around the new bytes.

docs/interop/qcow2.rst, "Cluster mapping" and "Extended L2 Entries". A cluster gets a new host
cluster if it has none, shares the one it has with a snapshot, or is compressed; what the write
leaves out is copied. With extended L2 that is done for subclusters. All bytes of many clusters go
to the file together; only then are the clusters linked, in one step of the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter

from pynbd.block.engine import Buffer, HostFile
from pynbd.block.extent import ZERO as ZERO_EXTENT
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.commit import Commits, HostRange
from pynbd.block.qcow2.entries import compressed_range, explain
from pynbd.block.qcow2.format import (
    COMPRESSED,
    COPIED,
    L2E_DESCRIPTOR_MASK,
    L2E_OFFSET_MASK,
    MAX_CLUSTER_BITS,
    SUBCLUSTERS,
    ZERO,
)
from pynbd.block.qcow2.in_flight import InFlight, ranges_of
from pynbd.block.qcow2.links import Links
from pynbd.block.qcow2.places import Places
from pynbd.block.qcow2.refcounts import Refcounts, Run
from pynbd.block.steps import together
from pynbd.errors import CorruptImage

Piece = tuple[int, Buffer]  # guest offset, data
Part = tuple[int, Buffer]  # offset inside a cluster, data
# By number of the cluster: offset inside, data, which piece.
Parts = dict[int, list[tuple[int, memoryview, int]]]

ALL = (1 << SUBCLUSTERS) - 1
# What is copied for clusters before they are written, in bytes.
_COPIED_TOGETHER = 1 << 20
_ZEROES = memoryview(bytes(1 << MAX_CLUSTER_BITS))


class Source(Enum):
    """Where bytes that a write leaves out come from."""

    ZEROES = "nowhere: they read as zeroes"
    BELOW = "the backing node"
    CLUSTER = "the host cluster, or the compressed one, that the entry names so far"


Gap = tuple[int, int, Source]  # bytes [first, last) inside a cluster


@dataclass(slots=True)
class Cluster:
    """A guest cluster that is written: what its L2 entry says, and where its bytes go.

    ``own``: they go to the host cluster that it has to itself; else to a new one (``run``).
    """

    number: int
    table: Table
    index: int
    entry: int
    bitmap: int
    own: bool
    parts: list[Part]
    pieces: list[int]  # of which of the caller's pieces these are parts
    host_offset: int = 0
    run: Run | None = None
    error: OSError | None = None


class CopyOnWrite:
    """Allocating writes of one image. ``file`` holds guest clusters, ``node`` is whose they are;
    ``raw``: the file can be read without the tables of the image.
    """

    def __init__(
        self,
        node: BlockNode,
        file: HostFile,
        links: Links,
        refcounts: Refcounts,
        commits: Commits,
        places: Places,
        in_flight: InFlight,
        *,
        raw: bool,
    ) -> None:
        self._node = node
        self._file = file
        self._links = links
        self._layout = links.layout
        self._refcounts = refcounts
        self._commits = commits
        self._places = places
        self._in_flight = in_flight
        self._raw = raw
        self.writing = 0
        """Batches whose bytes are on their way to the file."""
        self._bits = self._layout.cluster_bits
        self._size = self._layout.cluster_size
        self._subcluster = self._size // SUBCLUSTERS

    # Where a write can go as it is

    def in_place(self, offset: int, data: Buffer) -> list[tuple[Buffer, int]] | None:
        """(data, host offset) of a piece all of whose clusters are there, and nobody else's; None
        if they are not, or that cannot be told at once.
        """
        writes: list[tuple[Buffer, int]] = []
        view: Buffer = data
        end = offset + len(data)
        done = 0
        if self._raw and self._in_flight.overlap(offset >> self._bits, (end - 1 >> self._bits) + 1):
            return None  # who zeroes a raw data file is alone with it
        while offset < end:
            number = offset >> self._bits
            within = offset & self._size - 1
            count = min(self._size - within, end - offset)
            table = self._links.at_hand(number >> self._layout.l2_bits)
            if table is None:
                return None
            entry, bitmap = self._links.entry(table, number & self._layout.l2_entries - 1)
            host_offset = self._own(number, entry, bitmap, within, count)
            if host_offset is None:
                return None
            if not self._layout.data_file and self._places.hold(host_offset, count):
                return None  # damage, which the slow way tells
            if count < len(data):
                view = memoryview(data)[done : done + count]
            writes.append((view, host_offset + within))
            offset += count
            done += count
        return writes

    def _own(self, number: int, entry: int, bitmap: int, within: int, count: int) -> int | None:
        """The host cluster into which bytes of a guest cluster can be written, and they are read
        from there.
        """
        host_offset = entry & L2E_OFFSET_MASK
        if not entry & COPIED or entry & COMPRESSED or host_offset & self._size - 1:
            return None
        if self._layout.data_file:
            if host_offset != number << self._bits:
                return None
        elif not host_offset:
            return None
        if self._layout.extended:
            touched = self._touched(within, count)
            if touched & ~bitmap & ALL or bitmap & bitmap >> SUBCLUSTERS:
                return None
        elif entry & ZERO:
            return None
        return host_offset

    def _touched(self, within: int, count: int) -> int:
        """The subclusters of bytes inside a cluster."""
        first, last = within // self._subcluster, (within + count - 1) // self._subcluster
        return (1 << last + 1) - (1 << first)

    # All other writes

    async def write(self, pieces: Sequence[Piece]) -> list[OSError | None]:
        """Write each piece, wherever that leads; what went wrong with each.

        `CorruptImage` if the metadata forbids it.
        """
        parts = self._parts(pieces)
        async with self._in_flight.alone(ranges_of(sorted(parts))):
            return await self._write_parts(parts, len(pieces))

    async def write_alone(self, pieces: Sequence[Piece]) -> list[OSError | None]:
        """`write`, for who is alone with these clusters already (`InFlight`)."""
        return await self._write_parts(self._parts(pieces), len(pieces))

    async def _write_parts(self, parts: Parts, pieces: int) -> list[OSError | None]:
        clusters = [await self._find(number, parts[number]) for number in sorted(parts)]
        await self._find_homes(clusters)
        for group, gaps in self._groups(clusters):
            written = [(cluster, list(cluster.parts)) for cluster, _ in gaps]
            if gaps:
                await together(self._fill(*gap) for gap in gaps)
            await self._write(group)
            for cluster, new in written:
                cluster.parts = new  # what was copied is in the file
        self._link(clusters)
        errors: list[OSError | None] = [None] * pieces
        failed = [cluster for cluster in clusters if cluster.error]
        if failed:
            await self._refcounts.unallocate([each.run for each in failed if each.run])
            for cluster in failed:
                for index in cluster.pieces:
                    errors[index] = cluster.error
        return errors

    def _parts(self, pieces: Sequence[Piece]) -> Parts:
        """What of the pieces is in which cluster, in their order."""
        parts: Parts = {}
        for index, (offset, data) in enumerate(pieces):
            view = memoryview(data)
            done = 0
            while done < len(view):
                within = offset + done & self._size - 1
                count = min(self._size - within, len(view) - done)
                part = within, view[done : done + count], index
                parts.setdefault(offset + done >> self._bits, []).append(part)
                done += count
        return parts

    async def _find(self, number: int, parts: list[tuple[int, memoryview, int]]) -> Cluster:
        layout = self._layout
        table = await self._links.table(number >> layout.l2_bits)
        index = number & layout.l2_entries - 1
        entry, bitmap = self._links.entry(table, index)
        problem = explain(entry, bitmap, layout, number << self._bits) if entry | bitmap else ""
        if problem:
            raise CorruptImage(
                f"{self._node.name}: guest offset {number << self._bits:#x}: {problem}"
            )
        if layout.data_file:
            own = entry & (COPIED | L2E_OFFSET_MASK) != 0
        else:
            own = bool(entry & COPIED and entry & L2E_OFFSET_MASK) and not entry & COMPRESSED
        inside: list[Part] = [(within, view) for within, view, _ in parts]
        return Cluster(
            number, table, index, entry, bitmap, own, inside, [piece for _, _, piece in parts]
        )

    async def _find_homes(self, clusters: Sequence[Cluster]) -> None:
        """The host cluster of each: the one that it has to itself, or a new one."""
        homeless: list[Cluster] = []
        for cluster in clusters:
            if self._layout.data_file:
                cluster.host_offset = cluster.number << self._bits
                continue
            if not cluster.table.checked and cluster.entry:
                # Not even to end the reference to it: somebody new may be there by then.
                what = f"the cluster of guest offset {cluster.number << self._bits:#x}"
                for host_offset, length in references(cluster.entry, self._bits):
                    self._refcounts.check_there(host_offset, length, what)
            if cluster.own:
                cluster.host_offset = cluster.entry & L2E_OFFSET_MASK
                if self._places.hold(cluster.host_offset, self._size):
                    there = " and ".join(self._places.names(cluster.host_offset))
                    raise CorruptImage(
                        f"{self._node.name}: guest offset {cluster.number << self._bits:#x} is"
                        f" mapped to {cluster.host_offset:#x}, where there is {there}"
                    )
            else:
                homeless.append(cluster)
        if homeless:
            waiting = iter(homeless)
            for run in await self._refcounts.allocate(len(homeless)):
                for at in range(run.clusters):
                    cluster = next(waiting)
                    cluster.host_offset = run.host_offset + (at << self._bits)
                    cluster.run = Run(cluster.host_offset, 1, run.blank)

    async def _write(self, clusters: Sequence[Cluster]) -> None:
        """Write the new bytes, and what is around them; errors stay with the clusters."""
        writes: list[tuple[Buffer, int]] = []
        owners: list[Cluster] = []
        for cluster in clusters:
            if not cluster.error:
                for within, data in cluster.parts:
                    writes.append((data, cluster.host_offset + within))
                    owners.append(cluster)
        if not writes:
            return
        self.writing += 1
        try:
            errors = await self._file.write_batch(writes)
        finally:
            self.writing -= 1
        if any(errors):
            for owner, error in zip(owners, errors, strict=True):
                owner.error = owner.error or error

    def _link(self, clusters: Sequence[Cluster]) -> None:
        """Link the host clusters whose bytes are in the file."""
        changed: list[int] = []
        freed: list[HostRange] = []
        for cluster in clusters:
            if cluster.error:
                continue
            entry, bitmap = self._linked(cluster)
            if (entry, bitmap) == (cluster.entry, cluster.bitmap):
                continue
            self._links.link(cluster.table, cluster.index, entry, bitmap)
            changed.append(cluster.number)
            if cluster.run and cluster.entry:
                freed += references(cluster.entry, self._bits)
        self._commits.free(freed)
        for first, last in ranges_of(changed):
            self._node.resolved.forget(first << self._bits, last << self._bits)

    def _linked(self, cluster: Cluster) -> tuple[int, int]:
        """What the L2 entry of a cluster and its bitmap are to be."""
        entry = cluster.host_offset | COPIED
        if not self._layout.extended:
            if cluster.own and not cluster.entry & ZERO:
                entry = cluster.entry
            return entry, 0
        if cluster.entry & COMPRESSED:
            return entry, ALL
        allocated = cluster.bitmap & ALL | self._written(cluster)
        return entry, (cluster.bitmap >> SUBCLUSTERS & ~allocated) << SUBCLUSTERS | allocated

    # What is copied

    def _written(self, cluster: Cluster) -> int:
        """The subclusters that new bytes are in."""
        touched = 0
        for within, view in cluster.parts:
            touched |= self._touched(within, len(view))
        return touched

    def _gaps(self, cluster: Cluster) -> Iterator[Gap]:
        """What has to be written to the host cluster besides the new bytes."""
        end = self._size
        if self._layout.data_file:  # which ends with the disk, and not with the cluster
            end = min(end, self._node.size - (cluster.number << self._bits))
        blank = cluster.run is not None and cluster.run.blank
        parts = sorted((within, within + len(view)) for within, view in cluster.parts)
        for at, last, source in self._needed(cluster):
            if source is Source.BELOW and self._node.backing is None:
                source = Source.ZEROES
            if blank and source is Source.ZEROES:
                continue
            stop = min(last, end)
            for first, after in parts:
                if at < first < stop:
                    yield at, first, source
                if first < stop:
                    at = max(at, after)
            if at < stop:
                yield at, stop, source

    def _needed(self, cluster: Cluster) -> Iterator[Gap]:
        """What has to be in the host cluster that is not there yet, and what it is now."""
        entry = cluster.entry
        if entry & COMPRESSED:
            yield 0, self._size, Source.CLUSTER
        elif self._layout.extended:
            allocated, zero = cluster.bitmap & ALL, cluster.bitmap >> SUBCLUSTERS
            written = self._written(cluster)
            needed = written & ~allocated if cluster.own else written | allocated
            yield from self._subclusters(needed, allocated, zero)
        elif entry & ZERO:
            yield 0, self._size, Source.ZEROES
        elif not cluster.own:
            there = entry & L2E_OFFSET_MASK
            yield 0, self._size, Source.CLUSTER if there else Source.BELOW

    def _subclusters(self, needed: int, allocated: int, zero: int) -> Iterator[Gap]:
        """The runs of subclusters that come from the same place."""
        size = self._subcluster
        for source, which in (
            (Source.CLUSTER, needed & allocated),
            (Source.ZEROES, needed & ~allocated & zero),
            (Source.BELOW, needed & ~allocated & ~zero),
        ):
            for first, last in ranges_of([n for n in range(SUBCLUSTERS) if which >> n & 1]):
                yield first * size, last * size, source

    def _groups(
        self, clusters: Sequence[Cluster]
    ) -> Iterator[tuple[Sequence[Cluster], list[tuple[Cluster, list[Gap]]]]]:
        """(clusters to be written together, those of them that have gaps): so much is copied at a
        time.
        """
        first = copied = 0
        gaps: list[tuple[Cluster, list[Gap]]] = []
        for index, cluster in enumerate(clusters):
            there = sorted(self._gaps(cluster), key=itemgetter(0))
            if there:
                gaps.append((cluster, there))
                copied += self._size
                if copied >= _COPIED_TOGETHER:
                    yield clusters[first : index + 1], gaps
                    first, copied, gaps = index + 1, 0, []
        if first < len(clusters):
            yield clusters[first:], gaps

    async def _fill(self, cluster: Cluster, gaps: list[Gap]) -> None:
        """Add what is around the new bytes to the parts."""
        try:
            if len(gaps) > 1 and await self._fill_at_once(cluster, gaps):
                return
            for first, last, source in gaps:
                cluster.parts += await self._from(cluster, first, last, source)
        except OSError as error:
            cluster.error = error
        cluster.parts.sort(key=itemgetter(0))

    async def _fill_at_once(self, cluster: Cluster, gaps: list[Gap]) -> bool:
        """Lay the new bytes over one copy of all that is around them, if that lies in one piece and
        is most of it.
        """
        first, last, source = gaps[0][0], gaps[-1][1], gaps[0][2]
        needed = sum(after - at for at, after, _ in gaps)
        if 2 * needed < last - first or any(each is not source for _, _, each in gaps):
            return False
        at = first
        known = [(within, within + len(data)) for within, data in cluster.parts]
        for start, after in sorted(known + [(start, after) for start, after, _ in gaps]):
            if at < min(start, last):
                return False  # with subclusters there may be something in between that is to stay
            at = max(at, after)
        copy = memoryview(bytearray(last - first))
        if source is Source.CLUSTER and not cluster.entry & COMPRESSED:
            await self._read_cluster(cluster, first, copy)
        elif source is Source.BELOW:
            backing, offset = self._backing, (cluster.number << self._bits) + first
            if offset + len(copy) > backing.size:
                return False
            extents = await backing.resolve(offset, offset + len(copy))
            if len(extents) > 1 or extents[0].file is None:
                return False
            await backing.fetch(extents[0], offset, copy)
        else:
            return False
        parts, cluster.parts = cluster.parts, [(first, copy)]
        for within, data in parts:
            if first <= within < last:
                copy[within - first : within - first + len(data)] = data
            else:
                cluster.parts.append((within, data))
        cluster.parts.sort(key=itemgetter(0))
        return True

    async def _from(self, cluster: Cluster, first: int, last: int, source: Source) -> list[Part]:
        """Bytes [first, last) of a cluster as they are now."""
        if source is Source.BELOW:
            return await self._from_below(cluster, first, last)
        if source is Source.ZEROES:
            return [(first, _ZEROES[: last - first])]
        if cluster.entry & COMPRESSED:
            descriptor = cluster.entry & L2E_DESCRIPTOR_MASK
            offset = (cluster.number << self._bits) + first
            (content,) = await self._node.fetch_compressed([(descriptor, offset, last - first)])
            return [(first, content)]
        copy = memoryview(bytearray(last - first))
        await self._read_cluster(cluster, first, copy)
        return [(first, copy)]

    async def _from_below(self, cluster: Cluster, first: int, last: int) -> list[Part]:
        """Bytes of the backing node; nothing if they are zeroes, and the cluster is blank."""
        backing = self._backing
        start = cluster.number << self._bits
        end = min(start + last, backing.size)
        extents = await backing.resolve(start + first, end) if start + first < end else []
        blank = cluster.run is not None and cluster.run.blank
        if blank and all(extent.kind == ZERO_EXTENT for extent in extents):
            return []
        parts: list[Part] = []
        for extent in extents:
            at, length = extent.offset - start, extent.end - extent.offset
            if extent.kind == ZERO_EXTENT:
                parts.append((at, _ZEROES[:length]))
            else:
                copy = memoryview(bytearray(length))
                await backing.fetch(extent, extent.offset, copy)
                parts.append((at, copy))
        beyond = max(first, end - start)
        if beyond < last:
            parts.append((beyond, _ZEROES[: last - beyond]))
        return parts

    @property
    def _backing(self) -> BlockNode:
        assert self._node.backing is not None
        return self._node.backing

    async def _read_cluster(self, cluster: Cluster, first: int, copy: memoryview) -> None:
        """Bytes of the host cluster from ``first`` on; what is past the end of the file is zero."""
        await self._file.read(copy, (cluster.entry & L2E_OFFSET_MASK) + first)


def references(entry: int, cluster_bits: int) -> list[HostRange]:
    """The host clusters that an L2 entry of an image without data file refers to."""
    if entry & COMPRESSED:
        offset, length = compressed_range(entry, cluster_bits)
        first, last = offset >> cluster_bits, (offset + length - 1 >> cluster_bits) + 1
        return [(first << cluster_bits, last - first << cluster_bits)]
    host_offset = entry & L2E_OFFSET_MASK
    return [(host_offset, 1 << cluster_bits)] if host_offset else []
