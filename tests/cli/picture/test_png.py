"""The PNG of a sheet, pixel by pixel."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

from pynbd.cli.picture.png import png
from pynbd.cli.picture.shapes import HATCH, Box, Fill, Lane, Sheet, Words

PAPER, INK = (255, 255, 255), (0x11, 0x22, 0x33)


def painted(*shapes: Fill | Words) -> Image.Image:
    image = Image.open(BytesIO(png(Sheet(20, 10, "t", [Lane("bar", "", list(shapes))]))))
    assert image.size == (40, 20)
    return image


def test_a_plain_box() -> None:
    image = painted(Fill("data", "#112233", [Box(2, 3, 4, 5)]))
    for x in range(40):
        for y in range(20):
            inside = 4 <= x < 12 and 6 <= y < 16
            assert image.getpixel((x, y)) == (INK if inside else PAPER)


def test_a_texture_goes_on_from_box_to_box() -> None:
    """A diagonal of every sixth pixel, from the corner of the sheet, drawn twice as large."""
    image = painted(
        Fill("zero", "#112233", [Box(1, 1, 4, 4), Box(5, 1, 8, 4)], HATCH, paper="#445566")
    )
    for x in range(2, 26):
        for y in range(2, 10):
            inked = (x // 2 - y // 2) % 6 == 0
            assert image.getpixel((x, y)) == (INK if inked else (0x44, 0x55, 0x66))
    assert image.getpixel((26, 5)) == PAPER


def test_the_narrowest_box_is_a_pixel() -> None:
    image = painted(Fill("data", "#112233", [Box(3, 3, 0.01, 0.01)]))
    assert [p for p in range(40) if image.getpixel((p, 6)) == INK] == [6]


def test_words_end_where_they_are_told() -> None:
    image = painted(Words(18, 8, "HHH", 6, "#112233", "end"))
    ink = [x for x in range(40) for y in range(20) if image.getpixel((x, y)) != PAPER]
    assert 0 < min(ink) < max(ink) <= 36
