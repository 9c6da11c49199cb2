"""Host files that begin anew: made, or emptied, and given their space.

A file that is there is taken only if nobody else has it open; one that had to be made goes away
again with what fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from enum import StrEnum

from pynbd.block.cache_modes import Cache, CacheMode
from pynbd.block.engine import Engine, HostFile, Opener
from pynbd.block.file import open_host_file, write_zeroes
from pynbd.errors import ImageError, ImageLocked

_ZERO_PIECE = bytes(1 << 20)


class Preallocation(StrEnum):
    """The space of a new image: none; the tables of all its guest clusters (qcow2); all of it,
    allocated by the file system, or written. ``str()`` gives the name that qemu-img has for it.
    """

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@contextmanager
def new_file(
    engine: Engine, path: str, cache: CacheMode = Cache.WRITEBACK.mode
) -> Iterator[HostFile]:
    """Open and lock the file or block device ``path`` to be overwritten; it is made if it is not
    there. Nothing in it is touched yet. Raises `ImageError`, `ImageLocked`.
    """
    made = make_file(path)
    try:
        with closing(open_to_write(engine, path, cache)) as file:
            yield file
    except BaseException:
        if made:
            remove_made(path, made)
        raise


def open_to_write(
    engine: Engine,
    path: str,
    cache: CacheMode = Cache.WRITEBACK.mode,
    *,
    opener: Opener | None = None,
) -> HostFile:
    """Open and lock a file or block device, by ``opener``. Raises `ImageError`, `ImageLocked`."""
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise ImageError(f"{path}: it may not be written")
    try:
        return open_host_file(engine, path, writable=True, cache=cache, opener=opener)
    except ImageLocked:
        raise ImageLocked(f"{path}: another process uses it") from None


def make_file(path: str) -> tuple[int, int] | None:
    """Make an empty file, unless it is there; what it is known by. Raises `ImageError`."""
    if os.path.exists(path):
        return None
    try:
        with open(path, "xb") as file:
            status = os.fstat(file.fileno())
            return status.st_dev, status.st_ino
    except FileExistsError:
        raise ImageError(f"{path}: it is a symbolic link that leads nowhere") from None
    except ValueError:
        raise ImageError(f"{path!r}: it cannot be the name of a file") from None
    except OSError as error:
        raise ImageError(f"{path}: it cannot be made: {error.strerror}") from None


def remove_made(path: str, made: tuple[int, int]) -> None:
    """Remove the file that `make_file` made, unless somebody has put another in its place."""
    with suppress(FileNotFoundError):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) == made:
            os.unlink(path)


async def empty(file: HostFile, size: int) -> None:
    """Make a regular file ``size`` bytes that are one hole; a device, its first ``size`` bytes
    zeroes. Raises `ImageError` if that is more than it can have, and nothing is lost then.
    """
    if not file.is_device:
        try:
            await file.empty(size)
        except OSError as error:
            reason = f"it cannot have {size} bytes: {error.strerror}"
            raise ImageError(f"{file.path}: {reason}") from None
    elif size > file.size():
        raise ImageError(f"{file.path}: it has {file.size()} bytes, and {size} are needed")
    else:
        await write_zeroes(file, 0, size, may_unmap=True, fast=False)


async def preallocate(file: HostFile, size: int, how: Preallocation) -> None:
    """Give the first ``size`` bytes of an empty file the space that ``how`` asks for. ``OSError``
    ENOSPC if there is too little.
    """
    if how is Preallocation.FALLOC and size:
        await write_zeroes(file, 0, size, may_unmap=False, fast=False)
    elif how is Preallocation.FULL:
        for offset in range(0, size, len(_ZERO_PIECE)):
            await file.write(memoryview(_ZERO_PIECE)[: size - offset], offset)
