"""Opening an image with everything below it: backing chain, data files, formats, locks.

What an image says about other files is not trusted: a backing file or data file is a plain file
name, whose format the overlay records; anything else is refused with one line that names the file,
the reason and a way out. What the user says is: by options, or a name ``json:{...}``. Layers below
the top are opened for reading only. Of an image from a stranger all files are beside it
(`pynbd.block.confinement`), and no format is guessed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from pynbd.block.cache_modes import Cache
from pynbd.block.confinement import Confinement
from pynbd.block.engine import Engine, HostFile
from pynbd.block.file import open_host_file
from pynbd.block.image_options import JSON_PREFIX, nested, parse_json_name
from pynbd.block.limits import ChainMemory, ImageLimits, limits_or_usual, raised_by
from pynbd.block.node import BlockNode
from pynbd.block.node_options import FileOptions, ImageOptions, image_options
from pynbd.block.probe import PROBE_LENGTH, probe_format
from pynbd.block.qcow2.image import Qcow2Node, read_header
from pynbd.block.raw import RawNode
from pynbd.block.slice import SliceNode
from pynbd.block.window import WindowFile
from pynbd.errors import CorruptImage, ImageError, UnsupportedFeature, UsageError

FORMATS = ("raw", "qcow2")

_BACKING_FILE = "backing file"
_DATA_FILE = "data file"

# "nbd:", "json:", "ssh://": a colon before any slash (path_has_protocol of QEMU).
_PROTOCOL = re.compile(r"[^:/]*:")


async def open_image(
    image: str | os.PathLike[str] | Mapping[str, object],
    *,
    format: str | None = None,  # noqa: A002 (the word of the command lines)
    read_only: bool = True,
    snapshot: str | None = None,
    probe_backing: bool = False,
    force_share: bool = False,
    engine: Engine | None = None,
    offset: int = 0,
    whole_sectors: bool = False,
    cache: Cache = Cache.WRITEBACK,
    untrusted: bool = False,
    limits: ImageLimits | None = None,
) -> BlockNode:
    """Open an image and the chain below it; close it with `BlockNode.close`.

    ``image``: a file name; ``json:{...}``, a string; or the options of a node, nested or with
    dotted names (see `pynbd.block.node_options`).
    ``format``: "raw" or "qcow2"; without it the first bytes tell. ``snapshot``: an internal
    snapshot in place of the active layer, by name or ID. ``probe_backing``: guess the formats of
    backing files that the overlays do not record. ``force_share``: read images that others may be
    writing. ``engine``: shared with others; without it the image gets one of its own.
    ``offset``: the disk begins at this byte of the image. ``whole_sectors``: a raw image that ends
    in the middle of a sector of 512 bytes is a disk that ends with the sector, as in QEMU.
    ``cache``: how its files are cached, unless the options of a node say it. ``untrusted``: the
    image is from a stranger. Its files are regular ones in its directory, or it is refused; its
    format has to be given, by ``format`` or the options of the node, and those of backing files
    have to be recorded; and it is not written if a check finds damage. ``limits``: of its memory,
    if not the usual ones.

    Raises `ImageError`, or `UsageError` for a name that is not JSON and for arguments that exclude
    each other; nothing is open then.
    """
    memory = ChainMemory(limits_or_usual(ImageLimits, limits, "limits"))
    if untrusted:
        check_untrusted(image, format, probe_backing=probe_backing)
    options = _options(image, cache, force_share=force_share)
    if format is not None:
        options = replace(options, driver=format)
    if not read_only:
        options.refuse_writing()
    opening = _Opening(
        engine or Engine(),
        probe_backing=probe_backing,
        whole_sectors=whole_sectors,
        confinement=Confinement() if untrusted else None,
        memory=memory,
    )
    try:
        top = await opening.top(options, read_only=read_only, snapshot=snapshot)
        if offset:
            top = SliceNode(top, offset)
    except BaseException:
        for file in opening.files:
            file.close()
        if engine is None:
            opening.engine.close()
        raise
    if engine is None:
        top.own_engine = opening.engine
    for node in top.chain():
        node.resolved_bytes = opening.memory.limits.runs
    return top


def check_untrusted(image: object, format_name: str | None, *, probe_backing: bool = False) -> None:
    """Raise `UsageError` where something is left to the image, or its name."""
    if probe_backing:
        raise UsageError("untrusted excludes probe-backing: no format is guessed")
    if isinstance(image, str) and image.startswith(JSON_PREFIX):
        raise UsageError(
            "untrusted: the name of a file is expected, not json: (which a stranger may have"
            " written; Python takes a dict)"
        )
    if format_name is None and not isinstance(image, Mapping):
        raise UsageError(
            f"untrusted: the format of {image} has to be given (--format, or format= in Python):"
            " none is guessed"
        )


def _options(
    image: str | os.PathLike[str] | Mapping[str, object], cache: Cache, *, force_share: bool
) -> ImageOptions:
    if isinstance(image, str) and image.startswith(JSON_PREFIX):
        image = parse_json_name(image)
    if isinstance(image, Mapping):
        return image_options(
            nested(image, "image options"), cache=cache.mode, force_share=force_share
        )
    file = FileOptions(os.fspath(image), cache.mode, force_share)
    return ImageOptions(None, file, cache.mode, force_share)


class _Opening:
    """A chain while it is being opened: its files so far."""

    def __init__(
        self,
        engine: Engine,
        *,
        probe_backing: bool,
        whole_sectors: bool,
        confinement: Confinement | None,
        memory: ChainMemory,
    ) -> None:
        self.engine = engine
        self.files: list[HostFile] = []
        self._probe_backing = probe_backing
        self._whole_sectors = whole_sectors
        self._confinement = confinement
        self.memory = memory

    async def top(
        self, options: ImageOptions, *, read_only: bool, snapshot: str | None
    ) -> BlockNode:
        """The top node, with those below it attached."""
        inner = options.file
        if isinstance(inner, ImageOptions) and inner.driver != "raw":
            if options.driver != "raw":
                raise UnsupportedFeature("image option file: only raw can stand on an image")
            image = await self.top(inner, read_only=read_only, snapshot=snapshot)
            return SliceNode(image, options.offset, options.size)
        top = node = await self._node(options, read_only=read_only, snapshot=snapshot)
        most = self.memory.limits.layers
        for _ in range(most):
            below = self._below(node, options)
            if below is None:
                return top
            assert isinstance(node, Qcow2Node)
            node.backing = node = await self._backing(node, below)
            options = below
        raise ImageError(
            f"{top.name}: its backing chain has more than {most} layer{'s' * (most != 1)}"
            f" {raised_by('--max-layers', 'layers')}"
        )

    async def _backing(self, overlay: Qcow2Node, options: ImageOptions) -> BlockNode:
        try:
            return await self._node(options)
        except ImageError as error:
            raise type(error)(f"{error} ({_BACKING_FILE} of {overlay.name})") from None

    def _below(self, node: BlockNode, options: ImageOptions) -> ImageOptions | None:
        """What is below ``node``, whose options are ``options``."""
        if not isinstance(node, Qcow2Node) or options.no_backing:
            return None
        recorded, given = node.header.backing_file, options.backing
        if given is None:
            if recorded is None:
                return None
            given = ImageOptions(None, None, options.cache, options.force_share)
        driver = given.driver or node.header.backing_format
        if given.file is not None:
            return replace(given, driver=driver)
        if recorded is None:
            raise ImageError(f"image option backing.file: {node.name} names no backing file")
        path = _named_path(node.name, recorded, _BACKING_FILE)
        if driver is None and not self._probe_backing:
            # Without -b it would drop the backing file.
            guess = " (--probe-backing guesses; qemu-img rebase -u -F FORMAT -b FILE records it)"
            way_out = "" if self._confinement else guess
            raise ImageError(
                f"{node.name}: the format of its backing file {recorded!r} is not recorded,"
                f" and guessing is not safe{way_out}"
            )
        file = FileOptions(path, given.cache, given.force_share)
        return replace(given, driver=driver, file=file)

    async def _node(
        self, options: ImageOptions, *, read_only: bool = True, snapshot: str | None = None
    ) -> BlockNode:
        """One layer, without what is below it."""
        try:
            return await self._layer(options, read_only=read_only, snapshot=snapshot)
        except OSError as error:  # of the host, which does not know what it was done for
            where = error.filename or options.file_name
            raise ImageError(f"{where}: cannot be opened: {error.strerror}") from None
        except MemoryError:
            raise ImageError(
                f"{options.file_name}: cannot be opened: {os.strerror(errno.ENOMEM)}"
            ) from None

    async def _layer(
        self, options: ImageOptions, *, read_only: bool, snapshot: str | None
    ) -> BlockNode:
        if options.driver not in (None, *FORMATS):
            raise UnsupportedFeature(
                f"{options.file_name}: no format {options.driver!r}; raw and qcow2 are there"
            )
        if options.driver is None and self._confinement:
            raise UsageError(f"{options.file_name}: it is untrusted: its format has to be given")
        file = self._host_file(options, writable=not read_only)
        path = file.path
        looks_like = await _probe(file)
        chosen = options.driver or looks_like
        if chosen not in FORMATS:
            raise UnsupportedFeature(
                f"{path}: its format is {chosen}; raw and qcow2 are supported; -f raw takes it as"
                " it is"
            )
        if chosen == "raw":
            if snapshot is not None:
                raise ImageError(f"{path}: it is raw, and has no internal snapshots")
            if options.backing or options.data_file:
                raise ImageError(f"{path}: it is raw; backing and data-file are options of qcow2")
            guard = probe_format if options.driver is None and not read_only else None
            return RawNode(
                file,
                read_only=read_only,
                guard=guard,
                start=options.offset,
                size=options.size,
                whole_sectors=self._whole_sectors,
            )
        if options.is_window:
            raise ImageError(f"{path}: it is qcow2; offset and size are options of raw")
        if looks_like != "qcow2":
            raise ImageError(f"{path}: it is not a qcow2 image; it looks like {looks_like}")
        header = await read_header(file)
        data_file = None
        if header.has_data_file:
            data_file = self._data_file(path, header.data_file, options, writable=not read_only)
        elif options.data_file:
            raise ImageError(f"{path}: image option data-file: it has no external data file")
        return await Qcow2Node.open(
            file,
            header,
            self.memory,
            data_file=data_file,
            snapshot=snapshot,
            writable=not read_only,
            untrusted=self._confinement is not None,
        )

    def _data_file(
        self, path: str, recorded: str | None, options: ImageOptions, *, writable: bool
    ) -> HostFile:
        given = options.data_file
        if given is None:
            if recorded is None:
                raise ImageError(f"{path}: it needs an external data file, and does not name it")
            data_path = _named_path(path, recorded, _DATA_FILE)
            if self._confinement is None and os.path.exists(recorded):
                data_path = (
                    recorded  # QEMU looks in the current directory, unlike for backing files
                )
            given = FileOptions(data_path, options.cache, options.force_share)
        try:
            return self._open(given, writable=writable, twice="no file of its own")
        except ImageError as error:
            raise type(error)(f"{error} ({_DATA_FILE} of {path})") from None

    def _host_file(self, options: ImageOptions, *, writable: bool) -> HostFile:
        """The file that an image is in, or the part of one."""
        inner = options.file
        if isinstance(inner, FileOptions):
            return self._open(inner, writable=writable)
        if inner is None or inner.driver != "raw":
            raise UnsupportedFeature("image option file: of images only raw can stand here")
        file = self._host_file(inner, writable=writable)
        if not inner.is_window:
            return file
        if writable:
            raise UnsupportedFeature(f"{file.path}: an image inside a file is not written yet")
        window = WindowFile.of(file, inner.offset, inner.size)
        self.files[self.files.index(file)] = window
        return window

    def _open(
        self, options: FileOptions, *, writable: bool = False, twice: str = "a loop"
    ) -> HostFile:
        """Open a file of the chain; ``twice``: what is wrong with one that is there already."""
        path = options.filename
        if self._confinement:
            self._confinement.check_name(path)
        self._refuse_twice(path, twice)
        file = open_host_file(
            self.engine,
            path,
            writable=writable,
            force_share=options.force_share,
            locked=options.locked,
            cache=options.cache,
            opener=self._confinement.open if self._confinement else None,
        )
        self.files.append(file)
        if options.device not in (None, file.is_device):
            wanted = "host_device is for block devices" if options.device else "file is for files"
            raise ImageError(f"{path}: the driver {wanted}")
        return file

    def _refuse_twice(self, path: str, twice: str) -> None:
        """Before it is opened: the lock of the file that is written is in its own way."""
        with suppress(OSError, ValueError):  # which opening it tells
            status = os.stat(path)
            for other in self.files:
                if other.identity == (status.st_dev, status.st_ino):
                    raise ImageError(
                        f"{path}: it is in the chain already, as {other.path}: {twice}"
                    )


def _named_path(image: str, name: str, role: str) -> str:
    """The path of the file that ``image`` names as its backing file or data file."""
    if _PROTOCOL.match(name):
        raise UnsupportedFeature(f"{image}: its {role} {name!r} is not a plain file name")
    if not name or "\0" in name:
        raise CorruptImage(f"{image}: its {role} {name!r} cannot be a file name")
    return os.path.join(os.path.dirname(image), name)


async def _probe(file: HostFile) -> str:
    return probe_format(await file.read_bytes(PROBE_LENGTH, 0))
