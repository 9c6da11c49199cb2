"""What is offered of an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Bitmap, Image, poke
from pynbd.errors import ImageError
from pynbd.server.offers import offered_contexts

M = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    Image(size=M, bitmaps=[Bitmap("b0"), Bitmap("b1")]).write(path)
    return path


BASE, DEPTH, DIRTY = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"


@pytest.mark.parametrize(
    "depth, bitmaps, offered",
    [
        (None, None, [BASE, DEPTH, DIRTY + "b0", DIRTY + "b1"]),
        (True, None, [BASE, DEPTH]),
        (False, None, [BASE]),
        (None, ["b1"], [BASE, DIRTY + "b1"]),
        (True, ["b1", "b0", "b1"], [BASE, DEPTH, DIRTY + "b1", DIRTY + "b0"]),
        (None, [], [BASE]),
    ],
)
async def test_what_is_asked_for(
    disk: Path, depth: bool | None, bitmaps: list[str] | None, offered: list[str]
) -> None:
    async with await open_image(disk) as node:
        assert list(offered_contexts(node, depth=depth, bitmaps=bitmaps)) == offered


async def test_a_bitmap_does_not_speak_of_a_part_of_the_disk(disk: Path) -> None:
    """qemu-nbd does not find one with --offset either."""
    async with await open_image(disk, offset=65536) as node:
        assert list(offered_contexts(node)) == [BASE, DEPTH]
        with pytest.raises(ImageError, match="no bitmap 'b0'; there is none"):
            offered_contexts(node, bitmaps=["b0"])


@pytest.mark.parametrize("name", [b"\xee\xff", b"a\0b"])
async def test_a_bitmap_whose_name_no_client_can_be_told(
    tmp_path: Path, name: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """qcow2 takes any bytes for a name; in the protocol it has to be UTF-8, without NUL."""
    path = tmp_path / "disk.qcow2"
    Image(size=M, bitmaps=[Bitmap("n" * len(name)), Bitmap("b1")]).write(path)
    content = path.read_bytes()
    poke(path, content.index(b"n" * len(name), 65536), name)
    async with await open_image(path) as node:
        assert list(offered_contexts(node)) == [BASE, DEPTH, DIRTY + "b1"]
        assert "is not offered: it has" in caplog.text
        with pytest.raises(ImageError, match="cannot be offered: it has"):
            offered_contexts(node, bitmaps=[name.decode("utf-8", "surrogateescape")])
