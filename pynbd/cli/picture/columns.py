"""What a picture of a disk is made of: how many bytes of what lie in each of its columns.

A disk of 1 TiB may have millions of extents, a picture has at most `COLUMNS` columns. Short answers
are added up as they come, and forgotten: the memory is that of the columns, however many extents
and layers there are. The sums are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, UNALLOCATED, ZERO, Int64s, Runs
from pynbd.block.node import BlockNode

COLUMNS = 500

# A longer chain has its lower layers drawn as one: more colours than that nobody tells apart.
MAX_LAYERS = 8

_RUNS_PER_STEP = 1 << 16

Classes = npt.NDArray[np.intp]


class Content(IntEnum):
    """What a layer itself holds somewhere: the classes of `Layer.columns`."""

    CORRUPT = 0
    DATA = 1
    COMPRESSED = 2
    ZERO = 3
    UNALLOCATED = 4


class Source(IntEnum):
    """Where what is read comes from: the classes of `DiskPicture.columns`. From `TOP` on, each
    layer has its own, from the top.
    """

    CORRUPT = 0
    ZERO = 1
    TOP = 2


_CONTENT: Classes = np.zeros(max(COMPRESSED, CORRUPT) + 1, np.intp)
_CONTENT[[DATA, COMPRESSED, ZERO, ZERO | DATA, UNALLOCATED, CORRUPT]] = [
    Content.DATA,
    Content.COMPRESSED,
    Content.ZERO,
    Content.ZERO,
    Content.UNALLOCATED,
    Content.CORRUPT,
]


class Columns:
    """A disk of ``size`` bytes in columns of equal width, and the bytes of each class in each.

    ``edges`` are the guest offsets between which the columns lie; a disk with fewer bytes than
    columns has one for each byte. ``sums`` has a row for each class.
    """

    def __init__(self, size: int, classes: int) -> None:
        count = min(size, COLUMNS)
        # Python's integers: a disk may have 2^63 bytes less one.
        edges = [size * column // count for column in range(count + 1)] if count else [0]
        self.edges: Int64s = np.array(edges, np.int64)
        self.sums: Int64s = np.zeros((classes, count), np.int64)

    def add(self, offset: int, ends: Int64s, classes: Classes) -> None:
        """Add runs from guest offset ``offset``, inside the disk, with the class of each."""
        first, last = np.searchsorted(self.edges, (offset, int(ends[-1])), "right")
        cuts = np.union1d(ends, self.edges[first:last])
        run = np.searchsorted(ends, cuts)
        column = np.searchsorted(self.edges, cuts) - 1
        np.add.at(self.sums, (classes[run], column), np.diff(cuts, prepend=offset))


@dataclass(frozen=True, eq=False)
class Layer:
    """A bar of one layer: what it holds itself; ``columns`` are bytes, by `Content`.

    ``count`` is more than 1 for the lower layers of a long chain, drawn as one; ``name`` and
    ``format`` are then those of the first of them. ``size`` may differ from the disk's.
    """

    name: str
    format: str
    size: int
    columns: Int64s
    count: int = 1


@dataclass(frozen=True, eq=False)
class BitmapLane:
    """A bar of one dirty bitmap: ``columns`` are bytes, clean and dirty."""

    name: str
    granularity: int
    columns: Int64s


@dataclass(frozen=True, eq=False)
class DiskPicture:
    """A disk of ``size`` bytes as its reader sees it (``columns``, by `Source`), the layers that it
    is made of from the top, and its bitmaps.
    """

    title: str
    size: int
    columns: Int64s
    layers: Sequence[Layer]
    bitmaps: Sequence[BitmapLane]


async def picture_of(node: BlockNode, bitmaps: Sequence[DirtyBitmap] = ()) -> DiskPicture:
    """Look all over a disk, and at the bitmaps that are to be drawn below it.

    ``OSError`` if metadata cannot be read.
    """
    chain = list(node.chain())
    shown = chain if len(chain) <= MAX_LAYERS else chain[: MAX_LAYERS - 1]
    layers = [await _layer(layer, node.size) for layer in shown]
    if len(shown) < len(chain):
        layers.append(await _rest(chain[len(shown)], node.size))
    return DiskPicture(
        title=node.name,
        size=node.size,
        columns=await _reading(node, len(layers)),
        layers=layers,
        bitmaps=[await _bitmap(bitmap, node.size) for bitmap in bitmaps],
    )


async def _reading(node: BlockNode, layers: int) -> Int64s:
    columns = Columns(node.size, Source.TOP + layers)
    at = 0
    while at < node.size:
        runs = await node.map(at, node.size - at)
        source = np.minimum(runs.depth, layers).astype(np.intp) + (Source.TOP - 1)
        source[runs.kind & ZERO != 0] = Source.ZERO
        source[runs.kind == CORRUPT] = Source.CORRUPT
        columns.add(at, runs.ends, source)
        at = runs.end
    return columns.sums


async def _layer(node: BlockNode, size: int) -> Layer:
    columns = Columns(size, len(Content))
    at, end = 0, min(node.size, size)
    while at < end:
        runs = await node.layer(at, end - at, want_zero=True)
        columns.add(at, runs.ends, _CONTENT[runs.kind])
        at = runs.end
    return Layer(node.name, node.format, node.size, columns.sums)


async def _rest(node: BlockNode, size: int) -> Layer:
    """The layers from ``node`` down, as one."""
    columns = Columns(size, len(Content))
    at, end = 0, min(node.size, size)
    while at < end:
        runs = await node.map(at, end - at)
        columns.add(at, runs.ends, _of_chain(runs))
        at = runs.end
    count = sum(1 for _ in node.chain())
    return Layer(node.name, node.format, node.size, columns.sums, count)


def _of_chain(runs: Runs) -> Classes:
    content = _CONTENT[runs.kind]
    content[runs.depth == 0] = Content.UNALLOCATED
    return content


async def _bitmap(bitmap: DirtyBitmap, size: int) -> BitmapLane:
    columns = Columns(size, 2)
    at = 0
    while at < size:
        runs = await bitmap.runs(at, size - at, _RUNS_PER_STEP)
        columns.add(at, runs.ends, runs.dirty.astype(np.intp))
        at = runs.end
    return BitmapLane(bitmap.name, bitmap.granularity, columns.sums)
