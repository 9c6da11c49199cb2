"""Opening an image with everything below it: backing chain, data files, formats, locks.

What an image says about other files is not trusted: a backing file or data file is a plain file
name, whose format the overlay records; anything else is refused with one line that names the file,
the reason and a way out. Layers below the top are opened for reading only.
"""

from __future__ import annotations

import os
import re

from pynbd.block.engine import Engine, HostFile
from pynbd.block.file import open_host_file
from pynbd.block.node import BlockNode
from pynbd.block.probe import PROBE_LENGTH, probe_format
from pynbd.block.qcow2.image import Qcow2Node, read_header
from pynbd.block.raw import RawNode
from pynbd.errors import CorruptImage, ImageError, UnsupportedFeature

MAX_LAYERS = 200
FORMATS = ("raw", "qcow2")

_BACKING_FILE = "backing file"
_DATA_FILE = "data file"

# "nbd:", "json:", "ssh://": a colon before any slash (path_has_protocol of QEMU).
_PROTOCOL = re.compile(r"[^:/]*:")


async def open_image(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 (the word of the command lines)
    read_only: bool = True,
    snapshot: str | None = None,
    probe_backing: bool = False,
    force_share: bool = False,
    engine: Engine | None = None,
) -> BlockNode:
    """Open an image and the chain below it; close it with `BlockNode.close`.

    ``format``: "raw" or "qcow2"; without it the first bytes tell. ``snapshot``: an internal
    snapshot in place of the active layer, by name or ID. ``probe_backing``: guess the formats of
    backing files that the overlays do not record. ``force_share``: read images that others may be
    writing. ``engine``: shared with others; without it the image gets one of its own.

    Raises `ImageError`; nothing is open then.
    """
    opening = _Opening(engine or Engine(), probe_backing=probe_backing, force_share=force_share)
    try:
        if not read_only:
            await _refuse_writing(opening.engine, os.fspath(path), format)
        top = await opening.chain(os.fspath(path), format, read_only=read_only, snapshot=snapshot)
    except BaseException:
        for file in opening.files:
            file.close()
        if engine is None:
            opening.engine.close()
        raise
    if engine is None:
        top.own_engine = opening.engine
    return top


class _Opening:
    """A chain while it is being opened: its files so far."""

    def __init__(self, engine: Engine, *, probe_backing: bool, force_share: bool) -> None:
        self.engine = engine
        self.files: list[HostFile] = []
        self._probe_backing = probe_backing
        self._force_share = force_share

    async def chain(
        self, path: str, format_name: str | None, *, read_only: bool, snapshot: str | None
    ) -> BlockNode:
        """The top node, with those below it attached."""
        file = self._open(path, writable=not read_only)
        top = node = await self._node(file, format_name, read_only=read_only, snapshot=snapshot)
        for _ in range(MAX_LAYERS):
            if not isinstance(node, Qcow2Node) or node.header.backing_file is None:
                return top
            node.backing = node = await self._backing(node, node.header.backing_file)
        raise ImageError(f"{path}: its backing chain has more than {MAX_LAYERS} layers")

    async def _backing(self, overlay: Qcow2Node, name: str) -> BlockNode:
        path = _named_path(overlay.name, name, _BACKING_FILE)
        format_name = overlay.header.backing_format
        if format_name is None and not self._probe_backing:
            raise ImageError(
                f"{overlay.name}: the format of its backing file {name!r} is not recorded,"
                " and guessing is not safe (--probe-backing guesses, qemu-img rebase -u -F FORMAT"
                " records it)"
            )
        try:
            return await self._node(self._open(path), format_name)
        except ImageError as error:
            raise type(error)(f"{error} ({_BACKING_FILE} of {overlay.name})") from None

    async def _node(
        self,
        file: HostFile,
        format_name: str | None,
        *,
        read_only: bool = True,
        snapshot: str | None = None,
    ) -> BlockNode:
        """One layer, without what is below it; ``format_name`` None is guessed."""
        path = file.path
        looks_like = await _probe(file)
        chosen = format_name or looks_like
        if chosen not in FORMATS:
            hint = "" if format_name else "; -f raw takes it as it is"
            raise UnsupportedFeature(
                f"{path}: its format is {chosen}; raw and qcow2 are supported{hint}"
            )
        if chosen == "raw":
            if snapshot is not None:
                raise ImageError(f"{path}: it is raw, and has no internal snapshots")
            guard = probe_format if format_name is None and not read_only else None
            return RawNode(file, read_only=read_only, guard=guard)
        if looks_like != "qcow2":
            raise ImageError(f"{path}: it is not a qcow2 image; it looks like {looks_like}")
        header = await read_header(file)
        data_file = None
        if header.has_data_file:
            if header.data_file is None:
                raise ImageError(f"{path}: it needs an external data file, and does not name it")
            data_path = _named_path(path, header.data_file, _DATA_FILE)
            try:
                data_file = self._open(data_path)
            except ImageError as error:
                raise type(error)(f"{error} ({_DATA_FILE} of {path})") from None
        return await Qcow2Node.open(file, header, data_file=data_file, snapshot=snapshot)

    def _open(self, path: str, *, writable: bool = False) -> HostFile:
        """Open a file of the chain."""
        file = open_host_file(self.engine, path, writable=writable, force_share=self._force_share)
        self.files.append(file)
        for other in self.files[:-1]:
            if other.identity == file.identity:
                raise ImageError(f"{path}: it is in the chain already, as {other.path}: a loop")
        return file


def _named_path(image: str, name: str, role: str) -> str:
    """The path of the file that ``image`` names as its backing file or data file."""
    if _PROTOCOL.match(name):
        raise UnsupportedFeature(f"{image}: its {role} {name!r} is not a plain file name")
    if not name or "\0" in name:
        raise CorruptImage(f"{image}: its {role} {name!r} cannot be a file name")
    if role == _DATA_FILE and os.path.exists(name):
        return name  # QEMU takes data files from the current directory, unlike backing files
    return os.path.join(os.path.dirname(image), name)


async def _probe(file: HostFile) -> str:
    return probe_format(await file.read_bytes(PROBE_LENGTH, 0))


async def _refuse_writing(engine: Engine, path: str, format_name: str | None) -> None:
    """Told before the image is locked: the caller may want to read it, as others do."""
    if format_name is None:
        try:
            file = HostFile.open(engine, path, writable=False)
        except OSError as error:
            raise ImageError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            format_name = await _probe(file)
        finally:
            file.close()
    if format_name == "qcow2":
        raise UnsupportedFeature(
            f"{path}: qcow2 images are not written yet; -r serves it read-only"
        )
