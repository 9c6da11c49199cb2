"""The SVG of a picture, read back as XML and held against what qemu-img says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np

from interop import peers, samples
from pynbd.block.chain import open_image
from pynbd.cli.picture.columns import COLUMNS, MAX_LAYERS, DiskPicture, Layer, picture_of
from pynbd.cli.picture.drawing import draw
from pynbd.cli.picture.layout import lay_out
from pynbd.cli.picture.shapes import HATCH, Box, Fill, Lane, Sheet, Words
from pynbd.cli.picture.svg import svg

NS = "{http://www.w3.org/2000/svg}"
SCREEN = 1000  # pixels of a bar, from 40 on


def lane(root: ET.Element, name: str) -> ET.Element:
    (found,) = root.findall(f"{NS}g[@class='{name}']")
    return found


def heights(lane: ET.Element, name: str) -> list[float]:
    """How much of each column of a bar is of one kind."""
    found = [0.0] * COLUMNS
    for rect in lane.findall(f"{NS}g[@class='{name}']/{NS}rect"):
        x, width, height = (float(rect.attrib[key]) for key in ("x", "width", "height"))
        scale = COLUMNS / SCREEN
        for column in range(round((x - 40) * scale), round((x - 40 + width) * scale)):
            assert not found[column]
            found[column] = height
    return found


def parts(size: int, rows: Iterable[dict[str, int]]) -> list[Fraction]:
    """How much of each column some rows of ``qemu-img map`` make up."""
    ranges = [(row["start"], row["start"] + row["length"]) for row in rows]
    found = []
    for column in range(COLUMNS):
        start, end = size * column // COLUMNS, size * (column + 1) // COLUMNS
        inside = sum(max(min(end, last) - max(start, first), 0) for first, last in ranges)
        found.append(Fraction(inside, end - start))
    return found


def assert_shows(found: list[float], expected: list[Fraction], height: int) -> None:
    """Nothing where there is nothing, all where there is all, and else a part of about that; at the
    edge of a block, the block has all of the column or nothing.
    """
    beside = zip([Fraction(0), *expected], [*expected[1:], Fraction(0)], strict=False)
    for high, part, neighbours in zip(found, expected, beside, strict=True):
        if part in (0, 1):
            assert high == part * height
        elif high in (0, height):
            assert max(neighbours) > 0.9
            assert part >= 0.5 if high else part <= 0.5
        else:
            assert abs(high - part * height) <= 8  # as much as the marks of two others take


async def test_a_chain_of_three_is_what_qemu_img_says(tmp_path: Path) -> None:
    top = samples.chain(tmp_path)
    node = await open_image(top)
    try:
        draw(await picture_of(node, node.bitmaps()), tmp_path / "disk.svg")
    finally:
        await node.close()
    size = node.size
    root = ET.parse(tmp_path / "disk.svg").getroot()
    rows = json.loads(peers.run("qemu-img", "map", "--output=json", top).stdout)
    reading = lane(root, "reading")
    for depth, name in enumerate(("top.qcow2", "middle.qcow2", "base.raw")):
        read = [row for row in rows if row["present"] and row["depth"] == depth]
        data = parts(size, (row for row in read if row["data"]))
        plain = parts(size, (row for row in read if row["data"] and not row["compressed"]))
        compressed = parts(size, (row for row in read if row["compressed"]))
        zeroes = parts(size, (row for row in read if row["zero"]))
        assert_shows(heights(reading, f"image-{depth + 1} data"), data, 48)
        assert_shows(heights(reading, f"image-{depth + 1} zero"), zeroes, 48)

        file = {"driver": "file", "filename": str(tmp_path / name)}
        alone = {"driver": "qcow2", "file": file, "backing": None} if depth < 2 else file
        output = peers.run("qemu-img", "map", "--output=json", f"json:{json.dumps(alone)}").stdout
        own = json.loads(output)
        held = parts(size, (row for row in own if row["present"]))
        for kind, expected in {
            "data": plain,
            "compressed": compressed,
            "zero": zeroes,
            "hidden": [all_ - part for all_, part in zip(held, parts(size, read), strict=True)],
            "unallocated": parts(size, (row for row in own if not row["present"])),
        }.items():
            assert_shows(heights(lane(root, f"image-{depth + 1}"), kind), expected, 36)
    nobody = parts(size, (row for row in rows if not row["present"]))
    assert_shows(heights(reading, "image-3 unallocated"), nobody, 48)


def test_names_are_escaped() -> None:
    none = np.zeros((5, 0), np.int64)
    name = "<b>&\"'\n\x00\udcff.raw"
    data = svg(lay_out(DiskPicture(name, 0, [Layer(name, "raw", 0, none, none)], [])))
    root = ET.fromstring(data)
    shown = "<b>&\"'���.raw"
    assert root.findtext(f"{NS}title") == shown
    assert shown in [text.text for text in root.iter(f"{NS}text")]
    assert (lane(root, "image-1").findtext(f"{NS}title") or "").startswith(shown)


def test_shapes() -> None:
    boxes = [Box(1, 2.5, 1 / 3, 4)]
    words = Words(5, 6, "hello", 13, anchor="end", bold=True)
    shapes = [Fill("plain", "#112233", boxes), Fill("zero", "#000000", boxes, HATCH), words]
    root = ET.fromstring(svg(Sheet(10, 20, "t", [Lane("bar", "a tip", shapes)])))
    assert root.attrib["viewBox"] == "0 0 10 20"
    bar = lane(root, "bar")
    assert bar.findtext(f"{NS}title") == "a tip"
    plain, zero = bar.findall(f"{NS}g")
    assert plain.attrib == {"class": "plain", "fill": "#112233"}
    assert plain[0].attrib == {"x": "1", "y": "2.5", "width": "0.33", "height": "4"}
    (pattern,) = root.iter(f"{NS}pattern")
    assert zero.attrib["fill"] == f"url(#{pattern.attrib['id']})"
    inked = {(r.attrib["x"], r.attrib["y"]) for r in pattern.findall(f"{NS}g/{NS}rect")}
    assert inked == {(str(n), str(n)) for n in range(6)}
    (text,) = bar.findall(f"{NS}text")
    assert text.text == "hello"
    assert (text.attrib["text-anchor"], text.attrib["font-weight"]) == ("end", "bold")


def test_the_same_disk_is_the_same_file_and_noise_is_bounded() -> None:
    """The worst there is: something else in every column, of every layer."""
    noise = np.random.default_rng(1)
    size = COLUMNS << 20

    def columns(classes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        edges = np.sort(noise.integers(0, 1 << 20, (classes - 1, COLUMNS)), axis=0)
        return np.diff(edges, axis=0, prepend=0, append=1 << 20)

    read = columns(MAX_LAYERS * 5).reshape(MAX_LAYERS, 5, COLUMNS)
    layers = [
        Layer(f"{number}.qcow2", "qcow2", size, part + columns(5) // 2, part)
        for number, part in enumerate(read)
    ]
    picture = DiskPicture("noise", size, layers, [])
    data = svg(lay_out(picture))
    assert data == svg(lay_out(picture))
    assert len(data) < 2 << 20
