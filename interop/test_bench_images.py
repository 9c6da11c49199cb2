"""The images of the benchmark are what its table says of them, in other people's eyes."""

import filecmp
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from interop.bench import images, tables

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same images in a folder of the test's own, only smaller."""
    peers.require("qemu-img", "qemu-io")
    monkeypatch.setattr(images, "FOLDER", tmp_path)
    monkeypatch.setattr(images, "FRESH", tmp_path / "fresh")
    monkeypatch.setattr(images, "SIZE", 32 << 20)
    monkeypatch.setattr(images, "COMPRESSED_SIZE", 8 << 20)
    images.let_go()
    yield
    images.let_go()


def told(command: str, image: Path) -> Any:
    form = "raw" if image.suffix == ".raw" else "qcow2"
    return json.loads(peers.run("qemu-img", command, "--output=json", "-f", form, image).stdout)


@pytest.mark.parametrize(
    "image", [images.qcow2, images.written_qcow2, images.chain, images.zlib, images.zstd]
)
def test_is_sound(image: Callable[[], Path]) -> None:
    peers.run("qemu-img", "check", "-f", "qcow2", image())


@pytest.mark.parametrize(
    "image", [images.raw, images.written_raw, images.qcow2, images.written_qcow2]
)
def test_is_allocated_everywhere(image: Callable[[], Path]) -> None:
    extents = told("map", image())
    assert all(extent["data"] and extent["depth"] == 0 for extent in extents)
    assert sum(extent["length"] for extent in extents) == images.SIZE


def test_what_is_written_is_a_copy() -> None:
    assert images.written_qcow2() != images.qcow2()
    assert filecmp.cmp(images.written_qcow2(), images.qcow2(), shallow=False)


def test_the_chain_lies_in_all_layers_in_no_order() -> None:
    extents = told("map", images.chain())
    assert all(extent["data"] for extent in extents)
    assert {extent["depth"] for extent in extents} == {0, 1, 2}
    assert len(extents) > images.SIZE // tables.CLUSTER // max(images.RUNS)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_is_compressed_two_to_three_times(kind: str) -> None:
    image: Path = getattr(images, kind)()
    assert told("info", image)["format-specific"]["data"]["compression-type"] == kind
    assert 2 < images.COMPRESSED_SIZE / image.stat().st_size < 3
    assert all(extent["compressed"] for extent in told("map", image))


def test_what_has_to_be_empty_is_new_each_time() -> None:
    for image in images.empty, images.overlay:
        path = image()
        new = path.read_bytes()
        peers.run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", path)
        assert image() == path
        assert path.read_bytes() == new
        images.settle(path)
        assert not path.exists()


def test_bitmaps_have_two_million_extents_each() -> None:
    peers.require("qemu-nbd", "nbdinfo")
    image = images.bitmaps()
    peers.run("qemu-img", "check", "-f", "qcow2", image)
    found = told("info", image)["format-specific"]["data"]["bitmaps"]
    assert {bitmap["name"] for bitmap in found} == {*tables.BITMAPS}
    name = tables.BITMAPS[-1]
    with peers.qemu_nbd(image, "-r", "-f", "qcow2", "-B", name) as uri:
        lines = peers.run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", uri).stdout.splitlines()
    assert len(lines) == tables.MAP_SIZE // (8 * tables.CLUSTER)
    dirty, clean = (line.split()[1:] for line in lines[:2])
    assert (dirty, clean) == (["524288", "1", "dirty"], ["524288", "0", "clean"])
