"""A throw-away overlay (``-s/--snapshot``): everybody may write, and nothing reaches the image.

As in QEMU: a temporary qcow2 image is put on top of the image, which is only read. Its file has no
name from the moment it is open, so that it is gone with the process, however that ends; flushing it
succeeds and does nothing, as nobody will ever read it again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.create import NewImage, create
from pynbd.block.slice import SliceNode
from pynbd.errors import ImageError, PynbdError


async def open_with_overlay(
    image: str | os.PathLike[str] | Mapping[str, object],
    *,
    engine: Engine | None = None,
    **options: Any,
) -> BlockNode:
    """Open ``image`` for reading, with ``options`` as `open_image` takes them, and an overlay on
    top of it, for writing; close both with `BlockNode.close`.

    The overlay is in the directory that TMPDIR names; in /var/tmp, if that is /tmp or none. Raises
    what `open_image` raises, and `ImageError` if the overlay cannot be made.
    """
    used = engine or Engine()
    try:
        base = await open_image(image, engine=used, **(options | {"read_only": True}))
        try:
            node = await _with_overlay(base, used)
        except BaseException:
            await base.close()
            raise
    except BaseException:
        if engine is None:
            used.close()
        raise
    if engine is None:
        node.own_engine = used
    return node


def _directory() -> str:
    """As QEMU has it: what is in /tmp may be in memory, and an overlay becomes as large as what is
    written.
    """
    chosen = tempfile.gettempdir()
    return "/var/tmp" if chosen == "/tmp" else chosen


async def _with_overlay(base: BlockNode, engine: Engine) -> BlockNode:
    # A part of an image stays a part, now of the overlay: it has no layers of its own.
    slices = []
    while isinstance(base, SliceNode):
        slices.append((base.start, base.size))
        base = base.image
    directory = _directory()
    try:
        descriptor, path = tempfile.mkstemp(prefix="pynbd-", suffix=".qcow2", dir=directory)
    except OSError as error:
        problem = f"no temporary overlay can be made there: {error.strerror}"
        raise ImageError(f"{directory}: {problem}") from None
    try:
        os.close(descriptor)
        await create(path, NewImage(size=base.size), engine=engine, cache=Cache.UNSAFE.mode)
        alone = {"driver": "qcow2", "file.filename": path, "backing": None}
        node = await open_image(alone, read_only=False, engine=engine, cache=Cache.UNSAFE)
    except (OSError, PynbdError) as error:
        raise ImageError(f"{directory}: no temporary overlay can be made there: {error}") from None
    finally:
        os.unlink(path)
    node.name, node.backing = base.name, base
    node.size = base.size  # it ends in the middle of a sector where the image does
    for start, size in reversed(slices):
        node = SliceNode(node, start, size)
    return node
