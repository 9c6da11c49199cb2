"""The layout of a picture of a disk: which shape lies where (pure).

From the top: what is read, coloured by the image that it comes from; each image by itself; the
dirty bitmaps; guest offsets; what the textures mean. `svg` and `png` draw the sheet
in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from pynbd.cli.output import in_units
from pynbd.cli.picture.bars import Bars, frame
from pynbd.cli.picture.columns import BitmapLane, Content, DiskPicture, Layer, Source
from pynbd.cli.picture.looks import (
    CLEAN,
    DAMAGED,
    DIRTY,
    READ_ZEROES,
    content_look,
    layer_colour,
    readable_on,
)
from pynbd.cli.picture.shapes import Anchor, Box, Fill, Lane, Sheet, Words

_SOFT = "#5c5c5c"

_WIDTH = 1080
_LEFT, _RIGHT = 40, 1040
_READING_BAR, _BAR, _BITMAP_BAR = 48, 36, 28  # how high they are
_TITLE, _HEADING, _TEXT, _SMALL = 20, 14, 13, 11  # sizes of letters
_LETTER = 0.6  # how wide a letter is, on the average, in parts of its size
_LINE_LETTERS = int((_RIGHT - _LEFT) / (_TEXT * _LETTER))
_NUMBER_ROOM = 24  # how wide an image's part of the upper bar has to be to carry its number
_TITLE_LETTERS = 70
_SHORT_NAME = 16  # letters that a file name gets in any case
_MOST_BITMAPS = 16

_LEGEND = {
    Content.DATA: "data",
    Content.COMPRESSED: "compressed data",
    Content.ZERO: "zeroes",
    Content.CORRUPT: "damaged, cannot be read",
    Content.UNALLOCATED: "nothing: the next image is read, and after the last one zeroes",
}


def share(part: int, whole: int) -> str:
    """A part for people: "1.2 %"; never 0 % of something, or 100 % of less than all."""
    percent = 100 * part / max(whole, 1)
    if 0 < percent < 0.01:
        return "under 0.01 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.3g} %" if percent >= 99 else f"{percent:.2g} %"


def shortened(text: str, length: int) -> str:
    """``text``, with its middle left out if it is longer; what cannot be printed is replaced."""
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def lay_out(picture: DiskPicture) -> Sheet:
    """Where everything of a picture lies."""
    layout = _Layout(picture)
    layout.head()
    if len(picture.layers) > 1:
        layout.reading()
    layout.layers()
    if picture.bitmaps:
        layout.bitmaps()
    layout.offsets()
    layout.legend()
    return Sheet(_WIDTH, layout.y + 24, _file_name(picture.title, 200), layout.lanes)


class _Layout:
    """A sheet while it is laid out; ``y`` is where the next thing goes."""

    def __init__(self, picture: DiskPicture) -> None:
        self.y = 40
        self.lanes: list[Lane] = []
        self._picture = picture
        self._size = picture.size
        self._columns = picture.columns.shape[1]
        self._bars = Bars(picture.size, self._columns, _LEFT, _RIGHT)
        self._read: list[int] = picture.columns.sum(axis=1).tolist()  # by `Source`

    def head(self) -> None:
        lane = self._lane("head")
        title = _file_name(self._picture.title, _TITLE_LETTERS)
        lane.shapes.append(Words(_LEFT, self.y, title, _TITLE, bold=True))
        count = sum(layer.count for layer in self._picture.layers)
        text = f"A disk of {in_units(self._size)} in one image."
        if count > 1:
            text = (
                f"A disk of {in_units(self._size)} in {count} images. Image 1 is on top and takes"
                " what is written. Where it holds nothing, image 2 is read, and so on down."
            )
        self.y += 22
        lane.shapes.append(Words(_LEFT, self.y, text, _TEXT, _SOFT))
        self.y += 12

    def reading(self) -> None:
        damaged, zeroes, *data = self._read
        facts = [f"{in_units(sum(data))} data", f"{in_units(zeroes)} read as zeroes"]
        facts += [f"{in_units(damaged)} damaged"] * (damaged > 0)
        text = " · ".join(facts)
        self._heading("What is read from the disk, and which image it comes from", text)
        lane = self._lane("reading", f"what is read: {text}")
        numbers = range(len(data), 0, -1)
        images = [Fill(f"image-{number}", layer_colour(number), ()) for number in numbers]
        lowest_first = [Source.TOP + number - 1 for number in numbers]
        columns = self._picture.columns
        lane.shapes += self._bars.bar(
            self.y,
            _READING_BAR,
            columns[[Source.CORRUPT, *lowest_first, Source.ZERO]],
            [DAMAGED, *images, READ_ZEROES],
        )
        for image, x in self._bars.alone(columns[Source.TOP :], _NUMBER_ROOM):
            lane.shapes.append(_number(image + 1, x, self.y + _READING_BAR / 2 + 5))
        self.y += _READING_BAR + 10

    def layers(self) -> None:
        if len(self._picture.layers) > 1:
            self._heading("What each image holds itself")
        for number, layer in enumerate(self._picture.layers, 1):
            self._layer(number, layer)

    def _layer(self, number: int, layer: Layer) -> None:
        lane = self._lane(f"image-{number}")
        self.y += 16
        what = f"({layer.format})"
        if layer.count > 1:
            what += f" + {layer.count - 1} below"
        text, *more = self._facts(number, layer)
        lane.tip = " · ".join((f"{shortened(layer.name, 4096)} {what} {text}", *more))
        room = _LINE_LETTERS - len(what) - 7  # for the name, and what can be said beside it
        for fact in more:
            if len(text) + len(fact) + 3 + _SHORT_NAME <= room:
                text += f" · {fact}"
        name = _file_name(layer.name, max(room - len(text), _SHORT_NAME))
        lane.shapes += [
            Fill("number", layer_colour(number), [Box(_LEFT, self.y - 13, 18, 17)]),
            _number(number, _LEFT + 9, self.y),
            Words(_LEFT + 26, self.y, f"{name} {what}", _TEXT, bold=True),
            Words(_RIGHT, self.y, text, _TEXT, _SOFT, "end"),
        ]
        self.y += 9
        looks = [content_look(content, layer_colour(number)) for content in Content]
        end = min(layer.size, self._size)
        lane.shapes += self._bars.bar(self.y, _BAR, layer.columns, looks, end)
        self.y += _BAR + 10

    def _facts(self, number: int, layer: Layer) -> Iterator[str]:
        """What there is to say about a layer in numbers; what matters most comes first."""
        sums: list[int] = layer.columns.sum(axis=1).tolist()
        held = sum(sums) - sums[Content.UNALLOCATED]
        kinds = {
            Content.DATA: "data",
            Content.COMPRESSED: "compressed",
            Content.ZERO: "zeroes",
            Content.CORRUPT: "damaged",
        }
        parts = [f"{in_units(sums[kind])} {word}" for kind, word in kinds.items() if sums[kind]]
        if held:
            yield f"holds {', '.join(parts)}: {share(held, self._size)} of the disk"
        else:
            yield "holds nothing"
        hidden = sums[Content.DATA] + sums[Content.COMPRESSED]
        hidden -= self._read[Source.TOP + number - 1]
        if hidden:
            yield f"{in_units(hidden)} overwritten above"
        if layer.size < self._size:
            yield f"ends at {in_units(layer.size)}"
        elif layer.size > self._size:
            yield f"goes on to {in_units(layer.size)}"

    def bitmaps(self) -> None:
        lanes = self._picture.bitmaps
        more = len(lanes) - _MOST_BITMAPS
        self._heading(
            "What was written since a dirty bitmap began",
            f"{more} more bitmaps are not drawn" if more > 0 else "",
        )
        for bitmap in lanes[:_MOST_BITMAPS]:
            self._bitmap(bitmap)

    def _bitmap(self, bitmap: BitmapLane) -> None:
        dirty = int(bitmap.columns[1].sum())
        text = f"{in_units(dirty)} dirty: {share(dirty, self._size)} of the disk"
        text += f" · in blocks of {in_units(bitmap.granularity)}"
        lane = self._lane("bitmap", f"dirty bitmap {shortened(bitmap.name, 1024)}: {text}")
        self.y += 16
        name = shortened(bitmap.name, _LINE_LETTERS - len(text) - 3)
        lane.shapes += [
            Words(_LEFT, self.y, name, _TEXT, bold=True),
            Words(_RIGHT, self.y, text, _TEXT, _SOFT, "end"),
        ]
        self.y += 8
        lane.shapes += self._bars.bar(self.y, _BITMAP_BAR, bitmap.columns[::-1], [DIRTY, CLEAN])
        self.y += _BITMAP_BAR + 10

    def offsets(self) -> None:
        lane = self._lane("offsets")
        self.y += 6
        for at, x in self._bars.ticks:
            anchor: Anchor = "start" if not at else "end" if at == self._size else "middle"
            lane.shapes.append(Words(x, self.y, in_units(at), _SMALL, _SOFT, anchor))
        self.y += 32

    def legend(self) -> None:
        lane = self._lane("legend")
        x = _LEFT
        for content, text in _LEGEND.items():
            if not any(layer.columns[content].any() for layer in self._picture.layers):
                continue
            box = Box(x, self.y - 12, 26, 16)
            look = content_look(content, _SOFT)
            lane.shapes += [replace(look, boxes=[box]), frame(box)]
            lane.shapes.append(Words(x + 34, self.y, text, _SMALL))
            x += 58 + int(len(text) * _SMALL * _LETTER)
        if self._columns:
            self.y += 24
            text = (
                f"Each column is {in_units(-(-self._size // self._columns))} of the disk, filled in"
                " proportion to what is in it. However little there is, it leaves a mark."
            )
            lane.shapes.append(Words(_LEFT, self.y, text, _SMALL, _SOFT))

    def _lane(self, name: str, tip: str = "") -> Lane:
        self.lanes.append(Lane(name, tip))
        return self.lanes[-1]

    def _heading(self, text: str, facts: str = "") -> None:
        self.y += 24
        lane = self._lane("heading")
        lane.shapes.append(Words(_LEFT, self.y, text, _HEADING, bold=True))
        lane.shapes.append(Words(_RIGHT, self.y, facts, _TEXT, _SOFT, "end"))
        self.y += 10


def _number(number: int, x: float, y: float) -> Words:
    """The number of an image on its colour."""
    colour = readable_on(layer_colour(number))
    return Words(x, y, str(number), _TEXT, colour, "middle", bold=True)


def _file_name(path: str, length: int) -> str:
    return shortened(os.path.basename(path) or path, length)
