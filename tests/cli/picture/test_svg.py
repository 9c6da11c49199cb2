"""The SVG of a picture, read back as XML and held against what qemu-img says."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


def parts(size: int, rows: list[tuple[int, int]]) -> Iterator[float]:
    """How much of each column some rows of (offset, length) make up."""
    for column in range(COLUMNS):
        start, end = size * column // COLUMNS, size * (column + 1) // COLUMNS
        inside = sum(max(min(end, at + n) - max(start, at), 0) for at, n in rows)
        yield inside / (end - start)


def assert_shows(found: list[float], expected: Iterator[float], height: int) -> None:
    """Nothing where there is nothing, all where there is all, and else a part of about that."""
    for high, part in zip(found, expected, strict=True):
        if part in (0, 1):
            assert high == part * height
        else:
            assert 0 < high < height
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
    for depth in range(3):
        own = [(r["start"], r["length"]) for r in rows if r["data"] and r["depth"] == depth]
        found = heights(lane(root, "reading"), f"image-{depth + 1}")
        assert_shows(found, parts(size, own), 48)
    zeroes = [(r["start"], r["length"]) for r in rows if r["zero"]]
    assert_shows(heights(lane(root, "reading"), "zero"), parts(size, zeroes), 48)

    for number, name in enumerate(("top.qcow2", "middle.qcow2"), 1):
        file = {"driver": "file", "filename": str(tmp_path / name)}
        alone = json.dumps({"driver": "qcow2", "file": file, "backing": None})
        rows = json.loads(peers.run("qemu-img", "map", "--output=json", f"json:{alone}").stdout)
        for kind, wanted in {
            "data": lambda row: row["data"] and not row["compressed"],
            "compressed": lambda row: row["compressed"],
            "zero": lambda row: row["present"] and row["zero"],
            "unallocated": lambda row: not row["present"],
        }.items():
            own = [(row["start"], row["length"]) for row in rows if wanted(row)]
            found = heights(lane(root, f"image-{number}"), kind)
            assert_shows(found, parts(size, own), 36)


def test_names_are_escaped() -> None:
    none = np.zeros((5, 0), np.int64)
    name = "<b>&\"'\n\x00\udcff.raw"
    data = svg(lay_out(DiskPicture(name, 0, none[:3], [Layer(name, "raw", 0, none)], [])))
    root = ET.fromstring(data)
    shown = "<b>&\"'���.raw"
    assert root.findtext(f"{NS}title") == shown
    assert f"{shown} (raw)" in [text.text for text in root.iter(f"{NS}text")]
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
    assert inked == {(str(n), str(n)) for n in range(4)}
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

    layers = [Layer(f"{n}.qcow2", "qcow2", size, columns(5)) for n in range(MAX_LAYERS)]
    picture = DiskPicture("noise", size, columns(MAX_LAYERS + 2), layers, [])
    data = svg(lay_out(picture))
    assert data == svg(lay_out(picture))
    assert len(data) < 2 << 20
