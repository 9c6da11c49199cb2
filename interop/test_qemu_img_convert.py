"""qemu-img convert out of pynbd, into it, and through it; qemu-img compare as the judge."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe, serving

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


# How qemu-img makes the qcow2 image that is converted onto.
QCOW2 = {
    "default": "",
    "small": "-o cluster_size=512,refcount_bits=64",
    "subclusters": "-o extended_l2=on,cluster_size=16k",
    "data file": "-o data_file={folder}/target.data,data_file_raw=on",
    "overlay": "-b base -F raw",
}


@pytest.mark.parametrize("form", QCOW2)
@pytest.mark.parametrize("options", ["", "-W -m 16", "-S 0", "--target-is-zero"])
def test_onto_a_qcow2_export(form: str, options: str, tmp_path: Path) -> None:
    """Whatever was there before, but for a target that is said to be empty."""
    peers.require("qemu-img", "qemu-io")
    source, image = tmp_path / "source", tmp_path / "target.qcow2"
    samples.sparse_file(source, SIZE)
    samples.sparse_file(tmp_path / "base", SIZE, seed=2)
    create = ["create", "-q", "-f", "qcow2", *QCOW2[form].format(folder=tmp_path).split()]
    peers.run("qemu-img", *create, image, str(SIZE), cwd=tmp_path)
    empty = options == "--target-is-zero"
    write = f"write -q -z 0 {SIZE}" if empty else f"write -q -P 0xee 1M {SIZE >> 1}"
    samples.qemu_io(image, write)
    with serving(image, "-f", "qcow2") as uri:
        convert = ["convert", "-n", "-f", "raw", "-O", "raw", *options.split()]
        peers.run("qemu-img", *convert, source, uri)
        same(source, uri)
    compare = ["compare", "-f", "raw", "-F", "qcow2", source, image]
    assert peers.run("qemu-img", *compare, cwd=tmp_path).stdout == "Images are identical.\n"
    peers.run("qemu-img", "check", image, cwd=tmp_path)
    if form == "data file":
        assert filecmp.cmp(source, tmp_path / "target.data", shallow=False)


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
