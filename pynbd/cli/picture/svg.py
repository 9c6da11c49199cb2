"""A sheet as SVG 1.1: text is text, a lane tells about itself when it is pointed at.

The same sheet gives the same bytes. Each lane is a group, and so are the boxes of one kind in it,
with the name of that kind as their class.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from pynbd.cli.picture.shapes import BACKGROUND, PLAIN, Box, Fill, Sheet, Words

_FONTS = "DejaVu Sans, Verdana, Segoe UI, Helvetica, Arial, sans-serif"


# What a pattern depends on.
_Look = tuple[tuple[str, ...], str, str]


def _look(fill: Fill) -> _Look:
    return fill.texture, fill.ink, fill.paper


def svg(sheet: Sheet) -> bytes:
    """The file."""
    return ("\n".join(_lines(sheet)) + "\n").encode()


def _lines(sheet: Sheet) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{sheet.width}" height="{sheet.height}"'
        f' viewBox="0 0 {sheet.width} {sheet.height}" font-family="{_FONTS}" role="img">'
    )
    yield f"<title>{escape(sheet.title)}</title>"
    patterns = _patterns(sheet)
    yield "<defs>"
    for look, name in patterns.items():
        yield from _pattern(look, name)
    yield "</defs>"
    yield f'<rect width="100%" height="100%" fill="{BACKGROUND}"/>'
    for lane in sheet.lanes:
        yield f"<g class={quoteattr(lane.name)}>"
        if lane.tip:
            yield f"<title>{escape(lane.tip)}</title>"
        for shape in lane.shapes:
            if isinstance(shape, Words):
                yield _words(shape)
            else:
                pattern = patterns.get(_look(shape))
                paint = f"url(#{pattern})" if pattern else shape.ink
                yield f'<g class="{shape.name}" fill="{paint}">'
                yield from (_box(box) for box in shape.boxes)
                yield "</g>"
        yield "</g>"
    yield "</svg>"


def _patterns(sheet: Sheet) -> dict[_Look, str]:
    """A name for each textured look of a sheet."""
    fills = (shape for lane in sheet.lanes for shape in lane.shapes if isinstance(shape, Fill))
    looks = dict.fromkeys(_look(fill) for fill in fills if fill.texture != PLAIN)
    return {look: f"p{number}" for number, look in enumerate(looks)}


def _pattern(look: _Look, name: str) -> Iterator[str]:
    texture, ink, paper = look
    width, height = len(texture[0]), len(texture)
    yield (
        f'<pattern id="{name}" width="{width}" height="{height}" patternUnits="userSpaceOnUse">'
        f'<rect width="{width}" height="{height}" fill="{paper}"/><g fill="{ink}">'
    )
    for y, row in enumerate(texture):
        yield from (_box(Box(x, y, 1, 1)) for x, sign in enumerate(row) if sign == "#")
    yield "</g></pattern>"


def _box(box: Box) -> str:
    return (
        f'<rect x="{_number(box.x)}" y="{_number(box.y)}"'
        f' width="{_number(box.width)}" height="{_number(box.height)}"/>'
    )


def _words(words: Words) -> str:
    anchor = f' text-anchor="{words.anchor}"' if words.anchor != "start" else ""
    weight = ' font-weight="bold"' if words.bold else ""
    return (
        f'<text x="{_number(words.x)}" y="{_number(words.y)}" font-size="{words.size}"'
        f' fill="{words.colour}"{anchor}{weight}>{escape(words.text)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
