"""What is dirty: the ranges of a bitmap, of an image or of an export."""

from __future__ import annotations

from collections.abc import Sequence

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.node import BlockNode
from pynbd.client.connecting import connect
from pynbd.client.connection import Client
from pynbd.client.disk import Disk, named
from pynbd.client.node import NbdNode
from pynbd.client.pieces import Ranges
from pynbd.errors import ImageError, MapError, PynbdError
from pynbd.protocol.metadata import QEMU_DIRTY_BITMAP

_DIRTY = 1  # the flag of qemu:dirty-bitmap contexts
# How many of the bitmaps that there are a message names.
_NAMES = 64
# Runs of a bitmap that are looked at in one step.
_RUNS = 1 << 16


async def dirty_ranges(disk: Disk, name: str) -> Ranges:
    """The ranges that are dirty in a bitmap; from an export, the context of which was asked for.

    Raises `ImageError` if there is no such bitmap, or it cannot be relied on; `MapError` while it
    is walked through.
    """
    if not isinstance(disk.node, NbdNode):
        return _ranges_of_bitmap(_find_bitmap(disk.node, name), disk)
    client = disk.node.clients[0]
    context = QEMU_DIRTY_BITMAP + name
    if context in client.contexts:
        return _ranges_of_context(client, context, disk)
    await disk.node.close()  # its server may take one client at a time, and end with the last
    try:
        async with connect(disk.name, contexts=[QEMU_DIRTY_BITMAP]) as client:
            there = [other.removeprefix(QEMU_DIRTY_BITMAP) for other in client.contexts]
    except (OSError, PynbdError):
        raise ImageError(f"{disk.name}: no bitmap {name!r}") from None
    raise _missing(disk.name, name, there)


def _find_bitmap(node: BlockNode, name: str) -> DirtyBitmap:
    """A bitmap of the active layer. One further down knows nothing of the writes above it: what it
    calls dirty is not all that has changed. Raises `ImageError`.
    """
    for bitmap in node.bitmaps():
        if bitmap.name == name:
            return bitmap
    if name in node.inconsistent_bitmaps():
        raise ImageError(
            f"{node.name}: bitmap {name!r} is in use, or was when its last writer ended: nobody"
            " knows what is dirty"
        )
    for below in list(node.chain())[1:]:
        if any(bitmap.name == name for bitmap in below.bitmaps()):
            raise ImageError(
                f"{node.name}: bitmap {name!r} is of its backing file {below.name}, and knows"
                " nothing of the writes above it"
            )
    raise _missing(node.name, name, [bitmap.name for bitmap in node.bitmaps()])


async def _ranges_of_bitmap(bitmap: DirtyBitmap, disk: Disk) -> Ranges:
    """What a bitmap of an image says is dirty."""
    offset = 0
    while offset < disk.size:
        with named(MapError, disk.name, "look up what is dirty in", offset, disk.size - offset):
            runs = await bitmap.runs(offset, disk.size - offset, _RUNS)
        for end, dirty in zip(runs.ends.tolist(), runs.dirty.tolist(), strict=True):
            if dirty:
                yield offset, end
            offset = end


async def _ranges_of_context(client: Client, context: str, disk: Disk) -> Ranges:
    """What a metadata context qemu:dirty-bitmap:NAME of an export says is dirty."""
    offset = 0
    while offset < disk.size:
        with named(MapError, disk.name, "look up what is dirty in", offset, disk.size - offset):
            answers = await client.block_status(offset, disk.size - offset, contexts=[context])
        for length, flags in answers[context]:
            if flags & _DIRTY:
                yield offset, offset + length
            offset += length


def _missing(disk: str, name: str, there: Sequence[str]) -> ImageError:
    names = ", ".join(map(repr, there[:_NAMES]))
    return ImageError(f"{disk}: no bitmap {name!r}; there is {names or 'none'}")
