"""qemu-io, command by command, on raw and qcow2 exports; after each the file itself is looked at:
qemu-io flushes when it leaves, so that all is there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

SIZE = 4 << 20
MIB = 1 << 20

QemuIo = Callable[..., None]


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """4 MiB of 0x11, all of it allocated."""
    peers.require("qemu-img", "qemu-io")
    path = tmp_path / f"a.{request.param}"
    peers.run("qemu-img", "create", "-q", "-f", request.param, path, str(SIZE))
    samples.qemu_io(path, f"write -q -P 0x11 0 {SIZE}", driver=request.param)
    return path


@pytest.fixture
def serve(pynbd_serve: PynbdServe) -> PynbdServe:
    return lambda image, *args: pynbd_serve(image, "-f", form(image), *args)


@pytest.fixture
def qemu_io(image: Path, serve: PynbdServe) -> QemuIo:
    return partial(samples.qemu_io, serve(image), driver="raw")


def form(image: Path) -> str:
    return image.suffix[1:]


def content(image: Path, *pieces: tuple[int, bytes]) -> None:
    """The disk is 0x11 all over, but for the pieces."""
    expected = bytearray(b"\x11" * SIZE)
    for offset, data in pieces:
        expected[offset : offset + len(data)] = data
    raw = image.with_suffix(".read")
    peers.run("qemu-img", "convert", "-U", "-f", form(image), "-O", "raw", image, raw)
    assert raw.read_bytes() == expected


def test_write_and_read(image: Path, qemu_io: QemuIo) -> None:
    qemu_io(
        "write -q -P 1 0 512",
        "write -q -P 2 1M 300k",
        "write -q -f -P 3 2M 4k",  # FUA
        "write -q -P 4 3145700 100",  # neither end is a sector's
        "flush",
        "read -q -P 1 0 512",
        "read -q -P 17 512 64k",
        "read -q -P 2 1M 300k",
        "read -q -P 3 2M 4k",
        "read -q -P 4 3145700 100",
    )
    pieces = [(0, 512, 1), (MIB, 300 * 1024, 2), (2 * MIB, 4096, 3), (3145700, 100, 4)]
    content(image, *((offset, bytes([value]) * length) for offset, length, value in pieces))


def test_vectors_and_asynchronous(image: Path, qemu_io: QemuIo) -> None:
    qemu_io(
        "writev -q -P 5 64k 4k 8k 512",
        "readv -q -P 5 64k 12800",
        *(f"aio_write -q -P {32 + i} {i * 40000} 40000" for i in range(40)),
        "aio_flush",
        *(f"aio_read -q -P {32 + i} {i * 40000} 40000" for i in range(40)),
        "aio_flush",
    )
    content(image, (0, b"".join(bytes([32 + i]) * 40000 for i in range(40))))


def test_write_zeroes(image: Path, qemu_io: QemuIo) -> None:
    """``-z`` alone keeps the space (NO_HOLE), ``-u`` gives it back."""
    full = samples.allocated(image)
    qemu_io("write -q -z 1M 1M", "read -q -P 0 1M 1M", "read -q -P 17 2M 1M")
    content(image, (MIB, bytes(MIB)))
    assert samples.allocated(image) >= full
    qemu_io("write -q -z -u 1M 2M", "read -q -P 0 1M 2M")
    content(image, (MIB, bytes(2 * MIB)))
    # A page of metadata that was a hole may be there now.
    assert samples.allocated(image) <= full - 2 * MIB + 4096
    qemu_io("write -q -z -u 100 1000", "write -q -z -f 3M 1000")
    content(image, (MIB, bytes(2 * MIB)), (100, bytes(1000)), (3 * MIB, bytes(1000)))


def test_fast_zero(image: Path, serve: PynbdServe) -> None:
    """``-n``: no fallback to writing (NBD_CMD_FLAG_FAST_ZERO): at once, or nothing is touched.

    Every local file system makes holes; zeroes that keep their space are not for all of them.
    """
    uri = serve(image)
    samples.qemu_io(uri, "write -q -z -n -u 1M 1M", driver="raw")
    content(image, (MIB, bytes(MIB)))
    done = peers.run("qemu-io", "-f", "raw", "-c", "write -q -z -n 2M 1M", uri, check=False)
    assert done.returncode == 0 or "not supported" in done.stdout + done.stderr
    content(image, (MIB, bytes(MIB * (2 if done.returncode == 0 else 1))))


def test_discard(image: Path, qemu_io: QemuIo) -> None:
    full = samples.allocated(image)
    qemu_io("discard -q 1M 2M", "read -q -P 0 1M 2M", "flush")
    content(image, (MIB, bytes(2 * MIB)))
    # A page of metadata that was a hole may be there now.
    assert samples.allocated(image) <= full - 2 * MIB + 4096


def test_discard_of_all(image: Path, qemu_io: QemuIo) -> None:
    qemu_io(f"discard -q 0 {SIZE}")
    content(image, (0, bytes(SIZE)))
    assert samples.allocated(image) <= {"raw": 0, "qcow2": 512 << 10}[form(image)]


def test_read_only_export(image: Path, serve: PynbdServe) -> None:
    """A writer is turned away when it opens; a reader is welcome, and what it reads is right."""
    uri = serve(image, "-r")
    said = peers.run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, check=False)
    assert said.returncode == 1
    assert "Permission denied" in said.stderr
    peers.run("qemu-io", "-r", "-f", "raw", "-c", f"read -q -P 17 0 {SIZE}", uri)
    content(image)


def test_export_as_a_backing_file(image: Path, tmp_path: Path, serve: PynbdServe) -> None:
    """An overlay of qemu's own above a read-only export."""
    uri, overlay = serve(image, "-r"), tmp_path / "overlay.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", overlay)
    samples.qemu_io(overlay, "write -q -P 9 1M 1000", "read -q -P 17 2M 1M", "read -q -P 9 1M 1000")
    content(image)


def test_guessed_raw_image_is_guarded(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """Nobody makes a raw image that was guessed look like another format, as qemu guards it."""
    peers.require("qemu-img", "qemu-io")
    image = tmp_path / "a.img"
    samples.empty_file(image, SIZE)
    uri = pynbd_serve(image, says="(?:.*its format was guessed.*\n)+")
    magic = tmp_path / "magic"
    magic.write_bytes(b"QFI\xfb")
    write = ["-f", "raw", "-c", f"write -q -s {magic} 0 512"]
    assert peers.run("qemu-io", *write, uri, check=False).returncode == 1
    create = ["create", "-q", "-f", "qcow2", uri, "1M"]
    assert peers.run("qemu-img", *create, check=False).returncode == 1
    assert b"QFI" not in image.read_bytes()[:512]
    samples.qemu_io(uri, "write -q -P 1 0 4k", "read -q -P 1 0 4k", driver="raw")
