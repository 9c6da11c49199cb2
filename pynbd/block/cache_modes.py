"""How host files are cached."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class CacheMode(NamedTuple):
    """How a file is cached. ``direct``: past the page cache. ``write_through``: what was written is
    on stable storage before the write is done. ``no_flush``: nothing is ever asked to be there.
    """

    direct: bool = False
    write_through: bool = False
    no_flush: bool = False


class Cache(StrEnum):
    """QEMU's names for cache modes (``--cache`` of its tools)."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"

    @property
    def mode(self) -> CacheMode:
        return CacheMode(
            direct=self in (Cache.NONE, Cache.DIRECTSYNC),
            write_through=self in (Cache.WRITETHROUGH, Cache.DIRECTSYNC),
            no_flush=self is Cache.UNSAFE,
        )
