"""What is offered of an image: its metadata contexts, and which of its bitmaps are among them.

A bitmap that is named may be one of a backing file; nobody is given such a one unasked, because it
knows nothing of the writes above it. One that is inconsistent is never offered, nor is one whose
name no client can be told: qcow2 allows any bytes there, NBD does not ("String values").
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from itertools import repeat

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.node import BlockNode
from pynbd.errors import ImageError, UsageError
from pynbd.protocol.strings import check_string
from pynbd.server.contexts import Context, standard_contexts
from pynbd.server.disk import DiskNode

log = logging.getLogger("pynbd")

# A client that asks for everything asks for all of these in each reply.
MAX_UNASKED_BITMAPS = 64


def offered_contexts(
    node: BlockNode, *, depth: bool | None = None, bitmaps: Sequence[str] | None = None
) -> dict[str, Context]:
    """The contexts of an export of ``node``, by name.

    ``base:allocation`` always; beside it exactly what is asked for, qemu:allocation-depth with
    ``depth`` and the ``bitmaps`` named, which are looked for from the top of the chain down. Where
    nothing is said about either (both None): depth, and the consistent bitmaps of the active layer.
    A `Disk` has its own. Raises `ImageError` for a bitmap that is not there or cannot be used.
    """
    if isinstance(node, DiskNode):
        if depth or bitmaps:
            raise UsageError("depth and bitmaps are those of an image, not of a disk in Python")
        return node.contexts
    if depth is None and bitmaps is None:
        return standard_contexts(depth=True, bitmaps=_unasked_bitmaps(node))
    named = [_find_bitmap(node, name) for name in dict.fromkeys(bitmaps or ())]
    return standard_contexts(depth=bool(depth), bitmaps=named)


def _unasked_bitmaps(node: BlockNode) -> Sequence[DirtyBitmap]:
    if torn := node.inconsistent_bitmaps():
        log.warning("%s: inconsistent bitmaps are not offered: %s", node.name, _listed(torn))
    there = [bitmap for bitmap in node.bitmaps() if _can_be_told(node, bitmap)]
    if len(there) > MAX_UNASKED_BITMAPS:
        log.warning(
            "%s: %d of its %d bitmaps are offered; naming some offers those",
            node.name,
            MAX_UNASKED_BITMAPS,
            len(there),
        )
    return there[:MAX_UNASKED_BITMAPS]


def _can_be_told(node: BlockNode, bitmap: DirtyBitmap) -> bool:
    try:
        check_string(f"{node.name}: bitmap {bitmap.name!r} is not offered", bitmap.name)
    except UsageError as error:
        log.warning("%s", error)
        return False
    return True


def _find_bitmap(top: BlockNode, name: str) -> DirtyBitmap:
    for depth, node in enumerate(top.bitmap_layers()):
        for bitmap in node.bitmaps():
            if bitmap.name == name:
                _check_name(node, name)
                if depth:
                    log.warning(
                        "bitmap %r is of the backing file %s: it knows nothing of writes above it",
                        name,
                        node.name,
                    )
                return bitmap
        if name in node.inconsistent_bitmaps():
            raise ImageError(
                f"{node.name}: bitmap {name!r} is in use, or was when its last writer ended: nobody"
                " knows what is dirty"
            )
    raise ImageError(f"{top.name}: no bitmap {name!r}; {_known_bitmaps(top)}")


def _check_name(node: BlockNode, name: str) -> None:
    try:
        check_string(f"{node.name}: bitmap {name!r} cannot be offered", name)
    except UsageError as error:
        raise ImageError(str(error)) from None


def _known_bitmaps(top: BlockNode) -> str:
    known: dict[str, str] = {}
    for depth, node in enumerate(top.bitmap_layers()):
        where = f" (in {os.path.basename(node.name)})" if depth else ""
        for bitmap in node.bitmaps():
            known.setdefault(bitmap.name, where)
    if not known:
        return "there is none"
    verb = "is" if len(known) == 1 else "are"
    return f"there {verb} {_listed(known, known.values())}"


def _listed(names: Collection[str], where: Iterable[str] = repeat("")) -> str:
    """Names in quotes, each with ``where`` it is; the first ones, if there are very many."""
    shown = [f"{name!r}{place}" for name, place in zip(names, where, strict=False)]
    more = len(shown) - MAX_UNASKED_BITMAPS
    rest = [f"{more} more"] if more > 0 else []
    return ", ".join(shown[:MAX_UNASKED_BITMAPS] + rest)
