"""What is said in a picture, and where its bars are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pynbd.block.extent import Int64s
from pynbd.cli.picture.columns import BitmapLane, Columns, Content, DiskPicture, Layer
from pynbd.cli.picture.layout import lay_out, share, shortened
from pynbd.cli.picture.shapes import Fill, Lane, Sheet, Words

SIZE = 1000 << 20

Bars = dict[str, list[tuple[float, float, float, float]]]


def columns(
    size: int, classes: int, rows: Sequence[tuple[int, int | None]], unit: int = 1 << 20
) -> Int64s:
    """From rows of (length, class), in MiB; of the class None there is nothing."""
    made = Columns(size, classes)
    at = 0
    for length, kind in rows:
        end = at + length * unit
        if kind is not None:
            made.add(at, np.array([end]), np.array([kind]))
        at = end
    return made.sums


def picture(bitmaps: int = 1) -> DiskPicture:
    """An overlay with 100 MiB of data and 50 of zeroes, over 400 MiB of data in a base of 500."""
    own = [(100, Content.DATA), (50, Content.ZERO)]
    base = [(400, Content.DATA), (100, Content.UNALLOCATED)]
    base_read = [(150, None), (250, Content.DATA), (600, Content.UNALLOCATED)]
    return DiskPicture(
        title="/images/overlay.qcow2",
        size=SIZE,
        layers=[
            Layer(
                "/images/overlay.qcow2",
                "qcow2",
                SIZE,
                held=columns(SIZE, 5, [*own, (850, Content.UNALLOCATED)]),
                read=columns(SIZE, 5, own),
                file_size=151 << 20,
            ),
            Layer(
                "/images/base.img",
                "raw",
                SIZE // 2,
                held=columns(SIZE, 5, base),
                read=columns(SIZE, 5, base_read),
            ),
        ],
        bitmaps=[
            BitmapLane(f"day{day}", 1 << 16, columns(SIZE, 2, [(150, 1), (850, 0)]))
            for day in range(bitmaps)
        ],
    )


def one_bar(rows: Sequence[tuple[int, int]]) -> Bars:
    """What is drawn of an image of 500 columns of 8 bytes, from rows of (length, class)."""
    made = columns(4000, len(Content), rows, unit=1)
    image = Layer("a", "raw", 4000, made, made)
    return drawn(lane(lay_out(DiskPicture("a", 4000, [image], [])), "image-1"))


def lane(sheet: Sheet, name: str) -> Lane:
    (found,) = (lane for lane in sheet.lanes if lane.name == name)
    return found


def words(sheet: Sheet) -> list[str]:
    shapes = (shape for lane in sheet.lanes for shape in lane.shapes)
    return [shape.text for shape in shapes if isinstance(shape, Words)]


def drawn(lane: Lane) -> Bars:
    """The boxes of a lane by what they stand for."""
    return {
        shape.name: [(box.x, box.y, box.width, box.height) for box in shape.boxes]
        for shape in lane.shapes
        if isinstance(shape, Fill)
    }


def test_what_is_said() -> None:
    text = words(lay_out(picture()))
    for expected in (
        "overlay.qcow2",
        (
            "A disk of 1000 MiB in 2 images. Image 1 is on top and takes what is written. Where it"
            " holds nothing, image 2 is read, and so on down."
        ),
        "350 MiB data · 650 MiB read as zeroes",
        "100 MiB data, 50 MiB zeroes = 15 % of the disk · file: 151 MiB",
        "base.img (raw, base)",
        "400 MiB data = 40 % of the disk · 150 MiB hidden by images above · ends at 500 MiB",
        "Written since bitmap day0",
        "150 MiB dirty = 15 % of the disk · in blocks of 64 KiB",
        "data",
        "zeroes",
        "hidden by an image above",
        "dirty",
        "not allocated: read from the image below; under the last one it reads as zeroes",
    ):
        assert expected in text
    assert "compressed data" not in text  # there is none


def test_offsets_are_where_they_are() -> None:
    """1000 MiB on 1000 pixels from 40 on; 896 MiB would run into the end. Below the upper bar, and
    below the last one.
    """
    upper, lower = (lane for lane in lay_out(picture()).lanes if lane.name == "offsets")
    for found in (upper, lower):
        assert {shape.text: shape.x for shape in found.shapes if isinstance(shape, Words)} == {
            "0 B": 40,
            **{f"{at} MiB": 40 + at for at in range(128, 800, 128)},
            "1000 MiB": 1040,
        }


def test_bars_are_where_the_bytes_are() -> None:
    sheet = lay_out(picture())
    read, overlay, base = (drawn(lane(sheet, name)) for name in ("reading", "image-1", "image-2"))
    bitmap = drawn(lane(sheet, "bitmap"))
    across = {name: [(x, width) for x, _, width, _ in boxes] for name, boxes in read.items()}
    assert across["image-1 data"] == [(40, 100)]
    assert across["image-1 zero"] == [(140, 50)]
    assert across["image-2 data"] == [(190, 250)]
    assert across["image-2 unallocated"] == [(440, 600)]
    across = {name: [(x, width) for x, _, width, _ in boxes] for name, boxes in overlay.items()}
    assert across["data"] == [(40, 100)]
    assert across["zero"] == [(140, 50)]
    assert across["unallocated"] == [(190, 850)]
    across = {name: [(x, width) for x, _, width, _ in boxes] for name, boxes in base.items()}
    assert across["hidden"] == [(40, 150)]
    assert across["data"] == [(190, 250)]
    assert across["unallocated"] == [(440, 100)]
    assert across["grid"] == [(39.5 + at, 1) for at in range(0, 500, 128)]
    assert base["frame"][0][2] == 502  # it is as long as the image
    assert [(x, width) for x, _, width, _ in bitmap["dirty"]] == [(40, 150)]
    # All of a column is one thing here: every box is as high as its bar.
    heights = [{box[3] for box in bar} for bar in (overlay["data"], overlay["unallocated"])]
    assert heights == [{36}, {36}]


def test_lanes_are_below_one_another() -> None:
    sheet = lay_out(picture(bitmaps=3))
    bottom = 0.0
    for found in sheet.lanes:
        bars = [box for name, boxes in drawn(found).items() for box in boxes if name != "number"]
        if bars and found.name != "legend":
            assert min(y for _, y, _, _ in bars) > bottom
            bottom = max(y + height for _, y, _, height in bars)
    assert bottom < sheet.height


def test_a_small_change_on_a_large_disk_is_a_mark() -> None:
    """4 KiB of 1 EiB."""
    size = 1 << 60
    made = Columns(size, len(Content))
    ends = np.array([size // 2, size // 2 + 4096, size])
    made.add(0, ends, np.array([Content.UNALLOCATED, Content.DATA, Content.UNALLOCATED]))
    layer = Layer("a", "raw", size, made.sums, made.sums)
    bars = drawn(lane(lay_out(DiskPicture("a", size, [layer], [])), "image-1"))
    ((x, _, width, height),) = bars["data"]
    assert (x, width) == (540, 2)
    assert height == 4


def test_a_part_of_a_column_is_a_part_of_its_height() -> None:
    bars = one_bar([(2, Content.DATA), (6, Content.ZERO), (3992, Content.UNALLOCATED)])
    (data,), (zero,) = bars["data"], bars["zero"]
    assert (data[3], zero[3]) == (9, 27)
    assert data[1] == zero[1] + zero[3]  # data is below


@pytest.mark.parametrize("bytes_more,pixels", [(0, 20), (3, 20), (5, 22)])
def test_a_block_has_no_steps_at_its_edges(bytes_more: int, pixels: int) -> None:
    """Ten columns of data, and a part of one that is less or more than half."""
    data = 80 + bytes_more
    for rows, x in (
        ([(data, Content.DATA), (4000 - data, Content.UNALLOCATED)], 40),
        ([(4000 - data, Content.UNALLOCATED), (data, Content.DATA)], 1040 - pixels),
    ):
        assert [(box[0], box[2], box[3]) for box in one_bar(rows)["data"]] == [(x, pixels, 36)]


def test_a_piece_of_an_overlay_stands_on_the_floor() -> None:
    """Half a column of data over data of the base, which is hidden there."""
    base = [(80, Content.DATA), (4, None), (3916, Content.DATA)]
    own = [(80, None), (4, Content.DATA)]
    held = [(80, Content.UNALLOCATED), (4, Content.DATA), (3916, Content.UNALLOCATED)]
    layers = [
        Layer("a", "raw", 4000, columns(4000, 5, held, 1), columns(4000, 5, own, 1)),
        Layer(
            "b", "raw", 4000, columns(4000, 5, [(4000, Content.DATA)], 1), columns(4000, 5, base, 1)
        ),
    ]
    sheet = lay_out(DiskPicture("a", 4000, layers, []))
    for name, kind, height in (
        ("reading", "image-1 data", 48),
        ("image-1", "data", 36),
        ("image-2", "hidden", 36),
    ):
        bars = drawn(lane(sheet, name))
        ((x, y, width, high),) = bars[kind]
        assert (x, width, high) == (60, 2, height / 2)
        assert y + high == bars["frame"][1][1]  # the line below


def test_each_image_has_its_number_on_the_upper_bar() -> None:
    """On the bar, or above it if there are only 4 pixels."""
    base = [(200, Content.DATA), (4, None), (796, Content.DATA)]
    own = [(200, None), (4, Content.DATA)]
    layers = [
        replace(picture().layers[0], read=columns(SIZE, 5, own)),
        replace(picture().layers[1], read=columns(SIZE, 5, base)),
    ]
    reading = lane(lay_out(replace(picture(), layers=layers)), "reading")
    numbers = {shape.text: shape for shape in reading.shapes if isinstance(shape, Words)}
    bars = drawn(reading)
    top = bars["frame"][0][1]
    assert numbers["1"].x == 242
    assert numbers["1"].y < bars["leader"][0][1] < top
    assert numbers["2"].y > top


def test_a_disk_in_one_image_has_one_bar() -> None:
    one = picture(bitmaps=0)
    sheet = lay_out(replace(one, layers=one.layers[:1]))
    assert "reading" not in {lane.name for lane in sheet.lanes}
    assert {"A disk of 1000 MiB in one image.", "overlay.qcow2"} <= set(words(sheet))
    assert lane(sheet, "offsets").shapes


def test_an_empty_disk() -> None:
    none = np.zeros((len(Content), 0), np.int64)
    sheet = lay_out(DiskPicture("a", 0, [Layer("a", "raw", 0, none, none)], []))
    assert "holds nothing" in words(sheet)


def test_too_many_bitmaps_are_told() -> None:
    sheet = lay_out(picture(bitmaps=20))
    assert "4 more bitmaps are not drawn" in words(sheet)
    assert sum(lane.name == "bitmap" for lane in sheet.lanes) == 16


def test_words_keep_apart() -> None:
    """A name of any length leaves room for the numbers of the same line: at most 1000 pixels, with
    0.6 of the size of a letter for each.
    """
    long = picture()
    mixed = columns(SIZE, 5, [(101, 1), (102, 2), (103, 3), (194, 4)])
    long = replace(
        long,
        title="n" * 300,
        layers=[
            *(replace(layer, name="n" * 300) for layer in long.layers),
            Layer("n" * 300, "qcow2", SIZE // 2, mixed, 0 * mixed, count=193, file_size=SIZE),
        ],
        bitmaps=[replace(bitmap, name="n" * 300) for bitmap in long.bitmaps],
    )
    lines: dict[float, float] = {}
    for found in lay_out(long).lanes:
        for shape in found.shapes:
            if isinstance(shape, Words) and found.name not in ("offsets", "legend"):
                width = 0.6 * shape.size * len(shape.text)
                lines[shape.y] = lines.get(shape.y, 0.0) + width
    del lines[62]  # the sentence below the title, of known words
    assert max(lines.values()) <= 1000


@pytest.mark.parametrize(
    "part,whole,text",
    [
        (0, 100, "0 %"),
        (0, 0, "0 %"),
        (1, 1 << 40, "under 0.01 %"),
        (12, 1000, "1.2 %"),
        (33, 100, "33 %"),
        (995, 1000, "99.5 %"),
        ((1 << 40) - 1, 1 << 40, "over 99.9 %"),
        (7, 7, "100 %"),
    ],
)
def test_share(part: int, whole: int, text: str) -> None:
    assert share(part, whole) == text


def test_shortened() -> None:
    assert shortened("disk.qcow2", 10) == "disk.qcow2"
    assert shortened("a-long-name.qcow2", 10) == "a-lo…qcow2"
    assert shortened("a\nb\x1b\udcff", 10) == "a�b��"
