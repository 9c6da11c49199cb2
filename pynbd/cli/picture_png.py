"""A sheet as PNG, twice as large as it is in SVG; needs Pillow (the extra ``picture``).

The letters are those of DejaVu Sans where it is installed, and else what Pillow brings itself.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from pynbd.cli.picture_shapes import BACKGROUND, PLAIN, Box, Fill, Sheet, Words

_SCALE = 2
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def png(sheet: Sheet) -> bytes:
    """The file."""
    image = Image.new("RGB", (sheet.width * _SCALE, sheet.height * _SCALE), BACKGROUND)
    for lane in sheet.lanes:
        for shape in lane.shapes:
            if isinstance(shape, Words):
                _write(image, shape)
            else:
                _fill(image, shape)
    stream = BytesIO()
    image.save(stream, "png", optimize=True)
    return stream.getvalue()


def _fill(image: Image.Image, fill: Fill) -> None:
    plain = fill.texture == PLAIN
    canvas = image if plain else Image.new("1", image.size)
    draw = ImageDraw.Draw(canvas)
    for box in fill.boxes:
        draw.rectangle(_pixels(box), fill.ink if plain else 1)
    if not plain:
        image.paste(_wallpaper(fill, image.size), mask=canvas)


def _wallpaper(fill: Fill, size: tuple[int, int]) -> Image.Image:
    """The texture all over a sheet."""
    ink = np.array([[sign == "#" for sign in row] for row in fill.texture])
    colours = np.array([ImageColor.getrgb(fill.paper), ImageColor.getrgb(fill.ink)], np.uint8)
    tile = colours[ink.astype(np.intp).repeat(_SCALE, 0).repeat(_SCALE, 1)]
    times = (-(-size[1] // tile.shape[0]), -(-size[0] // tile.shape[1]), 1)
    return Image.fromarray(np.tile(tile, times)).crop((0, 0, *size))


def _pixels(box: Box) -> tuple[int, int, int, int]:
    """The first and the last pixels of a box, which has one at least."""
    left, top = round(box.x * _SCALE), round(box.y * _SCALE)
    right = round((box.x + box.width) * _SCALE) - 1
    bottom = round((box.y + box.height) * _SCALE) - 1
    return left, top, max(right, left), max(bottom, top)


def _write(image: Image.Image, words: Words) -> None:
    ImageDraw.Draw(image).text(
        (words.x * _SCALE, words.y * _SCALE),
        words.text,
        words.colour,
        _font(words.size * _SCALE, words.bold),
        _ANCHORS[words.anchor],
    )


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
