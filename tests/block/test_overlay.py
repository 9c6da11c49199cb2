"""Throw-away overlays: what is written is seen, and nothing of it reaches the image."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.cache_modes import Cache
from pynbd.block.overlay import open_with_overlay
from pynbd.block.qcow2.builder import Compressed, Data, Image, InternalSnapshot, Subclusters, Zero
from pynbd.errors import ImageError

K, M = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where overlays are; none is left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def written(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def chain(folder: Path) -> Path:
    """Three layers, the lowest of an odd size."""
    written(folder / "bottom", 300 * K + 100)
    middle = Image(
        size=M,
        clusters={64 * K: Compressed(b"middle" * 100), 128 * K: Zero(), 512 * K: Data(b"x" * K)},
        backing_file="bottom",
        backing_format="raw",
    )
    middle.write(folder / "middle")
    top = Image(
        size=M + 512,
        clusters={0: Subclusters(b"top" * 10000, allocated=0b1010), 192 * K: Data(b"t")},
        extended_l2=True,
        backing_file="middle",
        backing_format="qcow2",
        snapshots=[InternalSnapshot("before", {0: Data(b"earlier")}, size=512 * K)],
    )
    top.write(folder / "top")
    return folder / "top"


async def check(image: Any, **options: Any) -> None:
    """Write all over an image, and read it through a shadow."""
    rng = random.Random(1)
    async with await open_with_overlay(image, **options) as node:
        assert not node.read_only
        shadow = await node.pread(0, node.size)
        for _ in range(100):
            offset = rng.randrange(node.size)
            length = min(rng.choice([1, 511, 512, 70_000, 200_000]), node.size - offset)
            if rng.random() < 0.6:
                data = rng.randbytes(length)
                assert await node.pwrite_batch([(offset, data)], fua=True) == [None]
                shadow[offset : offset + length] = data
            else:
                await node.write_zeroes(offset, length, may_unmap=rng.random() < 0.5, fast=False)
                shadow[offset : offset + length] = bytes(length)
            await node.flush()
        assert await node.pread(0, node.size) == shadow


@pytest.mark.parametrize("size", [1, 511, 512, 64 * K, M + 1])
@pytest.mark.parametrize("options", [{}, {"format": "raw"}, {"whole_sectors": True}])
async def test_a_raw_image(size: int, options: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "disk", size)
    before = path.read_bytes()
    await check(path, **options)
    async with await open_with_overlay(path, **options) as node:
        assert node.size == (-(-size // 512) * 512 if "whole_sectors" in options else size)
        assert bytes(await node.pread(0, size)) == before
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"snapshot": "before"},
        {"offset": 63 * K},
        {"offset": M},
        {"cache": Cache.NONE},
        {"force_share": True},
        {"read_only": False},
    ],
)
async def test_a_chain(options: dict[str, Any], tmp_path: Path) -> None:
    path = chain(tmp_path)
    before = contents(tmp_path)
    await check(path, **options)
    assert contents(tmp_path) == before


async def test_options_of_nodes(tmp_path: Path) -> None:
    path = chain(tmp_path)
    alone = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    part = {"driver": "raw", "file": alone, "offset": 64 * K, "size": 256 * K}
    await check(alone)
    await check(part)
    await check(part, offset=1024)
    async with await open_with_overlay(part, offset=1024) as node:
        assert node.size == 255 * K
        assert (await node.pread(127 * K, 1)) == b"t"


async def test_layers_are_told(tmp_path: Path) -> None:
    async with await open_with_overlay(chain(tmp_path)) as node:
        assert await node.pwrite_batch([(64 * K, b"new")]) == [None]
        runs = await node.map(0, node.size)
        assert runs.at(runs.starts)[2].max() == 4
        assert [len(layer.files()) for layer in node.chain()] == [1, 1, 1, 1]


async def test_nothing_stays_open(tmp_path: Path, temporary: Path) -> None:
    path = chain(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    async with await open_with_overlay(path):
        assert not os.listdir(temporary)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ImageError, match="nowhere"):
        await open_with_overlay(tmp_path / "nowhere")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_no_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chain(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ImageError, match=r"^/nowhere: no temporary overlay can be made there: No"):
        await open_with_overlay(path)
    assert len(os.listdir("/proc/self/fd")) == before
