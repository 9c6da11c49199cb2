"""The shapes that a picture of a disk is made of: boxes that are filled, and words.

Lengths are pixels, from the upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

BACKGROUND = "#ffffff"
INK = "#1a1a1a"

# A texture is a tile of ink (#) on paper, laid from the corner of the sheet.
Texture = tuple[str, ...]
PLAIN: Texture = ("#",)
STRIPES: Texture = ("#", "#", "#", ".")
HATCH: Texture = ("#.....", ".#....", "..#...", "...#..", "....#.", ".....#")
DANGER: Texture = ("##..", ".##.", "..##", "#..#")

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Box:
    """A place on the sheet."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Fill:
    """Boxes that look the same; ``name`` says what they stand for."""

    name: str
    ink: str
    boxes: Sequence[Box]
    texture: Texture = PLAIN
    paper: str = BACKGROUND


@dataclass(frozen=True)
class Words:
    """One line of text, whose base line is at ``y``."""

    x: float
    y: float
    text: str
    size: int
    colour: str = INK
    anchor: Anchor = "start"
    bold: bool = False


@dataclass
class Lane:
    """What belongs together; ``name`` is for programs, ``tip`` is shown to who points at it."""

    name: str
    tip: str = ""
    shapes: list[Fill | Words] = field(default_factory=list)


@dataclass(frozen=True)
class Sheet:
    """All of a picture; later lanes and shapes lie on top of earlier ones."""

    width: int
    height: int
    title: str
    lanes: Sequence[Lane]
