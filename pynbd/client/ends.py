"""The ends of a copy or a comparison: images and NBD URIs become `Disk`s.

A target is not touched before all that can be known in advance has been found to be in order: that
it is not the source, nor a file below it; that it is no image of another format by mistake; that
nobody else uses it; that the source fits. A file that was made for a copy goes away again with a
copy that fails; of one that was there before it is told that it is incomplete.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass

from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.file import open_host_file
from pynbd.block.node import BlockNode
from pynbd.block.probe import PROBE_LENGTH, probe_format
from pynbd.block.raw import RawNode
from pynbd.client.disk import Disk, Target
from pynbd.client.node import NbdNode
from pynbd.errors import DiskError, ImageError, ImageLocked, UnsupportedFeature, UsageError
from pynbd.protocol.metadata import BASE_ALLOCATION, QEMU_DIRTY_BITMAP
from pynbd.protocol.uri import NbdUri, is_uri

log = logging.getLogger("pynbd")

CONNECTIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How an end that is read is opened: an image as by `open_image`, a URI with so many
    ``connections`` if its server allows it, and the context of ``bitmap``.
    """

    format: str | None = None
    snapshot: str | None = None
    force_share: bool = False
    probe_backing: bool = False
    bitmap: str | None = None
    connections: int = CONNECTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a target is opened and written.

    ``any_format``: a file is overwritten whatever it looks like. ``reads_zero``: the caller knows
    that it reads as zeroes. ``sparse`` and ``allocated`` are those of `Target`.
    """

    any_format: bool = False
    reads_zero: bool = False
    sparse: int = 4096
    allocated: bool = False
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
        )
    async with node:
        yield Disk(node)


@asynccontextmanager
async def open_target(
    name: str, source: Disk, how: Writing, *, whole: bool = True
) -> AsyncIterator[Target]:
    """Where ``source`` is copied to: a URI, a block device, a raw file, or the name of a new one.

    ``whole``: all of the source is copied, so that a file may be made, or begin anew. Raises
    `PynbdError` or ``OSError``.
    """
    made = None if is_uri(name) else _made(name, whole=whole)
    is_new = made is not None
    opened = (
        _remote_target(name, source, how)
        if is_uri(name)
        else _file_target(name, source, how, is_new=is_new, whole=whole)
    )
    try:
        async with opened as target:
            target.is_new = is_new
            if target.size > source.size:
                rest = target.size - source.size
                log.warning("%s: it is larger; its last %d bytes are left as they are", name, rest)
            yield target
    except BaseException as error:
        if made:
            with suppress(FileNotFoundError):
                if _identities(os.stat(name)) == made:
                    os.unlink(name)
        elif isinstance(error, DiskError):
            raise type(error)(f"{error}; {name} is incomplete now") from error
        raise


@asynccontextmanager
async def _remote_target(uri: str, source: Disk, how: Writing) -> AsyncIterator[Target]:
    if isinstance(source.node, NbdNode) and NbdUri.parse(uri) == NbdUri.parse(source.name):
        raise UsageError(f"DST: {uri} is the source")
    async with await NbdNode.open(
        uri, connections=how.connections, contexts=(), read_only=False
    ) as node:
        _check_size(node.name, node.size, source, exact=False)
        reachable = node.size // node.block * node.block
        if source.size > reachable:
            raise ImageError(
                f"{node.name}: it takes blocks of {node.block} bytes: its last"
                f" {node.size - reachable} cannot be written"
            )
        yield _target(node, how, block=node.block)


def _target(node: BlockNode, how: Writing, *, block: int = 1, blank: bool = False) -> Target:
    return Target(
        node,
        block=block,
        reads_zero=blank or how.reads_zero,
        sparse=how.sparse,
        allocated=how.allocated,
    )


@asynccontextmanager
async def _file_target(
    path: str, source: Disk, how: Writing, *, is_new: bool, whole: bool
) -> AsyncIterator[Target]:
    """A regular file or a block device."""
    with closing(Engine()) as engine, closing(_open(engine, path, source)) as file:
        if not is_new and not how.any_format:
            await _refuse_format(file)
        blank = whole and not file.is_device
        if blank:
            try:
                await file.empty(source.size)
            except OSError as error:
                reason = f"it cannot have {source.size} bytes: {error.strerror}"
                raise ImageError(f"{path}: {reason}") from None
        else:
            _check_size(path, file.size(), source, exact=not file.is_device)
        yield _target(RawNode(file, read_only=False), how, blank=blank)


def _made(path: str, *, whole: bool) -> set[tuple[int, int]] | None:
    """Make the file, unless it is there; what it is known by."""
    if os.path.exists(path):
        return None
    if not whole:
        raise ImageError(f"{path}: it does not exist; what is dirty belongs onto an earlier copy")
    try:
        with open(path, "xb") as file:
            return _identities(os.fstat(file.fileno()))
    except FileExistsError:
        raise ImageError(f"{path}: it is a symbolic link that leads nowhere") from None
    except OSError as error:
        raise ImageError(f"{path}: it cannot be made: {error.strerror}") from None


def _open(engine: Engine, path: str, source: Disk) -> HostFile:
    """Open and lock a file that is not part of the source."""
    target = _identities(os.stat(path))
    for node in source.node.chain():
        for file in node.files():
            if _identities(os.fstat(file.fd)) & target:
                role = "" if node is source.node else "a part of "
                raise UsageError(f"DST: {path} is {role}the source")
    if not os.access(path, os.W_OK):
        raise ImageError(f"{path}: it may not be written")
    try:
        return open_host_file(engine, path, writable=True)
    except ImageLocked:
        raise ImageLocked(f"{path}: another process uses it") from None


def _identities(status: os.stat_result) -> set[tuple[int, int]]:
    """What two names of one file, or two nodes of one device, have in common; and what a loop
    device, or a partition of one, has in common with the file behind it.
    """
    if not stat.S_ISBLK(status.st_mode):
        return {(status.st_dev, status.st_ino)}
    identities = {(status.st_rdev, 0)}
    device = f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    for folder in device, f"{device}/..":
        with suppress(OSError), open(f"{folder}/loop/backing_file", "rb") as behind:
            identities |= _identities(os.stat(behind.read().rstrip(b"\n")))
    return identities


async def _refuse_format(file: HostFile) -> None:
    looks_like = probe_format(await file.read_bytes(PROBE_LENGTH, 0))
    if looks_like != "raw":
        raise UnsupportedFeature(
            f"{file.path}: it looks like {looks_like}, which is not written yet; as a target it"
            " would become raw (-O raw does that)"
        )


def _check_size(name: str, size: int, source: Disk, *, exact: bool) -> None:
    if size < source.size or (exact and size > source.size):
        hint = f" (if it is raw, truncate -s {source.size} changes that)" if exact else ""
        raise ImageError(f"{name}: it has {size} bytes, and the source has {source.size}{hint}")
