"""pynbd copy at the end of a disk, and onto exports that take whole blocks only."""

from __future__ import annotations

import filecmp
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe
from interop.transferring import copied, pynbd, same

M = 1 << 20


def whole_blocks(size: str, *args: str) -> AbstractContextManager[str]:
    """An export that fails whatever is not in whole blocks."""
    sizes = f"blocksize-minimum={size}", f"blocksize-preferred={size}"
    return peers.nbdkit("--filter=blocksize-policy", *args, *sizes, "blocksize-error-policy=error")


@pytest.mark.parametrize("size", [1, 511, 4097, 65537, M - 1, (3 << 20) + 1234])
def test_odd_sizes(size: int, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    source, new, target = (tmp_path / name for name in ("source", "new", "target"))
    samples.sparse_file(source, size)
    copied(source, new)
    assert filecmp.cmp(source, new, shallow=False)
    target.write_bytes(b"\xee" * size)
    copied(source, pynbd_serve(target, "-f", "raw"))
    assert filecmp.cmp(source, target, shallow=False)
    back = tmp_path / "back"
    copied(pynbd_serve(source, "-r"), back)
    assert filecmp.cmp(source, back, shallow=False)


def test_an_empty_disk(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.touch()
    target.write_bytes(b"old")
    pynbd("copy", source, tmp_path / "new")
    pynbd("copy", source, target)
    assert (tmp_path / "new").read_bytes() == target.read_bytes() == b""


@pytest.mark.parametrize("size", [M, M - 100, (1 << 19) + 3])
def test_whole_blocks_only(size: int, tmp_path: Path) -> None:
    """The last block is read, patched and written back; what follows stays."""
    peers.require("nbdkit", "qemu-img")
    source, target = tmp_path / "source", tmp_path / "target"
    content = samples.sparse_file(source, size)
    target.write_bytes(b"\xee" * M)
    with whole_blocks("4k", "file", str(target)) as uri:
        left = f"its last {M - size} bytes are left" if size < M else ""
        pynbd("copy", source, uri, says=left)
    assert target.read_bytes() == content + b"\xee" * (M - size)


def test_dirty_granules_within_blocks(tmp_path: Path) -> None:
    """A bitmap of 512 bytes a bit, onto an export with blocks of 64 KiB."""
    peers.require("nbdkit", "qemu-img", "qemu-io")
    disk, target = tmp_path / "disk.qcow2", tmp_path / "target"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M")
    peers.run("qemu-img", "bitmap", "--add", "-g", "512", disk, "b")
    places = 512, 1536, 66_048, 130_560, 131_072, 400_000 // 512 * 512
    samples.qemu_io(disk, *(f"write -q -P {n + 1} {at} 512" for n, at in enumerate(places)))
    samples.qemu_io(disk, "write -q -z 700000 65536")
    target.write_bytes(b"\xee" * M)
    with whole_blocks("64k", "file", str(target)) as uri:
        copied(disk, uri, bitmap="b")
    expected = bytearray(b"\xee" * M)
    for n, at in enumerate(places):
        expected[at : at + 512] = bytes([n + 1]) * 512
    start, end = 700_000 // 512 * 512, -(-(700_000 + 65_536) // 512) * 512
    expected[start:end] = bytes(end - start)
    assert target.read_bytes() == expected


def test_a_source_of_whole_blocks(tmp_path: Path) -> None:
    peers.require("nbdkit")
    source, new = tmp_path / "source", tmp_path / "new"
    samples.sparse_file(source, 3 * M)
    with whole_blocks("64k", "-r", "file", str(source)) as uri:
        copied(uri, new)
    assert filecmp.cmp(source, new, shallow=False)


@pytest.mark.parametrize("without", ["zero", "multi-conn", "sr", "flush"])
def test_servers_that_can_do_less(without: str, tmp_path: Path) -> None:
    """No WRITE_ZEROES, one connection only, simple replies, no FLUSH."""
    peers.require("nbdkit", "qemu-img")
    source, target = tmp_path / "source", tmp_path / "target"
    samples.sparse_file(source, 3 * M)
    target.write_bytes(b"\xee" * (3 * M))
    how = {
        "zero": ["--filter=nozero"],
        "multi-conn": ["--filter=multi-conn", "multi-conn-mode=disable"],
        "sr": ["--no-sr"],
        "flush": ["--filter=fua", "fuamode=discard"],
    }[without]
    filters = [word for word in how if word.startswith("--")]
    settings = [word for word in how if not word.startswith("--")]
    with peers.nbdkit(*filters, "file", str(target), *settings) as uri:
        copied(source, uri)
        same(source, uri)
    assert filecmp.cmp(source, target, shallow=False)


def test_long_zeroes(tmp_path: Path) -> None:
    """Beyond what one request of 32 bits can zero."""
    peers.require("nbdkit")
    source = tmp_path / "source"
    samples.empty_file(source, 10 << 30)
    with source.open("r+b") as file:
        file.seek(5 << 30)
        file.write(b"here")
    with peers.nbdkit("sparse-random", "10G", "seed=1") as uri:
        said = pynbd("compare", uri, source, status=1)
        assert said.startswith("The contents differ at offset ")
    with peers.nbdkit("memory", "10G") as uri:
        samples.qemu_io(uri, "write -q -P 7 9G 64k", driver="raw")
        pynbd("copy", source, uri)
        assert pynbd("compare", uri, source) == "Images are identical.\n"


@pytest.mark.parametrize("sparse", ["0", "512", "4k", "64k"])
def test_zeroes_in_data_become_holes(sparse: str, tmp_path: Path) -> None:
    """Of written zeroes: as qemu-img convert -S makes them."""
    peers.require("qemu-img")
    source, ours, theirs = (tmp_path / name for name in ("source", "ours", "theirs"))
    content = bytearray(b"\x11" * M)
    for start, length in (0, 4096), (100_000, 300), (200_000, 5000), (262_144, 65_536), (M - 9, 9):
        content[start : start + length] = bytes(length)
    source.write_bytes(content)
    pynbd("copy", "-S", sparse, source, ours)
    peers.run("qemu-img", "convert", "-S", sparse, "-O", "raw", source, theirs)
    assert filecmp.cmp(source, ours, shallow=False)
    if sparse == "0":
        assert samples.allocated(ours) == M
    else:  # qemu-img always allocates the first block
        assert 0 <= samples.allocated(theirs) - samples.allocated(ours) <= 4096


def test_allocated(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    samples.empty_file(source, M)
    pynbd("copy", "--allocated", source, target)
    assert samples.allocated(target) == M
    assert filecmp.cmp(source, target, shallow=False)
