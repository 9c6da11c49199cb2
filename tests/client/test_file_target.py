"""qcow2 images as targets: made, overwritten, written into, removed again. See test_ends.py for the
rest.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.probe import probe_format
from pynbd.block.qcow2.builder import Data, Image
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.client.copy import copy
from pynbd.client.disk import OverlayTarget
from pynbd.client.ends import Reading, Writing, open_disk, open_target
from pynbd.errors import ImageError, ReadError, UnsupportedFeature, UsageError, WriteError

M = 1 << 20
CONTENT = b"\x11" * 100_000 + bytes(300_000) + b"\x22" * (M - 400_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def copied(source: Path, target: Path, **how: Any) -> None:
    async def work() -> None:
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(target), disk, Writing(**how)) as place,
        ):
            await copy(disk, place)

    asyncio.run(work())


def content(path: Path) -> bytes:
    async def read() -> bytes:
        async with await open_image(path) as node:
            return bytes(await node.pread(0, node.size))

    return asyncio.run(read())


def format_of(path: Path) -> str:
    return probe_format(path.read_bytes()[:512])


@pytest.mark.parametrize(
    "name, how, becomes",
    [
        ("new", {}, "raw"),
        ("new.qcow2", {}, "qcow2"),
        ("new.qcow2", {"format": "raw"}, "raw"),
        ("new", {"format": "qcow2"}, "qcow2"),
    ],
)
def test_the_format_of_a_new_file(
    name: str, how: dict[str, Any], becomes: str, source: Path, tmp_path: Path
) -> None:
    copied(source, tmp_path / name, **how)
    assert format_of(tmp_path / name) == becomes
    assert content(tmp_path / name) == CONTENT


@pytest.mark.parametrize("old", ["qcow2", "raw"])
@pytest.mark.parametrize("new", ["qcow2", "raw"])
def test_a_file_that_is_there(old: str, new: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "old"
    if old == "raw":
        path.write_bytes(b"old" * M)
    else:
        Image(size=5 * M, clusters={4 * M: Data(b"old")}).write(path)
    copied(source, path, format=new)
    assert format_of(path) == new
    assert content(path) == CONTENT


def test_an_image_that_is_written_into(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "old"
    Image(size=2 * M, clusters={0: Data(b"\7" * 65536), M: Data(b"old")}).write(path)
    before = path.read_bytes()
    with pytest.raises(UnsupportedFeature, match=r"-n writes into a qcow2 image$"):
        copied(source, path)
    assert path.read_bytes() == before
    copied(source, path, existing=True)
    assert content(path)[:M] == CONTENT
    assert content(path)[M : M + 3] == b"old"
    with pytest.raises(ImageError, match=r"-n is for a target that is there$"):
        copied(source, tmp_path / "new", existing=True)
    Image(size=M // 2).write(path)
    with pytest.raises(ImageError, match=f"it has {M // 2} bytes, and the source has {M}$"):
        copied(source, path, existing=True)


def test_an_overlay_has_whole_granules(source: Path, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(CONTENT)
    backed = {"backing_file": "base", "backing_fmt": "raw"}

    async def granule(**options: Any) -> int:
        how = Writing(format="qcow2", creation={**backed, **options})
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(tmp_path / "new"), disk, how) as target,
        ):
            assert isinstance(target, OverlayTarget)
            return target.granule

    assert asyncio.run(granule(cluster_size=4096)) == 4096
    assert asyncio.run(granule(cluster_size=65536, extended_l2=True)) == 2048


def test_the_last_sector_of_an_overlay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image has whole sectors; past the end of the source nothing of what is below shows."""
    odd = tmp_path / "odd"
    odd.write_bytes(CONTENT[: M - 100])
    (tmp_path / "base").write_bytes(CONTENT)
    copied(odd, tmp_path / "new.qcow2", creation={"backing_file": "base", "backing_fmt": "raw"})
    assert content(tmp_path / "new.qcow2") == CONTENT[: M - 100] + bytes(100)
    assert not caplog.messages


def test_allocated_zeroes_have_their_places(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"")
    os.truncate(source, M)
    for name, creation in (("new", {}), ("extended", {"extended_l2": True})):
        copied(source, tmp_path / name, format="qcow2", allocated=True, creation=creation)
        assert content(tmp_path / name) == bytes(M)
        assert (tmp_path / name).stat().st_blocks * 512 >= M


@pytest.mark.parametrize("failure", [ReadError("bad"), KeyError("defect"), KeyboardInterrupt()])
def test_what_was_made_goes_away(failure: BaseException, source: Path, tmp_path: Path) -> None:
    how = Writing(format="qcow2", creation={"data_file": str(tmp_path / "data")})

    async def work() -> None:
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(tmp_path / "new"), disk, how) as target,
        ):
            await target.write(0, memoryview(b"begun"))
            raise failure

    with pytest.raises(type(failure)) as raised:
        asyncio.run(work())
    assert raised.value is failure
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("is_new", [True, False])
def test_an_image_that_cannot_be_finished(
    is_new: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    if not is_new:
        Image(size=M).write(path)

    async def finish(node: Qcow2Node) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Qcow2Node, "finish", finish)
    said = f"{path}: it could not be finished: No space left on device"
    with pytest.raises(WriteError) as raised:
        copied(source, path, format="qcow2", existing=not is_new)
    assert str(raised.value) == said + ("" if is_new else f"; {path} is incomplete now")
    assert path.exists() is not is_new


def test_the_source_is_not_its_target(source: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    Image(size=M, backing_file="source", backing_format="raw").write(overlay)
    for target, how in (
        (overlay, {"format": "qcow2"}),
        (overlay, {"existing": True}),
        (source, {"format": "qcow2"}),
        (tmp_path / "new", {"format": "qcow2", "creation": {"data_file": str(source)}}),
    ):
        with pytest.raises(UsageError, match=r"the source$"):
            copied(overlay, target, **how)
    assert source.read_bytes() == CONTENT
    assert not (tmp_path / "new").exists()
