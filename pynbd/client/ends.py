"""The ends of a copy or a comparison: images and NBD URIs become `Disk`s.

A target is not touched before all that can be known in advance has been found to be in order; of
one that was there before it is told that it is incomplete when a copy has failed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pynbd.block.chain import open_image
from pynbd.block.limits import ImageLimits
from pynbd.block.node import BlockNode
from pynbd.client.disk import Disk, Target
from pynbd.client.file_target import CONNECTIONS, Writing, check_size, file_target
from pynbd.client.node import NbdNode
from pynbd.errors import DiskError, ImageError, UsageError
from pynbd.protocol.metadata import BASE_ALLOCATION, QEMU_DIRTY_BITMAP
from pynbd.protocol.uri import NbdUri, is_uri

__all__ = ["CONNECTIONS", "Reading", "Writing", "open_disk", "open_target"]

log = logging.getLogger("pynbd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How an end that is read is opened: an image as by `open_image`, a URI with so many
    ``connections`` if its server allows it, and the context of ``bitmap``.
    """

    format: str | None = None
    snapshot: str | None = None
    force_share: bool = False
    probe_backing: bool = False
    untrusted: bool = False
    limits: ImageLimits | None = None
    bitmap: str | None = None
    connections: int = CONNECTIONS


@asynccontextmanager
async def open_disk(name: str, how: Reading) -> AsyncIterator[Disk]:
    """An image or a URI, to be read. Raises `PynbdError` or ``OSError``."""
    if is_uri(name):
        bitmap = [QEMU_DIRTY_BITMAP + how.bitmap] if how.bitmap is not None else []
        node: BlockNode = await NbdNode.open(
            name, connections=how.connections, contexts=[BASE_ALLOCATION, *bitmap]
        )
    else:
        node = await open_image(
            name,
            format=how.format,
            snapshot=how.snapshot,
            force_share=how.force_share,
            probe_backing=how.probe_backing,
            untrusted=how.untrusted,
            limits=how.limits,
        )
    async with node:
        yield Disk(node)


@asynccontextmanager
async def open_target(
    name: str, source: Disk, how: Writing, *, whole: bool = True
) -> AsyncIterator[Target]:
    """Where ``source`` is copied to: a URI, a block device, an image, or the name of a new one.

    ``whole``: all of the source is copied, so that a file may be made, or begin anew. Raises
    `PynbdError` or ``OSError``.
    """
    opened = (
        _remote_target(name, source, how)
        if is_uri(name)
        else file_target(name, source, how, whole=whole)
    )
    is_new = False
    try:
        async with opened as target:
            is_new = target.is_new
            if target.size > source.size and not target.reads_zero:
                rest = target.size - source.size
                log.warning("%s: it is larger; its last %d bytes are left as they are", name, rest)
            yield target
    except DiskError as error:
        if is_new:
            raise
        raise type(error)(f"{error}; {name} is incomplete now") from error


@asynccontextmanager
async def _remote_target(uri: str, source: Disk, how: Writing) -> AsyncIterator[Target]:
    if isinstance(source.node, NbdNode) and NbdUri.parse(uri) == NbdUri.parse(source.name):
        raise UsageError(f"DST: {uri} is the source")
    async with await NbdNode.open(
        uri, connections=how.connections, contexts=(), read_only=False
    ) as node:
        check_size(node.name, node.size, source, exact=False)
        reachable = node.size // node.block * node.block
        if source.size > reachable:
            raise ImageError(
                f"{node.name}: it takes blocks of {node.block} bytes: its last"
                f" {node.size - reachable} cannot be written"
            )
        yield how.target(node, Target, block=node.block)
