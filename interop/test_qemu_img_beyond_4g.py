"""qemu reads, maps and compares images of more than 4 GiB: it negotiates extended headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

GIB = 1 << 30
SIZE = 9 * GIB
DATA = 7 * GIB


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    peers.require("qemu-img", "qemu-io")
    path = tmp_path / f"large.{request.param}"
    if request.param == "raw":
        samples.empty_file(path, SIZE)
    else:
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    samples.qemu_io(path, f"write -q -P 5 {DATA} 1M", driver=request.param)
    return path


def test_map(image: Path, pynbd_serve: PynbdServe) -> None:
    uri = pynbd_serve(image, "-r", "-f", image.suffix[1:])
    said = json.loads(peers.run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
    assert [(row["start"], row["length"], row["data"]) for row in said] == [
        (0, DATA, False),
        (DATA, 1 << 20, True),
        (DATA + (1 << 20), SIZE - DATA - (1 << 20), False),
    ]


def test_read_compare_and_copy(image: Path, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    uri, copy = pynbd_serve(image, "-r", "-f", image.suffix[1:]), tmp_path / "copy"
    reads = {DATA: 5, DATA - (1 << 20): 0, SIZE - (1 << 20): 0}
    line = [word for at, byte in reads.items() for word in ("-c", f"read -q -P {byte} {at} 1M")]
    peers.run("qemu-io", "-r", "-f", "raw", *line, uri)
    peers.run("qemu-img", "compare", "-f", "raw", "-F", image.suffix[1:], uri, image)
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
    assert copy.stat().st_size == SIZE
    assert 1 << 20 <= samples.allocated(copy) < 2 << 20
