"""What the five cache modes do to writes and flushes, seen as system calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pynbd.block.cache_modes import Cache, CacheMode
from pynbd.block.chain import open_image
from pynbd.errors import ImageError


def test_names() -> None:
    """As in the manual of qemu-img: direct, write-through, no flush."""
    assert {str(cache): cache.mode for cache in Cache} == {
        "none": CacheMode(True, False, False),
        "writeback": CacheMode(False, False, False),
        "writethrough": CacheMode(False, True, False),
        "directsync": CacheMode(True, True, False),
        "unsafe": CacheMode(False, False, True),
    }


@pytest.mark.parametrize("cache", Cache)
async def test_what_reaches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Cache
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    syncs: list[int] = []
    real = os.fdatasync
    try:
        node = await open_image(path, format="raw", read_only=False, cache=cache)
    except ImageError as error:
        if "O_DIRECT" in str(error):
            pytest.skip("no O_DIRECT here")
        raise

    def fdatasync(fd: int) -> None:
        syncs.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    try:
        for operation, plain in (
            (node.pwrite_batch([(10, b"data")]), 0),
            (node.pwrite_batch([(20, b"data")], fua=True), 1),
            (node.write_zeroes(5000, 1000, may_unmap=True, fast=False), 0),
            (node.discard(9000, 9000), 0),
            (node.discard(90000, 9000, fua=True), 1),
            (node.flush(), 1),
        ):
            syncs.clear()
            await operation
            if cache.mode.no_flush:
                assert not syncs
            elif cache.mode.write_through:
                assert syncs
            else:
                assert len(syncs) == plain
        assert await node.pread(8, 18) == b"\0\0data" + bytes(6) + b"data\0\0"
    finally:
        await node.close()
    assert path.read_bytes()[10:24] == b"data" + bytes(6) + b"data"
