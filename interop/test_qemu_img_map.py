"""qemu-img map of an export, and of the same image opened directly: the same data, zero by zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

Row = tuple[int, int, bool, bool]


def rows(*image: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        peers.run("qemu-img", "map", "--output=json", *image).stdout
    )
    return found


def status(*image: str | Path) -> list[Row]:
    """Start, end, zero and data of each stretch; NBD knows no more (depths and host offsets)."""
    merged = list[Row]()
    for row in rows(*image):
        start, end, said = row["start"], row["start"] + row["length"], (row["zero"], row["data"])
        if merged and merged[-1][2:] == said:
            start = merged.pop()[0]
        merged.append((start, end, *said))
    return merged


@pytest.mark.parametrize("name", ["top.qcow2", "middle.qcow2", "base.raw"])
def test_same_as_the_file(name: str, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io")
    samples.chain(tmp_path)
    image = tmp_path / name
    options = ["-f", image.suffix[1:]]
    direct = status(*options, image)
    assert len(direct) > 3
    assert status("-f", "raw", pynbd_serve(image, "-r", *options)) == direct


def test_part_of_the_export(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io")
    top = samples.chain(tmp_path)
    part = ["--start-offset=1M", "--max-length=300k"]
    served = status("-f", "raw", *part, pynbd_serve(top, "-r"))
    assert served == status("-f", "qcow2", *part, top)
    assert (served[0][0], served[-1][1]) == (1 << 20, (1 << 20) + 300 * 1024)


def test_dirty_bitmap(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """``x-dirty-bitmap``: qemu shows dirty ranges as absent, as backup tools know."""
    peers.require("qemu-img", "qemu-io")
    image = tmp_path / "a.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    peers.run("qemu-img", "bitmap", "--add", "-g", "64k", image, "backup 1")
    samples.qemu_io(image, "write -q 1M 100k", "write -q 3M 1M")
    uri = pynbd_serve(image, "-r", "-B", "backup 1")
    socket = uri.partition("socket=")[2]
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap="
    found = rows("--image-opts", options + "qemu:dirty-bitmap:backup 1")
    dirty = [(row["start"], row["length"]) for row in found if not row["data"]]
    assert dirty == [(1 << 20, 128 << 10), (3 << 20, 1 << 20)]


def test_dirty_bitmap_that_is_not_there(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """QEMU says so, and does not take a map without the context for a clean one."""
    peers.require("qemu-img")
    image = tmp_path / "a.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "4M")
    socket = pynbd_serve(image, "-r").partition("socket=")[2]
    options = (
        f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:none"
    )
    said = peers.run("qemu-img", "map", "--image-opts", options, check=False)
    assert (said.returncode, said.stdout) == (1, "")
