"""BlockNode: one image of a chain, and the chain below it.

A format answers one question, `BlockNode.layer`: what do you yourself say about this guest range?
Everything that concerns the chain is here, once for all formats:

* `map` merges the answers of all layers, whole tables at a time; it serves BLOCK_STATUS.
* `resolve` turns a map into extents for I/O and remembers them, so that a read that was mapped once
  costs one bisect, through however many layers.
* `fetch` brings the bytes of an extent.

Depth as in ``qemu-img map`` plus one: 1 is this node, n the n-th below, 0 nobody.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Self

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.engine import Buffer, Engine, HostFile
from pynbd.block.extent import (
    COMPRESSED,
    CORRUPT,
    DATA,
    UNALLOCATED,
    ZERO,
    Extent,
    Runs,
    concatenate,
)
from pynbd.block.pins import Pins
from pynbd.block.resolved import RESOLVED_BYTES, ResolvedWindows, Window

log = logging.getLogger("pynbd")

# Guest bytes that one NBD_CMD_CACHE brings near.
PREFETCH_MAX = 32 << 20

# How much guest range is resolved at once around a read that was not mapped before.
RESOLVE_WINDOW = 1 << 26

# Between two turns of the loop, a map looks up or merges so many runs, about two milliseconds'
# worth. A layer without any takes as long as `_LAYER_WORK` of them.
_TURN_WORK = 1 << 14
_LAYER_WORK = 1 << 11


class BlockNode(ABC):
    """An open image: guest bytes 0..size at guest offsets, with ``backing`` below it or None.

    ``name`` is the file name as it is told to people, ``format`` "raw" or "qcow2", ``file`` the
    host file that holds guest data; a node whose bytes come from elsewhere has none, and brings
    them itself (`fetch_own`). ``window``: guest bytes that are resolved at once. What it cannot
    (``can_...``) succeeds and does nothing.
    """

    name: str
    format: str
    size: int
    file: HostFile | None = None
    read_only: bool
    backing: BlockNode | None = None
    own_engine: Engine | None = None  # an engine that was made for this chain, and ends with it
    window: int = RESOLVE_WINDOW
    resolved_bytes: int = RESOLVED_BYTES  # that `resolved` may take
    preferred_block_size: int = 4096
    can_discard: bool = True  # if it is written at all
    can_prefetch: bool = True
    _cut_short: bool = False  # that it was told
    pins: Pins | None = None  # a node whose host clusters can be freed while it is served has them

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def chain(self) -> Iterator[BlockNode]:
        """This node and those below it, from the top."""
        node: BlockNode | None = self
        while node is not None:
            yield node
            node = node.backing

    def bitmap_layers(self) -> Iterator[BlockNode]:
        """The layers whose bitmaps speak of this disk's guest offsets, from the top."""
        return self.chain()

    # What a format answers

    @abstractmethod
    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        """What this layer alone says about guest bytes [offset, offset + length), inside its size.

        The answer may be shorter (one step's worth of work), never empty. Without ``want_zero``
        nobody asks whether data reads as zeroes, and nothing is spent on finding out.
        """

    async def fetch_compressed(self, pieces: Sequence[tuple[int, int, int]]) -> list[Buffer]:
        """The content of each (L2 descriptor, guest offset, length): parts of compressed clusters
        of this layer, which are decompressed together. ``OSError`` EIO for a damaged one.
        """
        raise AssertionError("only qcow2 has compressed clusters")

    def fetch_compressed_now(self, descriptor: int, offset: int, view: memoryview) -> bool:
        """Fill ``view`` with guest bytes from ``offset`` on, which are in the compressed cluster of
        this layer, if that takes no longer than a turn of the loop may. False: `fetch_compressed`.
        """
        raise AssertionError("only qcow2 has compressed clusters")

    async def fetch_own(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with this layer's data from guest offset ``offset``; for a node without a
        host file.
        """
        raise AssertionError("this node has a host file")

    def bitmaps(self) -> Sequence[DirtyBitmap]:
        """The persistent dirty bitmaps of this layer that can be used."""
        return ()

    def inconsistent_bitmaps(self) -> Sequence[str]:
        """The names of this layer's bitmaps that cannot be used: they were not saved when it was
        last closed.
        """
        return ()

    def files(self) -> Sequence[HostFile]:
        """The files that this node, without those below it, keeps open."""
        return (self.file,) if self.file else ()

    # Reading

    async def map(self, offset: int, length: int, *, want_zero: bool = True) -> Runs:
        """What the chain says about a guest range; perhaps a shorter one, never empty.

        No layer says UNALLOCATED in the answer: bytes that no layer holds are ZERO at depth 0.
        Bytes beyond the end of a short backing node read as zeroes, and it is that node that
        decides so.
        """
        above: list[tuple[Runs, int]] = []  # what each layer says, and where its last hole ends
        first, last = offset, offset + length
        work = 0
        for node in self.chain():
            runs = await node._layer_and_beyond(first, last, want_zero=want_zero)
            holes = runs.kind == UNALLOCATED
            if not holes.any():
                break
            # The hull of the holes is all that is asked of the next one.
            first, last = int(runs.starts[holes][0]), int(runs.ends[holes][-1])
            above.append((runs, last))
            work = await _turn(work, runs)
        else:
            runs = _zeroed(above.pop()[0])
        while above:
            own, last = above.pop()
            runs = _over(own, runs, last)
            work = await _turn(work, runs)
        return runs

    async def lookup(self, offset: int, length: int) -> Runs:
        """`map` as I/O needs it: depths are places in the chain, and nobody looks for zeroes."""
        return await self.map(offset, length, want_zero=False)

    async def _layer_and_beyond(self, first: int, last: int, *, want_zero: bool) -> Runs:
        """`layer` for guest bytes [first, last), which may lie beyond the end of this node."""
        if first >= self.size:
            return Runs.single(first, last - first, ZERO)
        runs = await self.layer(first, min(last, self.size) - first, want_zero=want_zero)
        if runs.end == self.size < last:
            runs = concatenate([runs, Runs.single(self.size, last - self.size, ZERO)])
        return runs

    @cached_property
    def resolved(self) -> ResolvedWindows:
        """What of this chain was looked up before."""
        return ResolvedWindows(min(node.window for node in self.chain()), self.resolved_bytes)

    async def resolve(self, offset: int, end: int) -> list[Extent]:
        """The extents that make up guest bytes [offset, end), cut to them."""
        extents: list[Extent] = []
        layers, resolved = self._layers, self.resolved
        while offset < end:
            window = resolved.windows.get(offset // resolved.span)
            if window is None:
                window = await self._resolve_window(offset // resolved.span * resolved.span)
            stop = min(end, window.end)
            extents += [_extent(layers, *row) for row in window.rows(offset, stop)]
            offset = stop
            if offset < end:
                await asyncio.sleep(0)  # many windows in one step would hold the loop
        return extents

    async def _resolve_window(self, start: int) -> Window:
        """Look up and remember the window from guest offset ``start``."""
        resolved = self.resolved
        stop = min(start + resolved.span, self.size)
        changes = resolved.changes
        runs = await self.lookup(start, stop - start)
        while runs.end < stop:  # a short answer
            more = await self.lookup(runs.end, stop - runs.end)
            runs = concatenate([runs, more])
        window = Window(runs)
        # If the mapping changed meanwhile, this is good for the one who asks, whose pins hold all
        # that was there when he began; and looking again might never end.
        if resolved.changes == changes:
            resolved.keep(window)
        return window

    async def fetch(self, extent: Extent, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the guest bytes from ``offset``, all of them inside ``extent``.

        ``OSError`` EIO where the metadata is corrupt or the host fails.
        """
        if extent.file is not None:
            await extent.node.fetch_plain(extent.file, offset + extent.shift, view)
        elif extent.kind == ZERO:
            view[:] = bytes(len(view))
        elif extent.kind == COMPRESSED:
            (view[:],) = await extent.node.fetch_compressed([(extent.host, offset, len(view))])
        elif extent.kind == DATA:
            await extent.node.fetch_own(offset, view)
        else:
            assert extent.kind == CORRUPT
            raise OSError(
                errno.EIO, f"corrupt metadata at guest offset {offset:#x}", extent.node.name
            )

    def decompressed_now(self, depth: int, descriptor: int, offset: int, view: memoryview) -> bool:
        """`fetch_compressed_now` of the layer at a depth of this chain."""
        return self._layers[depth - 1].fetch_compressed_now(descriptor, offset, view)

    @cached_property
    def _layers(self) -> Sequence[BlockNode]:
        return list(self.chain())

    async def decompressed(self, extents: Sequence[Extent]) -> list[Buffer]:
        """The content of COMPRESSED extents of one node."""
        pieces = [(extent.host, extent.offset, extent.end - extent.offset) for extent in extents]
        node: BlockNode = extents[0].node
        return await node.fetch_compressed(pieces)

    async def fetch_plain(self, file: HostFile, host_offset: int, view: memoryview) -> None:
        """Fill ``view`` with plain data of this layer."""
        count = await file.read(view, host_offset)
        if count < len(view):
            view[count:] = self.past_end(len(view) - count)

    async def read_plain(
        self, file: HostFile, host_offset: int, length: int, *, sparse: bool
    ) -> bytes | None:
        """``length`` bytes of plain data of this layer, in one hop; for what the page cache does
        not hold, or is long. None if ``sparse`` and they are a hole of the host file.
        """
        data = await file.read_unless_hole(length, host_offset, sparse=sparse)
        if data is not None and len(data) < length:
            data += self.past_end(length - len(data))
        return data

    def past_end(self, length: int) -> bytes:
        """What plain data reads as past the end of its file: zeroes in qcow2, as in QEMU, which is
        told once. See `RawNode`.
        """
        if not self._cut_short:
            self._cut_short = True
            name = self.file.path if self.file else self.name
            log.warning("%s: the file was cut short; what is missing reads as zeroes", name)
        return bytes(length)

    async def pread(self, offset: int, length: int) -> bytearray:
        """Guest bytes [offset, offset + length), which lie inside the size."""
        data = bytearray(length)
        view = memoryview(data)
        with self.pins.hold() if self.pins else nullcontext():
            for extent in await self.resolve(offset, offset + length):
                piece = view[extent.offset - offset : extent.end - offset]
                await self.fetch(extent, extent.offset, piece)
        return data

    # Writing; a node that is not read-only overrides these

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` in the loop's own time, if all that it takes is a short call; False if
        not, or if that failed: then nothing is known of these bytes, and `pwrite_batch` has to.
        """
        return False

    async def pwrite_batch(
        self, pieces: Sequence[tuple[int, Buffer]], *, fua: bool = False
    ) -> list[OSError | None]:
        """Write each (guest offset, data); what went wrong with each. ``fua``: onto stable
        storage.
        """
        return [self._read_only() for _ in pieces]

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
        """Make guest bytes read as zeroes. Their space may be given back (``may_unmap``), is kept,
        or is there afterwards (``no_hole``). ``fast``: OSError ENOTSUP, untouched, if that means
        writing them.
        """
        raise self._read_only()

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Guest bytes that nobody needs any more; what they read as is open, the backing never
        shows.
        """
        raise self._read_only()

    async def flush(self) -> None:
        """Every completed write onto stable storage."""
        for node in self.chain():
            if node.file is not None and not node.read_only:
                await node.file.flush()

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring guest bytes near (NBD_CMD_CACHE): the host begins to read the plain data among the
        first `PREFETCH_MAX`.

        The rest of a longer range is a hint that nobody takes: a client may name a whole disk.
        """
        ranges: dict[HostFile, list[tuple[int, int]]] = {}
        for extent in await self.resolve(offset, offset + min(length, PREFETCH_MAX)):
            if extent.file is not None:
                piece = extent.host, extent.end - extent.offset
                ranges.setdefault(extent.file, []).append(piece)
        for file, pieces in ranges.items():
            await file.will_need(pieces)

    @property
    def unfinished(self) -> bool:
        """Whether this layer keeps something that `finish` has not brought onto stable storage."""
        return False

    async def finish(self) -> None:  # noqa: B027 (most layers keep nothing)
        """Bring onto stable storage what a writable layer keeps in memory until it is closed.
        ``OSError`` if that fails.
        """

    async def close(self) -> None:
        """Finish, then close every file of the chain, once the system calls under way have
        returned. ``OSError`` if the image could not be finished; its files are closed all the same.
        """
        try:
            for node in self.chain():
                if not node.read_only:
                    await node.finish()
        except OSError as error:
            reason = f"it could not be finished: {error.strerror or error}"
            raise OSError(error.errno, reason, self.name) from error
        except MemoryError as error:
            reason = f"it could not be finished: {os.strerror(errno.ENOMEM)}"
            raise OSError(errno.ENOMEM, reason, self.name) from error
        finally:
            if self.own_engine is not None:
                self.own_engine.close()
            for node in self.chain():
                for file in node.files():
                    file.close()

    def _read_only(self) -> OSError:
        return OSError(errno.EROFS, "the image is read-only", self.name)


def _zeroed(own: Runs) -> Runs:
    kind = own.kind.copy()
    kind[kind == UNALLOCATED] = ZERO
    return Runs(own.offset, own.ends, kind, own.host, own.depth).coalesced()


def _over(own: Runs, below: Runs, last: int) -> Runs:
    """``own`` over ``below``, which begins at its first hole; its last one ends at ``last``."""
    if own.offset < below.offset:
        lead = Runs.single(own.offset, below.offset - own.offset, DATA)
        below = concatenate([lead, below])
    if below.end == last < own.end:
        below = concatenate([below, Runs.single(last, own.end - last, DATA)])
    return own.over(below)


async def _turn(work: int, runs: Runs) -> int:
    """Count ``runs`` of one layer as work; the loop has its turn when there was enough of it."""
    work += _LAYER_WORK + len(runs)
    if work < _TURN_WORK:
        return work
    await asyncio.sleep(0)
    return 0


def _extent(
    layers: Sequence[BlockNode], start: int, end: int, kind: int, place: int, depth: int
) -> Extent:
    node = layers[max(depth, 1) - 1]
    if kind == DATA and node.file is not None:
        return Extent(start, end, kind, depth, start + place, node, node.file, place)
    return Extent(start, end, kind, depth, place, node)
