"""qemu-img convert out of pynbd, into it, and through it; qemu-img compare as the judge."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

SIZE = 8 << 20


def same(a: Path | str, b: Path | str, formats: tuple[str, str] = ("raw", "raw")) -> None:
    said = peers.run("qemu-img", "compare", "-f", formats[0], "-F", formats[1], a, b)
    assert said.stdout == "Images are identical.\n"


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_out_of_a_chain(target: str, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io")
    top, direct, served = samples.chain(tmp_path), tmp_path / "direct", tmp_path / "served"
    uri = pynbd_serve(top, "-r")
    same(top, uri, ("qcow2", "raw"))
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", target, top, direct)
    peers.run("qemu-img", "convert", "-f", "raw", "-O", target, uri, served)
    same(direct, served, (target, target))
    # Holes are found through NBD as well as without.
    assert abs(samples.allocated(direct) - samples.allocated(served)) <= 1 << 20


@pytest.mark.parametrize("options", ["", "-n", "-n -W -m 16", "-n -S 0 -t writethrough"])
def test_onto_a_raw_export(options: str, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """Whatever was there before. Without ``-n`` qemu-img takes an export of the right size."""
    peers.require("qemu-img")
    source, image = tmp_path / "source", tmp_path / "a.raw"
    samples.sparse_file(source, SIZE)
    samples.sparse_file(image, SIZE, seed=2)
    uri = pynbd_serve(image, "-f", "raw")
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "raw", *options.split(), source, uri)
    assert filecmp.cmp(source, image, shallow=False)


def test_sparse_stays_sparse(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img")
    source, image = tmp_path / "source", tmp_path / "a.raw"
    samples.empty_file(source, SIZE)
    with source.open("r+b") as file:
        file.write(b"\1" * (1 << 20))
    image.write_bytes(b"\2" * SIZE)
    uri = pynbd_serve(image, "-f", "raw")
    peers.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    assert filecmp.cmp(source, image, shallow=False)
    assert 1 << 20 <= samples.allocated(image) < 2 << 20


def test_qcow2_inside_a_raw_export(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """QEMU keeps an image of its own in an export, as it would on a block device."""
    peers.require("qemu-img", "qemu-io")
    top, image = samples.chain(tmp_path), tmp_path / "a.raw"
    samples.empty_file(image, SIZE)
    uri = pynbd_serve(image, "-f", "raw")
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", top, uri)
    same(top, uri, ("qcow2", "qcow2"))
    peers.run("qemu-img", "check", "-f", "qcow2", uri)


def test_differences_are_found(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """The judge is not asleep: one byte makes the comparison fail, and is located."""
    peers.require("qemu-img")
    image, other = tmp_path / "a.raw", tmp_path / "b.raw"
    content = bytearray(samples.sparse_file(image, SIZE))
    content[3 << 20] ^= 1
    other.write_bytes(content)
    uri = pynbd_serve(image, "-f", "raw", "-r")
    said = peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, other, check=False)
    assert (said.returncode, said.stdout) == (1, f"Content mismatch at offset {3 << 20}!\n")


def test_bench(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """64 requests in flight, as qemu keeps them, reading and writing with flushes between."""
    peers.require("qemu-img")
    image = tmp_path / "a.raw"
    samples.sparse_file(image, SIZE)
    uri = pynbd_serve(image, "-f", "raw")
    bench = ["bench", "-f", "raw", "-c", "2000", "-d", "64", "-s", "4096", "-S", "20480"]
    peers.run("qemu-img", *bench, uri)
    peers.run("qemu-img", *bench, "-w", "--flush-interval=500", "--pattern=7", uri)
    content = image.read_bytes()
    for i in range(400):  # before the offsets wrap around the end
        assert content[i * 20480 : i * 20480 + 4096] == b"\7" * 4096
