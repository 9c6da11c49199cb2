"""Metadata contexts: what BLOCK_STATUS says about an export ("Metadata querying" in the NBD
specification).

* ``base:allocation``: NBD_STATE_HOLE and NBD_STATE_ZERO.
* ``qemu:allocation-depth``: 0 no layer, 1 the active layer, n the n-th from the top.
* ``qemu:dirty-bitmap:NAME``: bit 0 where the bitmap is dirty.

Rules:

1. The image is asked once for all contexts that need its map, and not at all if none does: a
   context that was filtered out costs nothing. Whether data reads as zeroes is only asked for
   ``base:allocation``.
2. Neighbours of equal status are one extent. No extent ends after the request.
3. An answer may be shorter than the request; it is never empty. One step's worth of looking up is
   an answer, unless the client wants one extent only (REQ_ONE): that one is followed to its end.
4. Damaged metadata anywhere in the answer fails the request: nobody may take a guess for a map.
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, ZERO, Runs
from pynbd.block.node import BlockNode
from pynbd.protocol.metadata import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP
from pynbd.protocol.values import State

# QEMU gives at most this many extents of one context in one reply (NBD_MAX_BLOCK_STATUS_EXTENTS).
MAX_EXTENTS_PER_REPLY = 1 << 17

Ends = npt.NDArray[np.int64]
States = npt.NDArray[np.int64]

_STATE_OF_KIND = np.zeros(CORRUPT, np.int64)
_STATE_OF_KIND[DATA] = _STATE_OF_KIND[COMPRESSED] = 0
_STATE_OF_KIND[ZERO] = State.HOLE | State.ZERO
_STATE_OF_KIND[ZERO | DATA] = State.ZERO


class Context(ABC):
    """One metadata context of one export."""

    needs_map = True
    needs_zero = False

    @abstractmethod
    async def states(self, offset: int, end: int, runs: Runs | None) -> tuple[Ends, States]:
        """Ends (exclusive) and status of consecutive extents of guest bytes [offset, end).

        ``runs`` is the map of the same range, if the context needs one. The answer may be shorter.
        """


class AllocationContext(Context):
    """base:allocation."""

    needs_zero = True

    async def states(self, offset: int, end: int, runs: Runs | None) -> tuple[Ends, States]:
        assert runs is not None
        return runs.ends, _STATE_OF_KIND[runs.kind]


class DepthContext(Context):
    """qemu:allocation-depth."""

    async def states(self, offset: int, end: int, runs: Runs | None) -> tuple[Ends, States]:
        assert runs is not None
        return runs.ends, runs.depth.astype(np.int64)


class BitmapContext(Context):
    """qemu:dirty-bitmap:NAME."""

    needs_map = False

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self.bitmap = bitmap

    async def states(self, offset: int, end: int, runs: Runs | None) -> tuple[Ends, States]:
        runs_of_bitmap = await self.bitmap.runs(offset, end - offset, MAX_EXTENTS_PER_REPLY)
        return runs_of_bitmap.ends, runs_of_bitmap.dirty.astype(np.int64)


def standard_contexts(*, depth: bool, bitmaps: Sequence[DirtyBitmap]) -> dict[str, Context]:
    """The contexts of an image by name, in the order of their ids."""
    contexts: dict[str, Context] = {BASE_ALLOCATION: AllocationContext()}
    if depth:
        contexts[QEMU_ALLOCATION_DEPTH] = DepthContext()
    for bitmap in bitmaps:
        contexts[QEMU_DIRTY_BITMAP + bitmap.name] = BitmapContext(bitmap)
    return contexts


async def block_status(
    node: BlockNode, contexts: Mapping[int, Context], offset: int, length: int, *, one: bool
) -> dict[int, tuple[Ends, States]]:
    """Lengths in bytes and status of the extents from ``offset``, for each context by its id.

    ``one``: only the first extent of each. Raises ``OSError`` EIO where metadata cannot be read.
    """
    end = offset + length
    answers: dict[int, tuple[Ends, States]] = {}
    parts: dict[int, list[tuple[Ends, States]]] = {number: [] for number in contexts}
    positions = dict.fromkeys(contexts, offset)
    unfinished = dict(contexts)
    while unfinished:
        mapped = [number for number, context in unfinished.items() if context.needs_map]
        runs = None
        if mapped:
            # Those that still follow their first extent have come equally far: one map serves them
            # all.
            start = positions[mapped[0]]
            want_zero = any(unfinished[number].needs_zero for number in mapped)
            runs = await node.map(start, end - start, want_zero=want_zero)
            if (runs.kind == CORRUPT).any():
                raise OSError(errno.EIO, "corrupt metadata in the range", node.name)
        for number, context in list(unfinished.items()):
            ends, states = await context.states(positions[number], end, runs)
            parts[number].append((ends, states))
            positions[number] = int(ends[-1])
            first = parts[number][0][1][0]
            if not one or positions[number] >= end or (states != first).any():
                answers[number] = _descriptors(offset, parts[number], one=one)
                del unfinished[number]
        if unfinished:
            await asyncio.sleep(0)  # a long uniform range must not hold the loop
    return answers


def _descriptors(
    offset: int, parts: list[tuple[Ends, States]], *, one: bool
) -> tuple[Ends, States]:
    ends = np.concatenate([ends for ends, _ in parts])
    states = np.concatenate([states for _, states in parts])
    last = np.flatnonzero(np.append(states[1:] != states[:-1], True))
    last = last[: 1 if one else MAX_EXTENTS_PER_REPLY]
    return np.diff(ends[last], prepend=np.int64(offset)), states[last]
