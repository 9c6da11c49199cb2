"""nbdcopy into and out of a raw export, over four connections: the bytes, and the holes."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

SIZE = 24 << 20


def test_in_and_out(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """Over old content: blocks of zeroes have to replace what was there."""
    peers.require("qemu-img", "nbdcopy")
    source, image, back = (tmp_path / name for name in ("source", "a.raw", "back"))
    samples.sparse_file(source, SIZE)
    samples.sparse_file(image, SIZE, seed=2)
    uri = pynbd_serve(image, "-f", "raw")
    peers.run("nbdcopy", "--connections=4", "--flush", source, uri)
    assert filecmp.cmp(source, image, shallow=False)
    peers.run("nbdcopy", "--connections=4", uri, back)
    peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, back)


def test_odd_size(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdcopy")
    source, image, back = (tmp_path / name for name in ("source", "a.raw", "back"))
    samples.sparse_file(source, (3 << 20) + 1234)
    image.write_bytes(bytes((3 << 20) + 1234))
    uri = pynbd_serve(image, "-f", "raw")
    peers.run("nbdcopy", "--connections=4", source, uri)
    peers.run("nbdcopy", uri, back)
    assert filecmp.cmp(source, image, shallow=False)
    assert filecmp.cmp(source, back, shallow=False)


@pytest.mark.parametrize("options", [[], ["--destination-is-zero"], ["--synchronous"]], ids=str)
def test_sparse_stays_sparse(options: list[str], tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """A hole is neither written on the way in nor on the way out."""
    peers.require("nbdcopy")
    source, image, back = (tmp_path / name for name in ("source", "a.raw", "back"))
    samples.empty_file(source, size := 128 << 20)
    samples.empty_file(image, size)
    with source.open("r+b") as file:
        for offset in (0, 50 << 20, size - (1 << 20)):
            file.seek(offset)
            file.write(b"\1" * (1 << 20))
    uri = pynbd_serve(image, "-f", "raw")
    peers.run("nbdcopy", *options, source, uri)
    peers.run("nbdcopy", *options, uri, back)
    for path in image, back:
        assert filecmp.cmp(source, path, shallow=False)
        assert 3 << 20 <= samples.allocated(path) <= 4 << 20


def test_allocated_on_request(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """``--allocated`` asks for zeroes that are no holes (NBD_CMD_FLAG_NO_HOLE)."""
    peers.require("nbdcopy")
    source, image = tmp_path / "source", tmp_path / "a.raw"
    samples.empty_file(source, SIZE)
    samples.empty_file(image, SIZE)
    peers.run("nbdcopy", "--allocated", source, pynbd_serve(image, "-f", "raw"))
    assert samples.allocated(image) >= SIZE
    assert image.read_bytes() == bytes(SIZE)


def test_between_two_exports(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """From a chain of qcow2 layers onto a raw export, four connections to each."""
    peers.require("qemu-img", "qemu-io", "nbdcopy")
    top, image = samples.chain(tmp_path), tmp_path / "a.raw"
    image.write_bytes(b"\xff" * ((8 << 20) + (32 << 10)))
    source, target = pynbd_serve(top, "-r"), pynbd_serve(image, "-f", "raw")
    peers.run("nbdcopy", "--connections=4", source, target)
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, image)


def test_read_only_export_is_refused(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdcopy")
    source, image = tmp_path / "source", tmp_path / "a.raw"
    samples.sparse_file(source, 1 << 20)
    before = samples.sparse_file(image, 1 << 20, seed=2)
    said = peers.run("nbdcopy", source, pynbd_serve(image, "-f", "raw", "-r"), check=False)
    assert said.returncode == 1
    assert image.read_bytes() == before
