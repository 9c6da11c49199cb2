"""The files that a copy goes to: raw and qcow2 images, new ones and those that are there.

1. A file that is there is touched only when all that can be known in advance has been found to be
   in order: that it is not the source, nor a file below it; that it is no image of another format
   by mistake; that nobody else uses it; that the source fits.
2. Files that were made for a copy go away again with a copy that fails.
3. An image that was made on top of a backing file gets what differs from that.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pynbd.block.chain import open_image
from pynbd.block.creation import create_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.new_file import empty, make_file, open_to_write, remove_made
from pynbd.block.node import BlockNode
from pynbd.block.probe import PROBE_LENGTH, probe_format
from pynbd.block.raw import RawNode
from pynbd.client.disk import Disk, OverlayTarget, Target, reason
from pynbd.errors import ImageError, ImageLocked, UnsupportedFeature, UsageError, WriteError

T = TypeVar("T", bound=Target)

CONNECTIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a target is opened and written.

    ``format``: "raw" or "qcow2"; a file is overwritten then whatever it looks like. Without it a
    new file is told by its name, one that is there by its first bytes. ``creation``: options of a
    new qcow2 image, as of `create_image`. ``existing``: nothing is made, a file that is there is
    written into. ``reads_zero``: the caller knows that it reads as zeroes. ``sparse`` and
    ``allocated`` are those of `Target`.
    """

    format: str | None = None
    creation: Mapping[str, Any] = field(default_factory=dict)
    existing: bool = False
    reads_zero: bool = False
    sparse: int = 4096
    allocated: bool = False
    connections: int = CONNECTIONS

    def target(self, node: BlockNode, kind: type[T], *, block: int = 1, blank: bool = False) -> T:
        """``node`` as a target. ``blank``: it is new, and reads as zeroes."""
        return kind(
            node,
            block=block,
            reads_zero=blank or self.reads_zero,
            sparse=self.sparse,
            allocated=self.allocated,
        )


@asynccontextmanager
async def file_target(
    path: str, source: Disk, how: Writing, *, whole: bool
) -> AsyncIterator[Target]:
    """A regular file, which may have to be made, or a block device.

    ``whole``: all of the source is copied, so that an image may begin anew.
    """
    data_file = how.creation.get("data_file")
    names = [path] if data_file is None else [path, data_file]
    for name in names:
        _refuse_source(name, source)
    anew = whole and not how.existing
    if not anew:
        _check_exists(path, _MISSING[whole])
    with _made(names if anew else []) as made:
        is_new = path in made
        format_name = how.format or (_named_format(path) if is_new else None)
        opened: AbstractAsyncContextManager[Target]
        if format_name is None:
            opened = _guessed_target(path, source, how, anew=anew)
        elif format_name == "raw":
            opened = _raw_target(path, source, how, anew=anew)
        else:
            opened = (_new_qcow2_target if anew else _qcow2_target)(path, source, how)
        async with opened as target:
            target.is_new = is_new
            yield target


def _check_exists(path: str, otherwise: str) -> None:
    if not os.path.exists(path):
        raise ImageError(f"{path}: it does not exist; {otherwise}")


_MISSING = {
    False: "what is dirty belongs onto an earlier copy",
    True: "-n is for a target that is there",
}


@contextmanager
def _made(names: list[str]) -> Iterator[list[str]]:
    """Make files; which of them were not there. They go away again with what fails."""
    made = {}
    try:
        for name in names:
            known_by = make_file(name)
            if known_by is not None:
                made[name] = known_by
        yield list(made)
    except BaseException:
        for name, known_by in made.items():
            remove_made(name, known_by)
        raise


def _named_format(path: str) -> str:
    return "qcow2" if path.endswith(".qcow2") else "raw"


@asynccontextmanager
async def _guessed_target(
    path: str, source: Disk, how: Writing, *, anew: bool
) -> AsyncIterator[Target]:
    """A file that is there, by what it looks like."""
    with closing(Engine()) as engine, closing(open_to_write(engine, path)) as file:
        looks_like = probe_format(await file.read_bytes(PROBE_LENGTH, 0))
        if looks_like == "raw":
            yield await _raw(file, source, how, anew=anew)
            return
    if anew or looks_like != "qcow2":
        raise UnsupportedFeature(f"{path}: it looks like {looks_like}; {_WAYS_OUT[anew]}")
    async with _qcow2_target(path, source, how) as target:
        yield target


_WAYS_OUT = {
    False: "what is written is raw and qcow2 (-O raw takes it as raw)",
    True: "-O raw or -O qcow2 makes it a new image of that format, -n writes into a qcow2 image",
}


@asynccontextmanager
async def _raw_target(
    path: str, source: Disk, how: Writing, *, anew: bool
) -> AsyncIterator[Target]:
    with closing(Engine()) as engine, closing(open_to_write(engine, path)) as file:
        yield await _raw(file, source, how, anew=anew)


async def _raw(file: HostFile, source: Disk, how: Writing, *, anew: bool) -> Target:
    blank = anew and not file.is_device
    if blank:
        await empty(file, source.size)
    else:
        exact = not (file.is_device or how.existing)
        check_size(file.path, file.size(), source, exact=exact)
    return how.target(RawNode(file, read_only=False), Target, blank=blank)


@asynccontextmanager
async def _new_qcow2_target(path: str, source: Disk, how: Writing) -> AsyncIterator[Target]:
    new = await create_image(path, size=source.size, **how.creation)
    async with _writable(path) as node:
        target = how.target(node, Target, blank=True)
        if new.backing_file is not None:
            target = overlay = how.target(node, OverlayTarget)
            overlay.granule = new.granule
            await overlay.zero(source.size, node.size - source.size)
        target.size = source.size  # the rest of the last sector is zeroes
        yield target


@asynccontextmanager
async def _qcow2_target(path: str, source: Disk, how: Writing) -> AsyncIterator[Target]:
    async with _writable(path) as node:
        check_size(path, node.size, source, exact=False)
        yield how.target(node, Target)


@asynccontextmanager
async def _writable(path: str) -> AsyncIterator[BlockNode]:
    """The qcow2 image ``path``; what is amiss when it is finished is told, unless more is."""
    node = await _locked(path)
    try:
        yield node
    except BaseException:
        with suppress(OSError):
            await node.close()
        raise
    try:
        await node.close()
    except OSError as error:
        raise WriteError(f"{path}: {reason(error)}") from error


async def _locked(path: str) -> BlockNode:
    try:
        image = {"driver": "qcow2", "file.filename": path}
        return await open_image(image, read_only=False)
    except ImageLocked:
        raise ImageLocked(f"{path}: another process uses it") from None


def _refuse_source(path: str, source: Disk) -> None:
    """Raise `UsageError` for what is, under whatever name, a file of the source."""
    try:
        target = _identities(os.stat(path))
    except OSError:
        return  # it is not there yet
    for node in source.node.chain():
        for file in node.files():
            if _identities(os.fstat(file.fd)) & target:
                role = "" if node is source.node else "a part of "
                raise UsageError(f"DST: {path} is {role}the source")


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


def check_size(name: str, size: int, source: Disk, *, exact: bool) -> None:
    """Raise `ImageError` unless the source fits, or with ``exact`` fills it."""
    if size < source.size or (exact and size > source.size):
        hint = f" (if it is raw, truncate -s {source.size} changes that)" if exact else ""
        raise ImageError(f"{name}: it has {size} bytes, and the source has {source.size}{hint}")
