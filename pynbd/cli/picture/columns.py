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
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, UNALLOCATED, ZERO, Int64s
from pynbd.block.node import BlockNode

COLUMNS = 500

# A longer chain has its lower layers drawn as one: more colours than that nobody tells apart.
MAX_LAYERS = 8

_RUNS_PER_STEP = 1 << 16

Classes = npt.NDArray[np.intp]


class Content(IntEnum):
    """What a layer itself holds somewhere: the classes of `Layer.held` and `Layer.read`."""

    CORRUPT = 0
    DATA = 1
    COMPRESSED = 2
    ZERO = 3
    UNALLOCATED = 4


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
    """A bar of one layer. ``held`` is what it holds itself and ``read`` what of that is read, since
    no layer above hides it: bytes in columns, by `Content`. What is read though nobody holds it
    counts as UNALLOCATED of the lowest layer.

    ``count`` is more than 1 for the lower layers of a long chain, drawn as one; ``name`` and
    ``format`` are then those of the first of them. ``size`` may differ from the disk's.
    ``file_size``: what its files take on the host, in bytes, where that can be told.
    """

    name: str
    format: str
    size: int
    held: Int64s
    read: Int64s
    count: int = 1
    file_size: int | None = None

    @property
    def hidden(self) -> Int64s:
        """Bytes that it holds and nobody reads, in columns."""
        hidden: Int64s = (self.held - self.read)[: Content.UNALLOCATED].sum(axis=0)
        return hidden


@dataclass(frozen=True, eq=False)
class BitmapLane:
    """A bar of one dirty bitmap: ``columns`` are bytes, clean and dirty."""

    name: str
    granularity: int
    columns: Int64s


@dataclass(frozen=True, eq=False)
class DiskPicture:
    """A disk of ``size`` bytes, the layers that it is made of from the top, and its bitmaps."""

    title: str
    size: int
    layers: Sequence[Layer]
    bitmaps: Sequence[BitmapLane]


async def picture_of(node: BlockNode, bitmaps: Sequence[DirtyBitmap] = ()) -> DiskPicture:
    """Look all over a disk, and at the bitmaps that are to be drawn below it. What is a slice of an
    image has the picture of all of the image.

    ``OSError`` if metadata cannot be read.
    """
    node, *below = node.chain()
    chain = [node, *below]
    single = len(chain) if len(chain) <= MAX_LAYERS else MAX_LAYERS - 1
    groups = [[layer] for layer in chain[:single]] + [chain[single:]] * (single < len(chain))
    read = await _read(node, [group[0].size for group in groups])
    return DiskPicture(
        title=node.name,
        size=node.size,
        layers=[
            Layer(
                name=group[0].name,
                format=group[0].format,
                size=group[0].size,
                held=await _held(group, node.size),
                read=part,
                count=len(group),
                file_size=_file_size(group),
            )
            for group, part in zip(groups, read, strict=True)
        ],
        bitmaps=[await _bitmap(bitmap, node.size) for bitmap in bitmaps],
    )


async def _read(node: BlockNode, sizes: Sequence[int]) -> Int64s:
    """`Layer.read` of each layer, of these sizes; the last may be several."""
    columns = Columns(node.size, len(sizes) * len(Content))
    at = 0
    # Past the end of a short layer there is nothing that it holds, though it is the one to say so.
    for stop in sorted({min(size, node.size) for size in (*sizes, node.size)}):
        ended = np.array([size <= at for size in sizes])
        while at < stop:
            runs = await node.map(at, stop - at)
            layer = np.minimum(runs.depth, len(sizes)).astype(np.intp) - 1
            nobody = (layer < 0) | ended[layer]
            layer[nobody] = len(sizes) - 1
            content = np.where(nobody, Content.UNALLOCATED, _CONTENT[runs.kind])
            columns.add(at, runs.ends, layer * len(Content) + content)
            at = runs.end
    return columns.sums.reshape(len(sizes), len(Content), -1)


async def _held(group: Sequence[BlockNode], size: int) -> Int64s:
    """`Layer.held` of one layer, or of all that are left of a chain."""
    first = group[0]
    columns = Columns(size, len(Content))
    at, end = 0, min(first.size, size)
    while at < end:
        if len(group) == 1:
            runs = await first.layer(at, end - at, want_zero=True)
        else:
            runs = await first.map(at, end - at)
        content = np.where(runs.depth == 0, Content.UNALLOCATED, _CONTENT[runs.kind])
        columns.add(at, runs.ends, content)
        at = runs.end
    return columns.sums


def _file_size(group: Sequence[BlockNode]) -> int | None:
    files = [file for node in group for file in node.files()]
    if not files or any(file.is_device for file in files):
        return None
    return sum(file.allocated_size() for file in files)


async def _bitmap(bitmap: DirtyBitmap, size: int) -> BitmapLane:
    columns = Columns(size, 2)
    at = 0
    while at < size:
        runs = await bitmap.runs(at, size - at, _RUNS_PER_STEP)
        columns.add(at, runs.ends, runs.dirty.astype(np.intp))
        at = runs.end
    return BitmapLane(bitmap.name, bitmap.granularity, columns.sums)
