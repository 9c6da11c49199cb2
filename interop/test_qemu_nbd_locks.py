"""An image that is served already, by qemu-nbd or by pynbd-qemu-nbd: whether another one may serve
it as well.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from interop import drop_in, peers
from interop.drop_in import PROGRAMS, REAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    folder = tmp_path_factory.mktemp("images")
    drop_in.images(folder)
    return folder


def both(first: str, second: str, held: str, wanted: str, folder: Path) -> bool:
    """Whether ``second`` serves what ``first`` serves."""
    with drop_in.running(first, "-t", *held.split(), folder=folder):
        with peers.socket_path() as path:
            args = ["--fork", "--pid-file=second.pid", f"--socket={path}", "-t", *wanted.split()]
            done = drop_in.start(second, *args, folder=folder)
        if done.returncode == 0:
            drop_in.stop(int((folder / "second.pid").read_text()))
        return done.returncode == 0


@pytest.mark.parametrize("held", ["-f raw disk.raw", "-r -f raw disk.raw"])
@pytest.mark.parametrize("wanted", ["-f raw disk.raw", "-r -f raw disk.raw"])
def test_raw(held: str, wanted: str, folder: Path) -> None:
    """Any number of readers. Where qemu-nbd lets several write to a raw file, and others read what
    they write, pynbd-qemu-nbd keeps them apart, in whatever order they come.
    """
    readers = held.startswith("-r") and wanted.startswith("-r")
    for first, second in product(PROGRAMS, PROGRAMS):
        assert both(first, second, held, wanted, folder) == (readers or first == second == REAL)


def test_qcow2_for_reading(folder: Path) -> None:
    line = "-r -f qcow2 top.qcow2"
    assert all(both(*pair, line, line, folder) for pair in product(PROGRAMS, PROGRAMS))


@pytest.mark.parametrize("first", PROGRAMS)
@pytest.mark.parametrize("second", PROGRAMS)
def test_qcow2_that_is_written(first: str, second: str, folder: Path) -> None:
    """Nobody reads, or writes, what may change under his feet; nobody writes what others read."""
    writes, reads = "-f qcow2 flat.qcow2", "-r -f qcow2 flat.qcow2"
    for held, wanted in (writes, reads), (writes, writes), (reads, writes):
        assert not both(first, second, held, wanted, folder)


@pytest.mark.parametrize("first", PROGRAMS)
@pytest.mark.parametrize("second", PROGRAMS)
def test_a_backing_file_that_is_written(first: str, second: str, folder: Path) -> None:
    """What is below an overlay that is served does not change."""
    overlay, below = "-f qcow2 top.qcow2", "-f qcow2 middle.qcow2"
    assert not both(first, second, overlay, below, folder)
    assert not both(first, second, below, overlay, folder)
