"""pynbd info of images that the generator does not make, next to qemu-img info."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from interop import peers, samples
from pynbd.cli.info import info
from pynbd.errors import ImageLocked

MIB = 1 << 20


def both(image: Path, *args: str) -> tuple[Any, Any]:
    """What pynbd says, and what qemu-img says."""
    said = CliRunner().invoke(info, ["--json", *args, str(image)], catch_exceptions=False)
    assert (said.exit_code, said.stderr) == (0, "")
    expected = peers.run("qemu-img", "info", "--output=json", *args, image).stdout
    return json.loads(said.stdout), json.loads(expected)


def create(image: Path, *args: str) -> Path:
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *args, image, "1M")
    return image


@pytest.mark.parametrize(
    "backing", ["none.qcow2", "/nonexistent/none.qcow2", "./x/../y", "nbd://localhost/x", "json:{}"]
)
def test_a_backing_file_that_cannot_be_opened(backing: str, tmp_path: Path) -> None:
    peers.require("qemu-img")
    image = tmp_path / "top.qcow2"
    peers.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", image, "1M"
    )
    ours, theirs = both(image)
    assert ours == theirs


def test_options_of_the_image(tmp_path: Path) -> None:
    peers.require("qemu-img")
    options = "lazy_refcounts=on,refcount_bits=64,cluster_size=4k"
    ours, theirs = both(create(tmp_path / "a.qcow2", "-o", options))
    assert ours == theirs


def test_several_snapshots(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io")
    image = create(tmp_path / "a.qcow2")
    for name in ("first", "2", "späti"):
        peers.run("qemu-img", "snapshot", "-c", name, image)
        samples.qemu_io(image, "write -q 0 64k")
    ours, theirs = both(image)
    assert [snapshot["name"] for snapshot in ours["snapshots"]] == ["first", "2", "späti"]
    assert ours == theirs


def test_dirty_bytes(tmp_path: Path) -> None:
    """Ours alone; nbdinfo's totals of the same bitmap say how many."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    top = samples.chain(tmp_path)
    ours, _ = both(top)
    for bitmap in ours["format-specific"]["data"]["bitmaps"]:
        context = f"qemu:dirty-bitmap:{bitmap['name']}"
        with peers.qemu_nbd(top, "-r", "-f", "qcow2", "-B", bitmap["name"]) as uri:
            said = peers.run("nbdinfo", "--json", "--totals", f"--map={context}", uri).stdout
        dirty = [row["size"] for row in json.loads(said) if row["description"] == "dirty"]
        assert [bitmap["dirty-bytes"]] == dirty


def test_a_raw_file_has_its_size_to_the_byte(tmp_path: Path) -> None:
    """The one value that differs: QEMU's disks end with a sector."""
    peers.require("qemu-img")
    image = tmp_path / "disk.raw"
    samples.sparse_file(image, MIB + 1)
    ours, theirs = both(image)
    assert (ours.pop("virtual-size"), theirs.pop("virtual-size")) == (MIB + 1, MIB + 512)
    assert ours == theirs


def test_an_image_that_qemu_writes(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-nbd", "nbdinfo")
    image = create(tmp_path / "a.qcow2")
    peers.run("qemu-img", "bitmap", "--add", image, "b0")
    with peers.qemu_nbd(image, "-f", "qcow2") as uri:
        peers.run("nbdinfo", "--size", uri)  # it listens before it opens the image, and locks it
        with pytest.raises(ImageLocked, match="--force-share"):
            CliRunner().invoke(info, [str(image)], catch_exceptions=False)
        said = CliRunner().invoke(info, ["--json", "-U", str(image)], catch_exceptions=False)
        expected = peers.run("qemu-img", "info", "--output=json", "-U", image).stdout
        assert json.loads(said.stdout) == json.loads(expected)
        said = CliRunner().invoke(info, ["-U", str(image)], catch_exceptions=False)
        assert said.stdout.endswith(" -          unknown: not saved by who has it in use, or had\n")
