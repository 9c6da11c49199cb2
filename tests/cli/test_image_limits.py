"""The limits of an image on the command line: each option reaches what it limits."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import pynbd as library
from pynbd.block.limits import ImageLimits
from pynbd.block.qcow2.builder import Bitmap, Image, InternalSnapshot
from pynbd.cli import image_limits, serve
from tests.cli.looking import pynbd_here

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two layers, with bitmaps and a snapshot."""
    Image(size=SIZE).write(tmp_path / "base")
    Image(
        size=SIZE,
        bitmaps=[Bitmap("one", granularity=512), Bitmap("two", granularity=512)],
        snapshots=[InternalSnapshot("before", {})],
        backing_file="base",
        backing_format="qcow2",
    ).write(tmp_path / "top")
    return tmp_path / "top"


def test_every_limit_has_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {field.name for field in fields(ImageLimits)}
    options = {option.name: option for option in serve.serve.params}
    assert names <= options.keys()
    values: dict[str, Any] = {name: number for number, name in enumerate(sorted(names), 1)}
    assert image_limits.image_limits_of(dict(values)) == ImageLimits(**values)


@pytest.mark.parametrize(
    "option, said",
    [
        (["--max-layers", "1"], ["more than 1 layer (", "--max-layers", "ImageLimits.layers"]),
        (["--metadata-memory", "100"], ["top: its snapshot table", "512", "100 are allowed"]),
        (["--metadata-memory", "1k"], ["top: its bitmap directory", "1024", "--metadata-memory"]),
        (["--metadata-memory", "15", "-B", "base"], ["base: its L1 table", "16", "15 are"]),
        (["--bitmap-memory", "100"], ["top: bitmap 'one'", "256", "100", "--bitmap-memory"]),
        (["--bitmap-memory", "300"], ["that record", "512", "300", "--bitmap-memory"]),
    ],
)
def test_an_image_that_needs_more(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: list[str],
    said: list[str],
) -> None:
    """It is refused with one line that names what it is, its size, and the option."""
    if option[-1] == "base":  # the image that is meant
        option, image = option[:-2], image.with_name("base")
    status, out, err = pynbd_here(monkeypatch, capsys, "serve", *option, image)
    (line,) = err.splitlines()
    assert (status, out) == (1, "")
    assert line.startswith(f"pynbd: {image}")
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    "option, said",
    [
        (["--max-layers", "1"], "more than 1 layer ("),
        (["--metadata-memory", "100"], "100 are allowed ("),
        (["--bitmap-memory", "100"], "bitmap 'one' would need 256 bytes"),
    ],
)
@pytest.mark.parametrize(
    "command", ["info IMAGE", "map IMAGE", "copy IMAGE copy.raw", "compare IMAGE IMAGE"]
)
def test_who_only_looks(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: list[str],
    said: str,
) -> None:
    """What names the option takes it; for an export it has no meaning."""
    monkeypatch.chdir(image.parent)
    line = command.replace("IMAGE", str(image)).split()
    status, _, err = pynbd_here(monkeypatch, capsys, *line, *option)
    (refused,) = err.splitlines()
    assert status
    assert said in refused
    assert f"({option[0]} of pynbd, ImageLimits." in refused
    line = command.replace("IMAGE", "nbd://localhost").split()
    status, _, err = pynbd_here(monkeypatch, capsys, *line, *option)
    assert status == 2
    assert err.startswith(f"pynbd: {option[0]} is for images: ")


async def test_the_library(image: Path) -> None:
    with pytest.raises(library.ImageError, match="--max-layers"):
        async with library.serve(image, image_limits=library.ImageLimits(layers=1)):
            pass
    async with (
        library.serve(image, image_limits=library.ImageLimits(layers=2)) as server,
        library.connect(server.uri) as client,
    ):
        assert await client.pread(0, 1) == b"\0"
