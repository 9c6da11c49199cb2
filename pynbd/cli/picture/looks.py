"""How what a disk holds looks in a picture: a texture for each content, a colour for each layer.

Content can be told from its texture alone, and a layer from its number: the colours, which differ
in lightness as well, only help.
"""

from __future__ import annotations

from pynbd.cli.picture.columns import Content
from pynbd.cli.picture.shapes import DANGER, HATCH, INK, STRIPES, Fill

# By the number of the layer, from the active one. Neighbours differ in lightness, and all are told
# apart by the colour-blind (most are those of Okabe and Ito).
_LAYERS = ("#d55e00", "#56b4e9", "#0b3c6f", "#e69f00", "#009e73", "#cc79a7", "#5b3a8c", "#7a9a01")

_NOTHING = "#f3f3f3"

DAMAGED = Fill("corrupt", "#000000", (), DANGER, "#ffd500")
DIRTY = Fill("dirty", INK, ())
CLEAN = Fill("clean", _NOTHING, ())


def content_look(content: Content, colour: str) -> Fill:
    """How a layer's content looks in the colour of that layer."""
    name = content.name.lower()
    match content:
        case Content.CORRUPT:
            return DAMAGED
        case Content.DATA:
            return Fill(name, colour, ())
        case Content.COMPRESSED:
            return Fill(name, colour, (), STRIPES)
        case Content.ZERO:
            return Fill(name, colour, (), HATCH, _tint(colour, 4))
        case Content.UNALLOCATED:
            return Fill(name, _NOTHING, ())


def hidden_look(colour: str) -> Fill:
    """How it looks where the layers above hide what a layer of that colour holds."""
    return Fill("hidden", _tint(colour, 3), ())


def layer_colour(number: int) -> str:
    """The colour of an image, from 1 for the active one to `MAX_LAYERS`."""
    return _LAYERS[number - 1]


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _tint(colour: str, parts: int) -> str:
    """A light tone of a colour: one of so many parts is colour, the others are white."""
    return "#" + bytes(255 - (255 - part) // parts for part in _channels(colour)).hex()


def readable_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = _channels(colour)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
