"""pynbd check of images that QEMU made: nothing wrong, and the numbers of qemu-img check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from interop import generator, peers, samples
from interop.checking import content, pynbd_check, qemu_check
from interop.generator import Chain, ChainPlan

MIB = 1 << 20


@pytest.mark.parametrize("plan", generator.plan(), ids=lambda plan: plan.id)
def test_generated_chain(plan: ChainPlan, built_chain: Callable[[ChainPlan], Chain]) -> None:
    peers.require("qemu-img", "qemu-io")
    for layer in built_chain(plan).layers:
        said = pynbd_check(layer, "-f", layer.suffix[1:])
        assert said == qemu_check(layer, "-f", layer.suffix[1:])
        assert said.status == (63 if layer.suffix == ".raw" else 0)


def image_of(folder: Path, options: str, *, packed: bool = True, snapshot: bool = True) -> Path:
    """Data in two L2 tables at least, overwritten in part after a snapshot."""
    image = folder / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "40M")
    samples.qemu_io(image, "write -q -P 1 64k 100k", "write -q -P 2 33M 1M", "write -q -z 20M 3M")
    if packed:
        samples.qemu_io(image, "write -q -c -P 3 8M 2M")
    if snapshot:
        peers.run("qemu-img", "snapshot", "-c", "before", image)
    samples.qemu_io(image, "write -q -P 4 100k 100k", "discard -q 33M 512k", "write -q 39M 70000")
    return image


@pytest.mark.parametrize("cluster", ["512", "1k", "4k", "32k", "64k", "512k", "2M"])
def test_cluster_size(cluster: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io")
    image = image_of(tmp_path, f"cluster_size={cluster}")
    said = pynbd_check(image)
    assert said == qemu_check(image)
    assert said.status == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcount_width(bits: int, tmp_path: Path) -> None:
    """And repaired, after all its refcounts were lost and it was marked dirty."""
    peers.require("qemu-img", "qemu-io")
    options = f"cluster_size=4k,refcount_bits={bits},lazy_refcounts=on"
    image = image_of(tmp_path, options, packed=bits > 8, snapshot=bits > 1)
    assert pynbd_check(image) == qemu_check(image)
    before = content(image)
    with image.open("r+b") as file:
        file.seek(72)
        file.write((1).to_bytes(8, "big"))
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        file.seek(block)
        file.write(bytes(4096))
    found = pynbd_check(image)
    assert found == qemu_check(image)
    assert found.status == 2
    assert pynbd_check(image, "-r", "all").status == 0
    assert qemu_check(image).status == 0
    assert content(image) == before
    assert peers.run("qemu-img", "info", image).stdout.count("dirty") == 0
    # What QEMU writes then needs no repair either.
    samples.qemu_io(image, "write -q -P 9 12M 5M", "write -q -P 8 0 300k")
    assert qemu_check(image).status == 0
    assert pynbd_check(image).status == 0


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on",
        "data_file=disk.data",
        "data_file=disk.data,data_file_raw=on",
    ],
)
def test_options(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers.require("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)
    apart = "data_file" in options
    packed = not apart and "preallocation" not in options
    image = image_of(tmp_path, options, packed=packed, snapshot=not apart)
    said = pynbd_check(image)
    assert said == qemu_check(image)
    assert said.status == 0


def test_bitmaps_and_a_crash(tmp_path: Path) -> None:
    """A writer that is killed leaves leaks, or a dirty image; its bitmap is in use."""
    peers.require("qemu-img", "qemu-io")
    image = image_of(tmp_path, "cluster_size=4k,lazy_refcounts=on")
    peers.run("qemu-img", "bitmap", "--add", "-g", "4k", image, "b0")
    samples.qemu_io(image, "write -q 5M 1M")
    assert pynbd_check(image) == qemu_check(image)
    line = ["-f", "qcow2", "-c", "write -q 15M 3M", "-c", "flush", "-c", "abort", image]
    assert peers.run("qemu-io", *line, check=False).returncode
    found = pynbd_check(image)
    assert found == qemu_check(image)
    assert found.status == 2
    before = content(image)
    assert pynbd_check(image, "-r", "all").status == 0
    assert qemu_check(image).status == 0
    assert content(image) == before


def test_what_the_repair_of_a_truncated_table_needs(tmp_path: Path) -> None:
    """Growth of the refcount table: more blocks than it has room for."""
    peers.require("qemu-img", "qemu-io")
    image = image_of(tmp_path, "cluster_size=512,refcount_bits=64")
    samples.qemu_io(image, "write -q -P 6 10M 3M")
    with image.open("r+b") as file:
        file.seek(56)
        file.write((1).to_bytes(4, "big"))
    found = pynbd_check(image)
    assert found == qemu_check(image)
    assert found.status == 2
    before = content(image)
    assert pynbd_check(image, "-r", "all").status == 0
    assert qemu_check(image).status == 0
    assert content(image) == before
