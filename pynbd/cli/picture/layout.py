"""The layout of a picture of a disk: which shape lies where (pure).

From the top: what is read, coloured by the image that it comes from; each image by itself; the
dirty bitmaps; what the textures mean. `svg` and `png` draw the sheet in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from pynbd.block.extent import Int64s
from pynbd.cli.output import in_units
from pynbd.cli.picture.bars import Bars, frame
from pynbd.cli.picture.columns import BitmapLane, Content, DiskPicture, Layer
from pynbd.cli.picture.looks import (
    CLEAN,
    DIRTY,
    content_look,
    hidden_look,
    layer_colour,
    readable_on,
)
from pynbd.cli.picture.shapes import INK, Anchor, Box, Fill, Lane, Sheet, Words

_SOFT = "#5c5c5c"

_WIDTH = 1080
_LEFT, _RIGHT = 40, 1040
_READING_BAR, _BAR, _BITMAP_BAR = 48, 36, 28  # how high they are
_TITLE, _HEADING, _TEXT, _SMALL = 20, 14, 13, 11  # sizes of letters
_LETTER = 0.6  # how wide a letter is, on the average, in parts of its size
_LINE_LETTERS = int((_RIGHT - _LEFT) / (_TEXT * _LETTER))
_NUMBER_ROOM = 14  # how wide an image's part of the upper bar has to be to carry its number
_NUMBER_STEP = 10  # how far apart the numbers above it are
_TITLE_LETTERS = 70
_SHORT_NAME = 16  # letters that a file name gets in any case
_MOST_BITMAPS = 16

_HELD = {
    Content.DATA: "data",
    Content.COMPRESSED: "compressed",
    Content.ZERO: "zeroes",
    Content.CORRUPT: "damaged",
}
_LEGEND = {
    Content.DATA: "data",
    Content.COMPRESSED: "compressed data",
    Content.ZERO: "zeroes",
    Content.CORRUPT: "damaged, cannot be read",
}
_UNALLOCATED = "not allocated: read from the image below; under the last one it reads as zeroes"


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
    layout.bitmaps()
    layout.legend()
    return Sheet(_WIDTH, layout.y + 24, _file_name(picture.title, 200), layout.lanes)


class _Layout:
    """A sheet while it is laid out; ``y`` is where the next thing goes."""

    def __init__(self, picture: DiskPicture) -> None:
        self.y = 40
        self.lanes: list[Lane] = []
        self._picture = picture
        self._size = picture.size
        self._columns = picture.layers[0].held.shape[1]
        self._bars = Bars(picture.size, self._columns, _LEFT, _RIGHT)

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
        contents = [Content.CORRUPT, Content.DATA, Content.ZERO, Content.UNALLOCATED]
        read = np.stack([layer.read for layer in self._picture.layers])
        read[:, Content.DATA] += read[:, Content.COMPRESSED]
        damaged, data, *zeroes = read[:, contents].sum(axis=(0, 2)).tolist()
        facts = [f"{in_units(data)} data", f"{in_units(sum(zeroes))} read as zeroes"]
        facts += [f"{in_units(damaged)} damaged"] * (damaged > 0)
        text = " · ".join(facts)
        self._heading("What is read from the disk, and which image it comes from", text)
        lane = self._lane("reading", f"what is read: {text}")
        numbers = self._numbers(read[:, Content.DATA])
        looks = [
            replace(look, name=f"image-{number} {look.name}")
            for number in range(1, len(read) + 1)
            for look in (content_look(content, layer_colour(number)) for content in contents)
        ]
        columns = np.concatenate(read[:, contents])
        lane.shapes += [*self._bars.bar(self.y, _READING_BAR, columns, looks), *numbers]
        self.y += _READING_BAR + 10
        self._offsets()

    def _numbers(self, data: Int64s) -> Sequence[Fill | Words]:
        """The numbers of the images on the bar that comes next; above it, which then goes down,
        those that have no room there.
        """
        inside = list(self._bars.alone(data, _NUMBER_ROOM))
        missing = {image for image, columns in enumerate(data) if columns.any()}
        missing -= {image for image, _ in inside}
        self.y += 16 if missing else 0
        shapes: list[Fill | Words] = [
            _number(image + 1, x, self.y + _READING_BAR / 2 + 5) for image, x in inside
        ]
        free = 0.0
        for x, image in sorted((self._bars.most(data[image]), image) for image in missing):
            place = max(x, free)
            if place - x < _NUMBER_STEP:
                text = Words(place, self.y - 8, str(image + 1), _SMALL, INK, "middle", bold=True)
                shapes += [Fill("leader", INK, [Box(x - 0.5, self.y - 6, 1, 5)]), text]
                free = place + _NUMBER_STEP
        return shapes

    def layers(self) -> None:
        if len(self._picture.layers) > 1:
            self._heading("What each image holds itself")
        for number, layer in enumerate(self._picture.layers, 1):
            self._layer(number, layer)
        if not self._picture.bitmaps:
            self._offsets()

    def _layer(self, number: int, layer: Layer) -> None:
        lane = self._lane(f"image-{number}")
        self.y += 16
        what = self._kind(number, layer)
        text, *more = self._facts(layer)
        lane.tip = " · ".join((f"{shortened(layer.name, 4096)}{what}: {text}", *more))
        room = _LINE_LETTERS - len(what) - 7  # for the name, and what can be said beside it
        least = min(len(_file_name(layer.name, room)), _SHORT_NAME)
        for fact in more:
            if len(text) + len(fact) + 3 + least <= room:
                text += f" · {fact}"
        name = _file_name(layer.name, max(room - len(text), least))
        lane.shapes += [
            Fill("number", layer_colour(number), [Box(_LEFT, self.y - 13, 18, 17)]),
            _number(number, _LEFT + 9, self.y),
            Words(_LEFT + 26, self.y, f"{name}{what}", _TEXT, bold=True),
            Words(_RIGHT, self.y, text, _TEXT, _SOFT, "end"),
        ]
        self.y += 9
        colour = layer_colour(number)
        *looks, nothing = [content_look(content, colour) for content in Content]
        *read, _ = layer.read
        *_, unallocated = layer.held
        columns = np.stack([layer.hidden, *read, unallocated])
        end = min(layer.size, self._size)
        looks = [hidden_look(colour), *looks, nothing]
        lane.shapes += self._bars.bar(self.y, _BAR, columns, looks, end)
        self.y += _BAR + 10

    def _kind(self, number: int, layer: Layer) -> str:
        """What a file name does not say about a layer."""
        said = layer.name.endswith(f".{layer.format}")
        words = [] if said else [layer.format]
        if layer.count == 1 and number == len(self._picture.layers) > 1:
            words.append("base")
        text = f" ({', '.join(words)})" if words else ""
        return text + (f" + {layer.count - 1} below" if layer.count > 1 else "")

    def _facts(self, layer: Layer) -> Iterator[str]:
        """What there is to say about a layer in numbers; what matters most comes first."""
        sums: list[int] = layer.held.sum(axis=1).tolist()
        parts = [f"{in_units(sums[kind])} {word}" for kind, word in _HELD.items() if sums[kind]]
        if parts:
            held = sum(sums) - sums[Content.UNALLOCATED]
            yield f"{', '.join(parts)} = {share(held, self._size)} of the disk"
        else:
            yield "holds nothing"
        if hidden := int(layer.hidden.sum()):
            yield f"{in_units(hidden)} hidden by images above"
        if layer.size < self._size:
            yield f"ends at {in_units(layer.size)}"
        elif layer.size > self._size:
            yield f"goes on to {in_units(layer.size)}"
        if layer.file_size is not None:
            files = "file" if layer.count == 1 else "files"
            yield f"{files}: {in_units(layer.file_size)}"

    def bitmaps(self) -> None:
        bitmaps = self._picture.bitmaps
        for bitmap in bitmaps[:_MOST_BITMAPS]:
            self._bitmap(bitmap)
        if bitmaps:
            self._offsets()
        if (more := len(bitmaps) - _MOST_BITMAPS) > 0:
            self._heading(f"{more} more bitmaps are not drawn")

    def _bitmap(self, bitmap: BitmapLane) -> None:
        dirty = int(bitmap.columns[1].sum())
        text = f"{in_units(dirty)} dirty = {share(dirty, self._size)} of the disk"
        text += f" · in blocks of {in_units(bitmap.granularity)}"
        heading = "Written since bitmap "
        room = (_LINE_LETTERS - len(text) - 3) * _TEXT // _HEADING - len(heading)
        self._heading(heading + shortened(bitmap.name, room), text)
        lane = self._lane("bitmap", f"dirty bitmap {shortened(bitmap.name, 1024)}: {text}")
        lane.shapes += self._bars.bar(self.y, _BITMAP_BAR, bitmap.columns[::-1], [DIRTY, CLEAN])
        self.y += _BITMAP_BAR + 10

    def _offsets(self) -> None:
        """The guest offsets at the ticks of the last bar, 10 pixels above."""
        lane = self._lane("offsets")
        self.y += 8
        for at, x in self._bars.ticks:
            anchor: Anchor = "start" if not at else "end" if at == self._size else "middle"
            lane.shapes.append(Words(x, self.y, in_units(at), _SMALL, _SOFT, anchor))
        self.y += 8

    def legend(self) -> None:
        lane = self._lane("legend")
        x = _LEFT
        self.y += 26
        for look, text in self._legend():
            width = 34 + int(len(text) * _SMALL * _LETTER)
            if x + width > _RIGHT:
                x, self.y = _LEFT, self.y + 24
            box = Box(x, self.y - 12, 26, 16)
            lane.shapes += [replace(look, boxes=[box]), frame(box)]
            lane.shapes.append(Words(x + 34, self.y, text, _SMALL))
            x += width + 24
        if self._columns:
            self.y += 24
            text = (
                f"Each column is {in_units(-(-self._size // self._columns))} of the disk, filled in"
                " proportion to what is in it. Very small amounts are drawn larger than they are."
            )
            lane.shapes.append(Words(_LEFT, self.y, text, _SMALL, _SOFT))

    def _legend(self) -> Iterator[tuple[Fill, str]]:
        """What is drawn, and what it means."""
        layers = self._picture.layers
        for content, text in _LEGEND.items():
            if any(layer.read[content].any() for layer in layers):
                yield content_look(content, _SOFT), text
        if any(layer.hidden.any() for layer in layers):
            yield hidden_look(_SOFT), "hidden by an image above"
        if self._picture.bitmaps:
            yield DIRTY, "dirty"
        if any(layer.held[Content.UNALLOCATED].any() for layer in layers):
            yield content_look(Content.UNALLOCATED, _SOFT), _UNALLOCATED

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
