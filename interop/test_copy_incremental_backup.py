"""An incremental backup without QEMU running: a full copy, changes, a copy of what is dirty, and
what was restored is what the guest has. qemu-img and qemu-io make bitmap and changes, qemu-img is
the judge.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import serving
from interop.transferring import compared, copied, pynbd, pynbd_here, same

SIZE = (16 << 20) + (32 << 10)

CHANGES = (
    "write -q -P 0x33 1M 300k",
    "write -q -z 5M 256k",  # was data
    "discard -q 7M 128k",  # was data
    "write -q -P 0x44 12345 678",
    f"write -q -P 0x55 {SIZE - 512} 512",
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image with data, and a bitmap that is recording."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    path = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    samples.qemu_io(path, "write -q -P 0x11 0 9M", "write -q -P 0x22 12M 64k")
    peers.run("qemu-img", "bitmap", "--add", "-g", "4k", path, "monday")
    return path


def test_files(disk: Path, tmp_path: Path) -> None:
    full, tuesday = tmp_path / "full.raw", tmp_path / "tuesday.raw"
    pynbd("copy", disk, full)
    same(disk, full, ("qcow2", "raw"))
    samples.qemu_io(disk, *CHANGES)
    tuesday.write_bytes(full.read_bytes())
    pynbd("copy", "--bitmap", "monday", disk, tuesday)
    same(disk, tuesday, ("qcow2", "raw"))
    assert pynbd("compare", disk, tuesday) == "Images are identical.\n"
    said = pynbd("compare", disk, full, status=1)
    assert said == "The contents differ at offset 12345.\n"


def test_only_what_is_dirty_is_copied(disk: Path, tmp_path: Path) -> None:
    """The rest of the target stays as it is, even if it is something else."""
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xee" * SIZE)
    samples.qemu_io(disk, *CHANGES)
    copied(disk, target, bitmap="monday")
    content = target.read_bytes()
    # 4 KiB granules: the first one that was written, the zeroes, what was discarded, the last one.
    dirty = {
        range(1 << 20, (1 << 20) + (300 << 10)): b"\x33",
        range(5 << 20, (5 << 20) + (256 << 10)): b"\0",
        range(7 << 20, (7 << 20) + (128 << 10)): b"\0",
    }
    expected = bytearray(b"\xee" * SIZE)
    for at, byte in dirty.items():
        expected[at.start : at.stop] = byte * len(at)
    expected[3 << 12 : 4 << 12] = (b"\x11" * 57 + b"\x44" * 678).ljust(1 << 12, b"\x11")
    expected[-(4 << 10) :] = bytes((4 << 10) - 512) + b"\x55" * 512
    assert content == expected


def test_over_nbd(disk: Path, tmp_path: Path) -> None:
    """Out of `pynbd serve` into a file, and from there by qemu-nbd into an image of its own."""
    full, restored = tmp_path / "full.raw", tmp_path / "restored.qcow2"
    with serving(disk, "-r") as uri:
        copied(uri, full)
    samples.qemu_io(disk, *CHANGES)
    with serving(disk, "-r", "-B", "monday") as uri:
        copied(uri, full, bitmap="monday")
        same(uri, full)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", restored, str(SIZE))
    with peers.qemu_nbd(restored, "-f", "qcow2") as uri:
        copied(full, uri)
        assert compared(full, uri).difference is None
    same(disk, restored, ("qcow2", "qcow2"))


def test_onto_an_overlay(disk: Path, tmp_path: Path) -> None:
    """What is dirty, from qemu-nbd onto a writable overlay of the earlier copy."""
    full, overlay = tmp_path / "full.qcow2", tmp_path / "overlay.qcow2"
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", disk, full)
    samples.qemu_io(disk, *CHANGES)
    backing = ["-b", full.name, "-F", "qcow2"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, overlay)
    with ExitStack() as stack:
        source = stack.enter_context(peers.qemu_nbd(disk, "-r", "-f", "qcow2", "-B", "monday"))
        target = stack.enter_context(peers.qemu_nbd(overlay, "-f", "qcow2"))
        copied(source, target, bitmap="monday")
    same(disk, overlay, ("qcow2", "qcow2"))
    assert samples.allocated(overlay) < 2 << 20


@pytest.mark.parametrize("granularity", ["512", "64k", "1M"])
def test_granularities(granularity: str, disk: Path, tmp_path: Path) -> None:
    """The last granule is cut by the end of the disk."""
    peers.run("qemu-img", "bitmap", "--add", "-g", granularity, disk, "other")
    target = tmp_path / "target.raw"
    copied(disk, target)
    samples.qemu_io(disk, *CHANGES)
    copied(disk, target, bitmap="other")
    same(disk, target, ("qcow2", "raw"))


def test_a_clean_bitmap_copies_nothing(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"\xee" * SIZE)
    copied(disk, target, bitmap="monday")
    assert target.read_bytes() == b"\xee" * SIZE


def test_refusals(disk: Path, tmp_path: Path) -> None:
    """Nothing is made, nothing is changed."""
    target, overlay = tmp_path / "target.raw", tmp_path / "overlay.qcow2"
    pynbd_here("copy", "--bitmap", "monday", disk, target, status=1, says="does not exist")
    assert not target.exists()
    target.write_bytes(b"\xee" * (SIZE + 512))
    pynbd_here("copy", "--bitmap", "monday", disk, target, status=1, says=f"{SIZE + 512} bytes")
    pynbd_here("copy", "--bitmap", "sunday", disk, target, status=1, says="there is 'monday'")
    backing = ["-b", disk.name, "-F", "qcow2"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, overlay)
    pynbd_here("copy", "--bitmap", "monday", overlay, target, status=1, says="writes above it")
    with serving(disk, "-r") as uri:
        pynbd_here("copy", "--bitmap", "sunday", uri, target, status=1, says="there is 'monday'")
    pynbd_here("copy", "--bitmap", "x", "-l", "y", disk, target, status=2, says="not a snapshot")
    assert target.read_bytes() == b"\xee" * (SIZE + 512)
