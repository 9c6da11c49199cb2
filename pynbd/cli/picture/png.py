"""A sheet as PNG, twice as large as it is in SVG; needs Pillow (the extra ``picture``).

The letters are those of DejaVu Sans where it is installed, and else what Pillow brings itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from pynbd.cli.picture.shapes import BACKGROUND, PLAIN, Box, Fill, Sheet, Words

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
    image.save(stream, "png")
    return stream.getvalue()


def _fill(image: Image.Image, fill: Fill) -> None:
    places = [_pixels(box) for box in fill.boxes]
    if fill.texture == PLAIN:
        draw = ImageDraw.Draw(image)
        for place in places:
            draw.rectangle(place, fill.ink)
        return
    wallpaper, left, top = _wallpaper(fill, places)
    for place in places:
        first, last = place[0] - left, place[2] - left + 1
        piece = wallpaper.crop((first, place[1] - top, last, place[3] - top + 1))
        image.paste(piece, place[:2])


def _wallpaper(
    fill: Fill, places: Sequence[tuple[int, int, int, int]]
) -> tuple[Image.Image, int, int]:
    """The texture where some boxes are, and its upper left corner."""
    lefts, tops, rights, bottoms = zip(*places, strict=True)
    left, top = min(lefts), min(tops)
    ink = np.array([[sign == "#" for sign in row] for row in fill.texture], np.intp)
    rows = np.arange(top, max(bottoms) + 1) // _SCALE % ink.shape[0]
    columns = np.arange(left, max(rights) + 1) // _SCALE % ink.shape[1]
    colours = np.array([ImageColor.getrgb(fill.paper), ImageColor.getrgb(fill.ink)], np.uint8)
    return Image.fromarray(colours[ink[np.ix_(rows, columns)]]), left, top


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
