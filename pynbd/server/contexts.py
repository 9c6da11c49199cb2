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
   an answer, unless the client wants one extent only (REQ_ONE): that one is followed to its end,
   and nothing of it is kept but how far it reaches.
4. Damaged metadata anywhere in the answer fails the request: nobody may take a guess for a map.
   An only extent that ends before them says nothing of them.
5. The contexts of a reply share its extents, and each has a turn of the loop.
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, ZERO, Runs
from pynbd.block.node import BlockNode
from pynbd.protocol.metadata import BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP
from pynbd.protocol.values import State

# Of all contexts together; QEMU gives so many of each (NBD_MAX_BLOCK_STATUS_EXTENTS). What a
# context leaves over is for those after it.
MAX_EXTENTS_PER_REPLY = 1 << 17

Ends = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.int64]
States = npt.NDArray[np.integer[Any]]  # as narrow as they come

_STATE_OF_KIND = np.zeros(CORRUPT, np.uint8)
_STATE_OF_KIND[DATA] = _STATE_OF_KIND[COMPRESSED] = 0
_STATE_OF_KIND[ZERO] = State.HOLE | State.ZERO
_STATE_OF_KIND[ZERO | DATA] = State.ZERO


class Context(ABC):
    """One metadata context of one export."""

    needs_map = True
    needs_zero = False

    @abstractmethod
    async def states(
        self, offset: int, end: int, runs: Runs | None, limit: int
    ) -> tuple[Ends, States]:
        """Ends (exclusive) and status of consecutive extents of guest bytes [offset, end).

        ``runs`` is the map of the same range, if the context needs one. The answer may be shorter;
        beyond the first ``limit`` extents nobody looks.
        """


class AllocationContext(Context):
    """base:allocation."""

    needs_zero = True

    async def states(
        self, offset: int, end: int, runs: Runs | None, limit: int
    ) -> tuple[Ends, States]:
        assert runs is not None
        return runs.ends, _STATE_OF_KIND[runs.kind]


class DepthContext(Context):
    """qemu:allocation-depth."""

    async def states(
        self, offset: int, end: int, runs: Runs | None, limit: int
    ) -> tuple[Ends, States]:
        assert runs is not None
        return runs.ends, runs.depth


class BitmapContext(Context):
    """qemu:dirty-bitmap:NAME."""

    needs_map = False

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self.bitmap = bitmap

    async def states(
        self, offset: int, end: int, runs: Runs | None, limit: int
    ) -> tuple[Ends, States]:
        runs_of_bitmap = await self.bitmap.runs(offset, end - offset, limit)
        return runs_of_bitmap.ends, runs_of_bitmap.dirty


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
) -> dict[int, tuple[Lengths, States]]:
    """Lengths in bytes and status of the extents from ``offset``, for each context by its id.

    ``one``: only the first extent of each. Raises ``OSError`` EIO where metadata cannot be read.
    """
    end = offset + length
    if one:
        return await _first_extents(node, contexts, offset, end)
    runs = await _map(node, contexts.values(), offset, end, one=False)
    answers: dict[int, tuple[Lengths, States]] = {}
    left = MAX_EXTENTS_PER_REPLY
    for number, context in contexts.items():
        if answers:
            await asyncio.sleep(0)
        limit = max(left // (len(contexts) - len(answers)), 1)
        ends, states = await context.states(offset, end, runs, limit)
        differs = states[1:] != states[:-1]
        if not differs.all():
            last = np.flatnonzero(np.append(differs, True))
            ends, states = ends[last], states[last]
        ends, states = ends[:limit], states[:limit]
        answers[number] = _lengths(offset, ends), states
        left -= len(ends)
    return answers


def _lengths(offset: int, ends: Ends) -> Lengths:
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] -= offset
    return lengths


async def _first_extents(
    node: BlockNode, contexts: Mapping[int, Context], offset: int, end: int
) -> dict[int, tuple[Lengths, States]]:
    """The first extent of each context, followed to its end."""
    found: dict[int, tuple[int, int]] = {}  # its status, and where it ends as far as is known
    following = dict(contexts)
    mapped = offset  # those that need the map have come equally far
    while following:
        runs = await _map(node, following.values(), mapped, end, one=True)
        if runs is not None:
            mapped = runs.end
        for number, context in list(following.items()):
            state, reached = found.get(number, (None, offset))
            ends, states = await context.states(reached, end, runs, 2)
            state = int(states[0]) if state is None else state
            alike = int(np.argmin(np.append(states == state, False)))
            if alike:
                reached = int(ends[alike - 1])
            found[number] = state, reached
            if alike < len(states) or reached == end:
                del following[number]
            if following:
                await asyncio.sleep(0)  # a long uniform range must not hold the loop
    return {
        number: (np.array([reached - offset], np.int64), np.array([state], np.int64))
        for number, (state, reached) in found.items()
    }


async def _map(
    node: BlockNode, contexts: Collection[Context], offset: int, end: int, *, one: bool
) -> Runs | None:
    """The map that those of ``contexts`` need which need one; if ``one``, up to the damage."""
    if not any(context.needs_map for context in contexts):
        return None
    want_zero = any(context.needs_zero for context in contexts)
    runs = await node.map(offset, end - offset, want_zero=want_zero)
    damaged = runs.kind == CORRUPT
    if not damaged.any():
        return runs
    start = int(runs.starts[np.argmax(damaged)])
    if one and start > offset:
        return runs.clip(start)
    raise OSError(errno.EIO, "corrupt metadata in the range", node.name)
