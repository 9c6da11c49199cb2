"""What is said in a picture, and where its bars are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pynbd.cli.picture.columns import BitmapLane, Columns, Content, DiskPicture, Layer
from pynbd.cli.picture.layout import lay_out, share, shortened
from pynbd.cli.picture.shapes import Fill, Lane, Sheet, Words

SIZE = 1000 << 20


def columns(size: int, classes: int, rows: Sequence[tuple[int, int]]) -> Columns:
    """From rows of (length, class), in MiB."""
    made = Columns(size, classes)
    ends = np.cumsum([length << 20 for length, _ in rows])
    made.add(0, ends, np.array([kind for _, kind in rows], np.intp))
    return made


def picture(bitmaps: int = 1) -> DiskPicture:
    """An overlay with 100 MiB of data and 50 of zeroes, over 400 MiB of data in a base of 500."""
    overlay = [(100, Content.DATA), (50, Content.ZERO), (850, Content.UNALLOCATED)]
    base = [(400, Content.DATA), (100, Content.UNALLOCATED)]
    read = [(100, 2), (50, 1), (250, 3), (600, 1)]
    return DiskPicture(
        title="/images/overlay.qcow2",
        size=SIZE,
        columns=columns(SIZE, 4, read).sums,
        layers=[
            Layer("/images/overlay.qcow2", "qcow2", SIZE, columns(SIZE, 5, overlay).sums),
            Layer("/images/base.raw", "raw", SIZE // 2, columns(SIZE, 5, base).sums),
        ],
        bitmaps=[
            BitmapLane(f"day{day}", 1 << 16, columns(SIZE, 2, [(150, 1), (850, 0)]).sums)
            for day in range(bitmaps)
        ],
    )


def lane(sheet: Sheet, name: str) -> Lane:
    (found,) = (lane for lane in sheet.lanes if lane.name == name)
    return found


def words(sheet: Sheet) -> list[str]:
    shapes = (shape for lane in sheet.lanes for shape in lane.shapes)
    return [shape.text for shape in shapes if isinstance(shape, Words)]


def drawn(lane: Lane) -> dict[str, list[tuple[float, float, float, float]]]:
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
        "overlay.qcow2 (qcow2)",
        "holds 100 MiB data, 50 MiB zeroes: 15 % of the disk",
        "base.raw (raw)",
        "holds 400 MiB data: 40 % of the disk · 150 MiB overwritten above · ends at 500 MiB",
        "150 MiB dirty: 15 % of the disk · in blocks of 64 KiB",
        "data",
        "zeroes",
    ):
        assert expected in text
    assert "compressed data" not in text  # there is none


def test_offsets_are_where_they_are() -> None:
    """1000 MiB on 1000 pixels from 40 on; 896 MiB would run into the end."""
    offsets = {shape.text: shape.x for shape in lane(lay_out(picture()), "offsets").shapes}
    assert offsets == {
        "0 B": 40,
        **{f"{at} MiB": 40 + at for at in range(128, 800, 128)},
        "1000 MiB": 1040,
    }


def test_bars_are_where_the_bytes_are() -> None:
    sheet = lay_out(picture())
    read, overlay, base = (drawn(lane(sheet, name)) for name in ("reading", "image-1", "image-2"))
    bitmap = drawn(lane(sheet, "bitmap"))
    across = {name: [(x, width) for x, _, width, _ in boxes] for name, boxes in read.items()}
    assert across["image-1"] == [(40, 100)]
    assert across["zero"] == [(140, 50), (440, 600)]
    assert across["image-2"] == [(190, 250)]
    across = {name: [(x, width) for x, _, width, _ in boxes] for name, boxes in overlay.items()}
    assert across["data"] == [(40, 100)]
    assert across["zero"] == [(140, 50)]
    assert across["unallocated"] == [(190, 850)]
    assert [(x, width) for x, _, width, _ in base["unallocated"]] == [(440, 100)]
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
    """4 KiB of 1 EiB, beside data and alone."""
    size = 1 << 60
    made = Columns(size, len(Content))
    ends = np.array([size // 2, size // 2 + 4096, size])
    made.add(0, ends, np.array([Content.UNALLOCATED, Content.DATA, Content.UNALLOCATED]))
    layer = Layer("a", "raw", size, made.sums)
    read = np.zeros((3, 500), np.int64)
    bars = drawn(lane(lay_out(DiskPicture("a", size, read, [layer], [])), "image-1"))
    ((x, _, width, height),) = bars["data"]
    assert (x, width) == (540, 2)
    assert height == 4


def test_a_part_of_a_column_is_a_part_of_its_height() -> None:
    made = Columns(4000, len(Content))
    made.add(0, np.array([2, 8, 4000]), np.array([Content.DATA, Content.ZERO, Content.UNALLOCATED]))
    read = np.zeros((3, 500), np.int64)
    layer = Layer("a", "raw", 4000, made.sums)
    bars = drawn(lane(lay_out(DiskPicture("a", 4000, read, [layer], [])), "image-1"))
    (data,), (zero,) = bars["data"], bars["zero"]
    assert (data[3], zero[3]) == (9, 27)
    assert data[1] == zero[1] + zero[3]  # data is below


def test_a_disk_in_one_image_has_one_bar() -> None:
    one = picture(bitmaps=0)
    sheet = lay_out(replace(one, layers=one.layers[:1], columns=one.columns[:3]))
    assert "reading" not in {lane.name for lane in sheet.lanes}
    assert "A disk of 1000 MiB in one image." in words(sheet)


def test_an_empty_disk() -> None:
    none = np.zeros((len(Content), 0), np.int64)
    sheet = lay_out(DiskPicture("a", 0, none[:3], [Layer("a", "raw", 0, none)], []))
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
    mixed = columns(SIZE, 5, [(101, 1), (102, 2), (103, 3), (194, 4)]).sums
    long = replace(
        long,
        title="n" * 300,
        layers=[
            *(replace(layer, name="n" * 300) for layer in long.layers),
            Layer("n" * 300, "qcow2", SIZE // 2, mixed, count=193),
        ],
        columns=np.vstack((long.columns, np.zeros_like(long.columns[:1]))),
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
