"""Images that are made, and what is below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.creation import create_image
from pynbd.block.new_file import Preallocation
from pynbd.block.qcow2.builder import Data, Image
from pynbd.block.qcow2.format import CompressionType
from pynbd.errors import ImageError, UsageError

M = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A chain of two, in a folder of its own."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bottom").write_bytes(b"\x11" * 1000)
    Image(
        size=M, clusters={65536: Data(b"base")}, backing_file="bottom", backing_format="raw"
    ).write(folder / "base")
    return folder / "base"


async def test_an_overlay_is_as_large_as_what_is_below(base: Path) -> None:
    path = base.with_name("overlay")
    new = await create_image(str(path), backing_file="base", backing_fmt="qcow2")
    assert new.size == M
    async with await open_image(path) as node:
        assert node.size == M
        assert bytes(await node.pread(65534, 6)) == b"\0\0base"
    assert (await create_image(str(path), backing_file="bottom", backing_fmt="raw")).size == 1024
    other = {"backing_file": "base", "backing_fmt": "qcow2", "size": 1}
    assert (await create_image(str(path), **other)).size == 512


@pytest.mark.parametrize(
    "name, options, error, said",
    [
        ("new", {}, UsageError, "size: it is needed where no backing file has one"),
        ("new", {"backing_file": "gone"}, ImageError, "gone: .*No such file.*backing file of"),
        ("new", {"backing_file": "nbd:x"}, UsageError, "'nbd:x' is a protocol name, not a file"),
        ("new", {"backing_file": "json:{}"}, UsageError, "'json:{}' is a protocol name"),
        ("new", {"backing_file": "bottom"}, ImageError, "bottom: .*not a qcow2 image"),
        ("base", {"backing_file": "base"}, UsageError, "base is base, or a part of it"),
        ("bottom", {"backing_file": "base"}, UsageError, "bottom is base, or a part of it"),
        ("link", {"backing_file": "base"}, UsageError, "link is base, or a part of it"),
        ("base", {"backing_file": "base", "backing_unchecked": True, "size": M}, UsageError, "is"),
        ("new", {"backing_file": "base", "backing_unchecked": True}, UsageError, "size: "),
        ("new", {"backing_file": "base", "data_file": "{}/bottom"}, UsageError, "bottom is base"),
        (
            "new",
            {"size": M, "data_file": "{}/new"},
            UsageError,
            "data_file: .*/new is",
        ),
        ("new", {"size": M, "data_file": "{}/no/where"}, ImageError, "it cannot be made"),
    ],
)
async def test_what_is_refused(
    name: str, options: dict[str, Any], error: type[Exception], said: str, base: Path
) -> None:
    folder = base.parent
    (folder / "link").symlink_to("base")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for key, value in options.items():
        if isinstance(value, str):
            options = {
                **options,
                key: value.replace("{}", str(folder), 1) if "/" in value else value,
            }
    backed = {"backing_fmt": "qcow2"} if "backing_file" in options else {}
    with pytest.raises(error, match=said):
        await create_image(str(folder / name), **backed, **options)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("begins, format_", [(b"KDMV", "vmdk"), (b"QFI\xfb\0\0\0\3", "qcow2")])
async def test_a_data_file_that_is_an_image(tmp_path: Path, begins: bytes, format_: str) -> None:
    """What is raw may be overwritten, as the image itself."""
    path, data_file = tmp_path / "new", tmp_path / "data"
    data_file.write_bytes(begins.ljust(1000, b"\1"))
    with pytest.raises(UsageError, match=f"data_file: {data_file} looks like {format_}, not raw"):
        await create_image(path, size=M, data_file=str(data_file))
    assert data_file.read_bytes() == begins.ljust(1000, b"\1")
    assert not path.exists()
    data_file.write_bytes(b"\1" * 1000)
    await create_image(path, size=M, data_file=str(data_file))
    assert data_file.read_bytes() == bytes(M)


async def test_a_backing_file_that_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "new"
    backing = {"backing_file": "gone", "backing_fmt": "raw", "backing_unchecked": True}
    assert (await create_image(str(path), size=M, **backing)).backing_file == "gone"
    with pytest.raises(ImageError, match="gone: cannot be opened"):
        await open_image(path)


async def test_words(tmp_path: Path) -> None:
    """Who calls it from a program of his own has words for what is one of a few things."""
    path = tmp_path / "new"
    new = await create_image(path, size=M, preallocation="full", compression_type="zstd")
    assert new.preallocation is Preallocation.FULL
    assert new.compression_type is CompressionType.ZSTD
    assert path.stat().st_blocks * 512 >= M


@pytest.mark.parametrize(
    "options, said",
    [
        ({"preallocation": "some"}, "preallocation: 'some' is not one of off, metadata, falloc,"),
        ({"compression_type": "lzo"}, "compression_type: 'lzo' is not one of zlib, zstd$"),
        ({"format": "vmdk"}, "format: 'vmdk' is not one of raw, qcow2$"),
        ({"clustersize": 512}, "clustersize: no option of a new image; backing_file, "),
    ],
)
async def test_words_that_mean_nothing(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        await create_image(tmp_path / "new", size=M, **options)
    assert not (tmp_path / "new").exists()


async def test_raw(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_bytes(b"old")
    new = await create_image(str(path), format="raw", size=1000)
    assert new.size == 1024
    assert path.read_bytes() == bytes(1024)
    for options, said in (
        ({"extended_l2": True}, "extended_l2: raw images have no such thing"),
        ({"preallocation": Preallocation.METADATA}, "preallocation: metadata is for qcow2"),
        ({"backing_file": "x", "backing_fmt": "raw"}, "backing_file: raw images have no"),
    ):
        with pytest.raises(UsageError, match=said):
            await create_image(str(path), format="raw", size=1000, **options)
