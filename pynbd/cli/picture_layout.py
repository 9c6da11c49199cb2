"""The layout of a picture of a disk: which shape lies where (pure).

`lay_out` makes a `Sheet` of boxes and words, which `picture_svg` and `picture_png` draw in the same
way. Lengths are pixels, from the upper left corner.

A column of a bar is divided by what is in it, from the bottom; whatever is in it at all, however
little, gets at least `_MARK` pixels of it. Content can be told from its texture alone, and a layer
from its number: the colours, which differ in lightness as well, only help.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pynbd.block.extent import Int64s
from pynbd.cli.picture_columns import BitmapLane, Content, DiskPicture, Layer, Source

# A texture is a tile of ink (#) on paper, laid from the corner of the sheet.
Texture = tuple[str, ...]
PLAIN: Texture = ("#",)
STRIPES: Texture = ("#", "#", "#", ".")
HATCH: Texture = ("#...", ".#..", "..#.", "...#")
CHECKERS: Texture = ("####....",) * 4 + ("....####",) * 4
DANGER: Texture = ("##..", ".##.", "..##", "#..#")

BACKGROUND = "#ffffff"
_TEXT = "#1a1a1a"
_SOFT = "#5c5c5c"
_LINE = "#8a8a8a"
_GRID = "#dddddd"

# By the number of the layer, from the active one. Neighbours differ in lightness, and all are told
# apart by the colour-blind (most are those of Okabe and Ito).
_LAYERS = ("#d55e00", "#56b4e9", "#0b3c6f", "#e69f00", "#009e73", "#cc79a7", "#5b3a8c", "#7a9a01")
_DIRTY = "#1a1a1a"

_WIDTH = 1080
_LEFT, _RIGHT = 40, 1040
_BAR = 36  # how high a bar is
_READING_BAR = 48
_BITMAP_BAR = 20
_MARK = 5
_TITLE, _HEADING, _WORDS, _SMALL = 20, 14, 13, 11  # sizes of letters
_LETTER = 0.62  # how wide a letter is at most, on the average, in parts of its size
_TICKS = 10
_NUMBER_ROOM = 18  # how wide one layer's part of the upper bar has to be to carry its number
_PLACE_ROOM = 80  # how wide a guest offset is at most, below the bars
_MOST_BITMAPS = 16

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(frozen=True)
class Box:
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
    size: int = _WORDS
    colour: str = _TEXT
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


@dataclass
class Lane:
    """What belongs together; ``name`` is for programs, ``tip`` is shown to who points at it."""

    name: str
    tip: str = ""
    shapes: list[Fill | Words] = field(default_factory=list)


@dataclass(frozen=True)
class Sheet:
    width: int
    height: int
    title: str
    lanes: Sequence[Lane]


def human(count: int, digits: int = 3) -> str:
    """A number of bytes for people: three digits of it, as in "12.4 MiB"."""
    power = max(min((count.bit_length() - 1) // 10, len(_UNITS) - 1), 0)
    value = count / (1 << 10 * power)
    decimals = max(digits - len(str(int(value))), 0)
    text = f"{value:.{decimals}f}"
    return f"{text.rstrip('0').rstrip('.') if decimals else text} {_UNITS[power]}"


def share(part: int, whole: int) -> str:
    """A part for people: "1.2 %", and never 0 % of something."""
    percent = 100 * part / whole if whole else 0.0
    if part and percent < 0.01:
        return "under 0.01 %"
    return f"{percent:.{0 if percent >= 10 else 1 if percent >= 1 else 2}f} %"


def shortened(text: str, length: int) -> str:
    """``text``, with its middle left out if it is longer; what cannot be printed is replaced."""
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def lay_out(picture: DiskPicture) -> Sheet:
    """Where everything of a picture lies."""
    disk = _Layout(picture)
    disk.head()
    disk.reading()
    disk.layers()
    disk.bitmaps()
    disk.axis()
    disk.legend()
    return Sheet(_WIDTH, disk.y + 12, disk.title, disk.lanes)


class _Layout:
    """A sheet while it is laid out, from the top; ``y`` is where the next thing goes."""

    def __init__(self, picture: DiskPicture) -> None:
        self.picture = picture
        self.title = shortened(os.path.basename(picture.title) or picture.title, 80)
        self.y = 28
        self.lanes: list[Lane] = []
        count = picture.columns.shape[1]
        edges = [picture.size * column // max(count, 1) for column in range(count + 1)]
        self._widths: Int64s = np.array(edges[1:], np.int64) - np.array(edges[:-1], np.int64)
        self._column = (_RIGHT - _LEFT) / max(count, 1)  # its width in pixels
        self._places = self._marked_places()
        # Each layer's data that is read, and not hidden by a layer above.
        self._seen: list[int] = picture.columns.sum(axis=1).tolist()

    # The parts, from the top

    def head(self) -> None:
        size, layers = human(self.picture.size), sum(layer.count for layer in self.picture.layers)
        lane = self._lane("head")
        lane.shapes.append(Words(_LEFT, self.y + 12, self.title, _TITLE, bold=True))
        if layers == 1:
            text = f"A disk of {size} in one image."
        else:
            text = (
                f"A disk of {size} in {layers} images. Image 1 is on top and takes what is written."
                " Where it holds nothing, image 2 is read, and so on down."
            )
        self.y += 34
        lane.shapes.append(Words(_LEFT, self.y, text, colour=_SOFT))
        self.y += 12

    def reading(self) -> None:
        lost, zeroes, *data = self._seen
        facts = [f"{human(sum(data))} of data", f"{human(zeroes)} read as zeroes"]
        facts += [f"{human(lost)} damaged"] * (lost > 0)
        several = len(data) > 1
        self._heading(
            "What is read from the disk" + ", and which image it comes from" * several,
            " · ".join(facts),
        )
        lane = self._lane("reading", f"What is read: {', '.join(facts)}")
        looks = [
            Fill(Source.CORRUPT.name.lower(), "#000000", (), DANGER, "#ffd500"),
            *(Fill(f"image-{number}", _colour(number), ()) for number in range(len(data), 0, -1)),
            Fill(Source.ZERO.name.lower(), "#d0d0d0", (), HATCH, "#f6f6f6"),
        ]
        columns = self.picture.columns
        order = [Source.CORRUPT, *range(len(columns) - 1, Source.TOP - 1, -1), Source.ZERO]
        self._bar(lane, _READING_BAR, columns[order], looks)
        if several:
            lane.shapes += self._numbers(columns[Source.TOP :])
        self.y += _READING_BAR + 10

    def layers(self) -> None:
        if len(self.picture.layers) > 1:
            self._heading("What each image holds itself")
        for number, layer in enumerate(self.picture.layers, 1):
            self._layer(number, layer)

    def _layer(self, number: int, layer: Layer) -> None:
        sums: list[int] = layer.columns.sum(axis=1).tolist()
        held = sum(sums) - sums[Content.UNALLOCATED]
        kinds = ("damaged", "of data", "of compressed data", "of zeroes")
        facts = [f"{human(part)} {kind}" for part, kind in zip(sums, kinds, strict=False) if part]
        text = f"holds {', '.join(facts)}: {share(held, self.picture.size)} of the disk"
        text = text if held else "holds nothing"
        hidden = sums[Content.DATA] + sums[Content.COMPRESSED]
        hidden -= self._seen[Source.TOP + number - 1]
        text += f" · {human(hidden)} hidden by images above" * (hidden > 0)
        text += f" · is {human(layer.size)} long" * (layer.size != self.picture.size)
        name = os.path.basename(layer.name) or layer.name
        what = f"({layer.format})"
        if layer.count > 1:
            what += f" and {layer.count - 1} below it, together"
        room = int((_RIGHT - _LEFT - 36) / (_WORDS * _LETTER)) - len(text) - len(what)
        label = f"{shortened(name, max(room, 16))} {what}"
        lane = self._lane(f"image-{number}", f"{shortened(layer.name, 4096)} {what} {text}")
        self.y += 16
        colour = _colour(number)
        lane.shapes += [
            Fill("number", colour, [Box(_LEFT, self.y - 13, 18, 17)]),
            _centred(str(number), _LEFT + 9, self.y, colour),
            Words(_LEFT + 26, self.y, label, bold=True),
            Words(_RIGHT, self.y, text, colour=_SOFT, anchor="end"),
        ]
        self.y += 9
        looks = [_content(content, colour) for content in Content]
        self._bar(lane, _BAR, layer.columns, looks)
        self.y += _BAR + 10

    def bitmaps(self) -> None:
        lanes = self.picture.bitmaps
        if not lanes:
            return
        more = len(lanes) - _MOST_BITMAPS
        self._heading(
            "What was written since a dirty bitmap began",
            f"{more} more bitmaps are not drawn" if more > 0 else "",
        )
        for bitmap in lanes[:_MOST_BITMAPS]:
            self._bitmap(bitmap)

    def _bitmap(self, bitmap: BitmapLane) -> None:
        dirty = int(bitmap.columns[1].sum())
        grain = human(bitmap.granularity)
        text = f"{human(dirty)} dirty: {share(dirty, self.picture.size)} of the disk"
        text += f" · in blocks of {grain}"
        lane = self._lane("bitmap", f"dirty bitmap {shortened(bitmap.name, 1024)}: {text}")
        self.y += 16
        room = int((_RIGHT - _LEFT - 20) / (_WORDS * _LETTER)) - len(text)
        lane.shapes += [
            Words(_LEFT, self.y, shortened(bitmap.name, room), bold=True),
            Words(_RIGHT, self.y, text, colour=_SOFT, anchor="end"),
        ]
        self.y += 8
        looks = [Fill("dirty", _DIRTY, ()), Fill("clean", "#f4f4f4", ())]
        self._bar(lane, _BITMAP_BAR, bitmap.columns[::-1], looks)
        self.y += _BITMAP_BAR + 10

    def axis(self) -> None:
        lane = self._lane("axis")
        size = self.picture.size
        for at, x in self._places:
            anchor: Literal["start", "middle", "end"] = "middle"
            if at in (0, size):
                anchor = "end" if at else "start"
            text = human(at, 4) if at else "0"
            lane.shapes.append(Words(x, self.y + 6, text, _SMALL, _SOFT, anchor))
        self.y += 36

    def legend(self) -> None:
        lane = self._lane("legend")
        present = [
            any(layer.columns[content].any() for layer in self.picture.layers)
            for content in Content
        ]
        x = _LEFT
        for look, text in self._explained(present):
            width = 34 + len(text) * _SMALL * _LETTER + 16
            if x + width > _RIGHT + 16:
                x, self.y = _LEFT, self.y + 24
            box = Box(x, self.y - 12, 26, 16)
            lane.shapes += [replace(look, boxes=[box]), *_frame(box)]
            lane.shapes.append(Words(x + 34, self.y, text, _SMALL))
            x += int(width)
        self.y += 26
        count = self.picture.columns.shape[1]
        if count:
            text = (
                f"A column of one pixel is {human(-(-self.picture.size // count))} of the disk, and"
                " filled in proportion to what is in it. However little there is, it leaves a mark."
            )
            lane.shapes.append(Words(_LEFT, self.y, text, _SMALL, _SOFT))
            self.y += 12

    def _explained(self, present: Sequence[bool]) -> Iterator[tuple[Fill, str]]:
        words = {
            Content.CORRUPT: "damaged: cannot be read",
            Content.DATA: "data",
            Content.COMPRESSED: "compressed data",
            Content.ZERO: "zeroes",
            Content.UNALLOCATED: "nothing: the next image is read (after the last one, zeroes)",
        }
        for content in (*tuple(Content)[1:], Content.CORRUPT):
            if present[content]:
                yield _content(content, "#5c5c5c"), words[content]
        if self.picture.bitmaps:
            yield Fill("dirty", _DIRTY, ()), "written since the bitmap began"

    # The pieces

    def _lane(self, name: str, tip: str = "") -> Lane:
        self.lanes.append(Lane(name, tip))
        return self.lanes[-1]

    def _heading(self, text: str, facts: str = "") -> None:
        self.y += 24
        lane = self._lane("heading")
        lane.shapes.append(Words(_LEFT, self.y, text, _HEADING, bold=True))
        lane.shapes.append(Words(_RIGHT, self.y, facts, colour=_SOFT, anchor="end"))
        self.y += 10

    def _bar(self, lane: Lane, height: int, columns: Int64s, looks: Sequence[Fill]) -> None:
        """A bar of ``columns``, whose classes look so, from the bottom to the top."""
        lane.shapes += [
            replace(look, boxes=boxes)
            for look, boxes in zip(looks, self._boxes(columns, height), strict=True)
            if boxes
        ]
        lane.shapes += _frame(Box(_LEFT, self.y, _RIGHT - _LEFT, height))
        ticks = [Box(x - 0.5, self.y + height + 1, 1, 4) for _, x in self._places]
        lane.shapes.append(Fill("tick", _LINE, ticks))

    def _boxes(self, columns: Int64s, height: int) -> Iterator[list[Box]]:
        """The boxes of each class; equal neighbours are one."""
        present = columns > 0
        several = np.maximum(present.sum(axis=0), 1)
        mark = np.minimum(_MARK, height // several)
        parts = mark * present + (height - mark * several) * (columns / self._widths)
        tops = np.rint(parts.cumsum(axis=0)).astype(np.int64)
        bottom = np.zeros_like(tops[0])
        for top in tops:
            edges = np.flatnonzero(np.diff(top * (height + 1) + bottom, prepend=-1, append=-1))
            rows = zip(
                edges[:-1].tolist(),
                edges[1:].tolist(),
                bottom[edges[:-1]].tolist(),
                top[edges[:-1]].tolist(),
                strict=True,
            )
            yield [
                Box(
                    _LEFT + first * self._column,
                    self.y + height - high,
                    (last - first) * self._column,
                    high - low,
                )
                for first, last, low, high in rows
                if low < high
            ]
            bottom = top

    def _marked_places(self) -> list[tuple[int, float]]:
        """The guest offsets that are written below the bars, and where."""
        size, width = self.picture.size, _RIGHT - _LEFT
        step = 1 << max(-(-size // _TICKS) - 1, 0).bit_length()
        places = [(at, width * at / size) for at in range(0, size, step)]
        # The last place is the end; what would run into it gives way.
        return [
            *((at, _LEFT + x) for at, x in places if not at or x < width - _PLACE_ROOM),
            (size, _RIGHT),
        ]

    def _numbers(self, columns: Int64s) -> Iterator[Words]:
        """The number of each layer where it is nearly alone over a good stretch."""
        alone = columns > self._widths * 0.9
        number = np.where(alone.any(axis=0), alone.argmax(axis=0) + 1, 0)
        edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
        for first, last in zip(edges.tolist(), edges[1:].tolist(), strict=False):
            layer = int(number[first])
            if layer and (last - first) * self._column >= _NUMBER_ROOM:
                middle = _LEFT + (first + last) / 2 * self._column
                yield _centred(str(layer), middle, self.y + _READING_BAR / 2 + 5, _colour(layer))


def _content(content: Content, colour: str) -> Fill:
    """How a layer's content looks in the colour of that layer."""
    name = content.name.lower()
    match content:
        case Content.CORRUPT:
            return Fill(name, "#000000", (), DANGER, "#ffd500")
        case Content.DATA:
            return Fill(name, colour, ())
        case Content.COMPRESSED:
            return Fill(name, colour, (), STRIPES)
        case Content.ZERO:
            return Fill(name, colour, (), HATCH, _tint(colour))
        case Content.UNALLOCATED:
            return Fill(name, "#f0f0f0", (), CHECKERS)


def _colour(number: int) -> str:
    return _LAYERS[(number - 1) % len(_LAYERS)]


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _tint(colour: str) -> str:
    """A light tone of a colour."""
    return "#" + bytes(255 - (255 - part) // 5 for part in _channels(colour)).hex()


def _centred(text: str, x: float, y: float, on: str) -> Words:
    """A number on a colour, black or white, whichever is easier to read there."""
    red, green, blue = _channels(on)
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return Words(x, y, text, _WORDS, "#000000" if light else "#ffffff", "middle", bold=True)


def _frame(box: Box) -> Iterable[Fill]:
    """A thin line around a box."""
    right, bottom = box.x + box.width, box.y + box.height
    yield Fill(
        "frame",
        _LINE,
        [
            Box(box.x - 1, box.y - 1, box.width + 2, 1),
            Box(box.x - 1, bottom, box.width + 2, 1),
            Box(box.x - 1, box.y, 1, box.height),
            Box(right, box.y, 1, box.height),
        ],
    )
