"""Image files on the host: opened with QEMU's locks, zeroed and discarded by the best way the host
has.

Locks (``block/file-posix.c`` of QEMU is their definition): a permission that is used holds a shared
lock on byte 100 + bit, one that is not shared with others a shared lock on byte 200 + bit. After
taking its own, each opener looks whether somebody forbids what it uses, or uses what it forbids.
"""

from __future__ import annotations

import errno
import logging
from enum import IntEnum

from pynbd.block.cache_modes import Cache, CacheMode
from pynbd.block.engine import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    Engine,
    HostFile,
    Opener,
)
from pynbd.errors import ImageError, ImageLocked

log = logging.getLogger("pynbd")

LOCK_USED = 100
LOCK_UNSHARED = 200
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP})

# Zeroes that have to be written go out in pieces of this size.
_ZERO_PIECE = bytes(1 << 20)


class Permission(IntEnum):
    """Bits of QEMU's block permissions that concern an image file."""

    CONSISTENT_READ = 0
    WRITE = 1
    RESIZE = 3


def open_host_file(
    engine: Engine,
    path: str,
    *,
    writable: bool,
    force_share: bool = False,
    locked: bool = True,
    cache: CacheMode = Cache.WRITEBACK.mode,
    opener: Opener | None = None,
) -> HostFile:
    """Open an image file or device and, unless it is not to be ``locked``, lock it as QEMU does.

    ``force_share`` opens a file for reading although others may write it, with a warning when one
    does. ``opener``: as `HostFile.open` has it. Raises `ImageError` naming the file, `ImageLocked`
    if another process holds a conflicting lock.
    """
    try:
        file = HostFile.open(engine, path, writable=writable, cache=cache, opener=opener)
    except OSError as error:
        denied = writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        hint = " for writing (-r serves it read-only)" if denied else ""
        raise ImageError(f"{path}: cannot be opened{hint}: {error.strerror}") from None
    try:
        if locked:
            _lock(file, force_share=force_share)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise ImageError(f"{path}: cannot be locked: {error.strerror}") from None
        raise
    return file


def _lock(file: HostFile, *, force_share: bool) -> None:
    try:
        if force_share:
            _tell_of_writers(file)
        else:
            _take_locks(file)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: the file system has no locks: %s", file.path, error.strerror)


def _tell_of_writers(file: HostFile) -> None:
    if any(file.byte_is_locked(LOCK_USED + bit) for bit in (Permission.WRITE, Permission.RESIZE)):
        log.warning(
            "%s: another process writes this image; what is read may be inconsistent", file.path
        )


def _take_locks(file: HostFile) -> None:
    uses = {Permission.CONSISTENT_READ}
    if file.writable:
        uses |= {Permission.WRITE, Permission.RESIZE}
    forbids = {Permission.WRITE, Permission.RESIZE}
    try:
        for bit in uses:
            file.lock_byte(LOCK_USED + bit)
        for bit in forbids:
            file.lock_byte(LOCK_UNSHARED + bit)
    except (BlockingIOError, PermissionError):  # fcntl(2): either may say so
        raise ImageLocked(f"{file.path}: is locked by another process") from None
    # First: who writes lets nobody else read, either.
    for bit in forbids:
        if file.byte_is_locked(LOCK_USED + bit):
            raise ImageLocked(
                f"{file.path}: another process has it open to {_VERB[bit]} it {_AT_ONES_OWN_RISK}"
            )
    for bit in uses:
        if file.byte_is_locked(LOCK_UNSHARED + bit):
            way_out = _AT_ONES_OWN_RISK if bit is Permission.CONSISTENT_READ else _BESIDE_OTHERS
            raise ImageLocked(
                f"{file.path}: another process forbids others to {_VERB[bit]} it {way_out}"
            )


_AT_ONES_OWN_RISK = "(--force-share reads it all the same)"
_BESIDE_OTHERS = "(-r serves it read-only)"
_VERB = {
    Permission.CONSISTENT_READ: "read",
    Permission.WRITE: "write",
    Permission.RESIZE: "resize",
}


async def write_zeroes(
    file: HostFile, offset: int, length: int, *, may_unmap: bool, fast: bool
) -> None:
    """Make a range of the file read as zeroes, by the first way that the file has.

    A hole where ``may_unmap``, else an allocated range of zeroes, else written zeroes; if ``fast``,
    these last are refused with ENOTSUP before anything was touched.
    """
    ways = [FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE]
    if may_unmap:
        ways.insert(0, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE)
    for mode in ways:
        if await file.fallocate(mode, offset, length):
            return
    if fast:
        raise OSError(errno.EOPNOTSUPP, "zeroes would have to be written", file.path)
    end = offset + length
    while offset < end:
        count = min(len(_ZERO_PIECE), end - offset)
        await file.write(memoryview(_ZERO_PIECE)[:count], offset)
        offset += count


async def reserve(file: HostFile, offset: int, length: int) -> bool:
    """Give a range of the file space on the host, whatever its bytes are; False if the file's
    system cannot, and nothing happened. A device has all its space.
    """
    return file.is_device or await file.fallocate(0, offset, length)


async def discard(file: HostFile, offset: int, length: int) -> None:
    """Give a range of the file back to the host, if it takes it; then it reads as zeroes."""
    await file.fallocate(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
