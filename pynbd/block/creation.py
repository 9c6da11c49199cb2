"""A new image, raw or qcow2: what has to be known and allowed before anything is written.

1. A backing file is looked for where that of an overlay is, beside the new image. It has to be one
   that can be opened, with all that is below it; if no size is asked for, the new image gets its
   size. ``backing_unchecked``: it is recorded as it is named, whatever it is.
2. Neither the image nor its data file may be part of that chain.
3. A data file that is there is emptied; an image of another format than raw is not taken for one.
4. A raw image has whole sectors of 512 bytes, as QEMU has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import fields, replace
from typing import Any

from pynbd.block.chain import FORMATS, open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.new_file import Preallocation, empty, new_file, preallocate
from pynbd.block.node import BlockNode
from pynbd.block.probe import PROBE_LENGTH, probe_format
from pynbd.block.qcow2.create import NewImage, create
from pynbd.block.qcow2.format import CompressionType
from pynbd.block.window import round_up
from pynbd.errors import ImageError, UsageError

_NAMES = {field.name for field in fields(NewImage)} - {"size"}


async def create_image(
    path: str | os.PathLike[str],
    *,
    format: str = "qcow2",  # noqa: A002 (the word of the command lines)
    size: int | None = None,
    backing_unchecked: bool = False,
    **options: Any,
) -> NewImage:
    """Make the image ``path``, over whatever is there; what was made.

    ``format``: "raw" or "qcow2". ``size`` in bytes; ``options``: the other fields of `NewImage`, of
    which raw has ``preallocation`` alone, and of that not "metadata". Raises `UsageError` for what
    is not allowed, `ImageError` or ``OSError`` for what cannot be done; a file that was made goes
    away again then.
    """
    path = os.fspath(path)
    if format not in FORMATS:
        raise UsageError(f"format: {format!r} is not one of {', '.join(FORMATS)}")
    options = {name: _meant(name, value) for name, value in options.items()}
    new = NewImage(size=size or 0, **options)
    if format == "raw":
        _check_raw(options)
    new.check()
    if new.data_file is not None and _same_name(path, new.data_file):
        raise UsageError(f"data_file: {new.data_file} is the new image")
    engine = Engine()
    async with AsyncExitStack() as stack:
        stack.callback(engine.close)
        if new.backing_file is not None:
            below = os.path.join(os.path.dirname(path), new.backing_file)
            if backing_unchecked:
                _refuse_part(path, [_identity(below)], new.backing_file)
            else:
                backing = await _open_backing(below, new, engine)
                await stack.enter_async_context(backing)
                size = backing.size if size is None else size
                parts = [file.identity for node in backing.chain() for file in node.files()]
                for name in filter(None, (path, new.data_file)):
                    _refuse_part(name, parts, new.backing_file)
        if new.data_file is not None:
            await _refuse_image(new.data_file, engine)
        if size is None:
            raise UsageError("size: it is needed where no backing file has one")
        new = replace(new, size=round_up(size))
        if format == "raw":
            with new_file(engine, path) as file:
                await empty(file, new.size)
                await preallocate(file, new.size, new.preallocation)
                await file.flush()
        else:
            await create(path, new, engine=engine)
    return new


_WORDS: Mapping[str, Iterable[Any]] = {
    "preallocation": Preallocation,
    "compression_type": CompressionType,
}


def _meant(name: str, value: object) -> object:
    """The value of an option; those that are one of a few words may be given as such."""
    if name not in _NAMES:
        raise UsageError(f"{name}: no option of a new image; {', '.join(sorted(_NAMES))} are")
    words = {str(word): word for word in _WORDS.get(name, ())}
    if not words:
        return value
    if str(value) not in words:
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(words)}")
    return words[str(value)]


def _check_raw(options: dict[str, Any]) -> None:
    for name in options:
        if name != "preallocation":
            raise UsageError(f"{name}: raw images have no such thing; size and preallocation")
    if options.get("preallocation") is Preallocation.METADATA:
        raise UsageError("preallocation: metadata is for qcow2; off, falloc and full are for raw")


async def _open_backing(path: str, new: NewImage, engine: Engine) -> BlockNode:
    name = str(new.backing_file)
    if ":" in name.partition("/")[0]:
        raise UsageError(f"backing_file: {name!r} is a protocol name, not a file")
    try:
        return await open_image({"driver": new.backing_fmt, "file.filename": path}, engine=engine)
    except ImageError as error:
        raise type(error)(f"{error} (backing file of the new image)") from None


def _refuse_part(path: str, parts: Iterable[object], backing_file: str) -> None:
    """Rule 2."""
    identity = _identity(path)
    if identity is not None and identity in parts:
        raise UsageError(f"backing_file: {path} is {backing_file}, or a part of it")


async def _refuse_image(path: str, engine: Engine) -> None:
    """Rule 3."""
    with suppress(OSError), closing(HostFile.open(engine, path, writable=False)) as file:
        looks_like = probe_format(await file.read_bytes(PROBE_LENGTH, 0))
        if looks_like != "raw":
            raise UsageError(
                f"data_file: {path} looks like {looks_like}, not raw, and would be emptied; remove"
                " it first if nobody needs it"
            )


def _same_name(path: str, other: str) -> bool:
    """Also of files that are not there yet."""
    return os.path.realpath(path) == os.path.realpath(other)


def _identity(path: str) -> tuple[int, int] | None:
    """As `HostFile.identity`; None where no file is."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None
