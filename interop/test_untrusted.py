"""pynbd serve --untrusted: libnbd reads and writes a chain that qemu-img has made; what leads
elsewhere is refused in one line, and was not opened.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.qcow2.builder import Image

SIZE = 1 << 20
SERVE = [sys.executable, "-m", "pynbd", "serve", "--untrusted"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory for images, with something good in it, and a secret beside it."""
    peers.require("qemu-img", "qemu-io", "nbdsh")
    (tmp_path / "secret").write_bytes(b"secret".ljust(SIZE, b"\0"))
    (tmp_path / "images" / "below").mkdir(parents=True)
    (tmp_path / "images" / "below" / "good").write_bytes(b"good".ljust(SIZE, b"\0"))
    return tmp_path / "images"


def overlay(path: Path, backing: str | Path, backing_format: str = "raw") -> Path:
    """Of whatever that is: qemu-img does not look."""
    line = ["-f", "qcow2", "-u", "-b", backing, "-F", backing_format, path, str(SIZE)]
    peers.run("qemu-img", "create", "-q", *line)
    return path


def files_of(pid: int) -> set[Path]:
    """The regular files that a process has open, but for what was given to it."""
    numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    links = [f"/proc/{pid}/fd/{number}" for number in numbers if number > 2]
    return {Path(os.readlink(link)) for link in links if stat.S_ISREG(os.stat(link).st_mode)}


def test_a_chain_is_served(folder: Path) -> None:
    middle = overlay(folder / "middle", "below/good")
    peers.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 5 64k 4k", middle)
    top = overlay(folder / "top", "middle", "qcow2")
    script = """
assert h.pread(4, 0) == b"good"
assert h.pread(4096, 65536) == bytes([5]) * 4096
h.pwrite(b"new", 0)
h.flush()
assert h.pread(4, 0) == b"newd"
"""
    with peers.socket_path() as path:
        line = [*SERVE, "-f", "qcow2", "-k", str(path), str(top)]
        with peers.listening(line, path) as server:
            peers.nbdsh(script, peers.unix_uri(path))
            assert files_of(server.pid) == {top, middle, folder / "below" / "good"}
    peers.run("qemu-img", "check", "-q", top)
    assert (folder / "below" / "good").read_bytes()[:4] == b"good"


@contextmanager
def unopened(path: Path) -> Iterator[None]:
    """Nobody opens a file meanwhile: that would end a lease on it (fcntl(2), "Leases")."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which tells of that
    try:
        with path.open("r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
            assert fcntl.fcntl(file, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    finally:
        signal.signal(signal.SIGIO, before)


def test_an_opened_file_is_seen(folder: Path) -> None:
    """`unopened` tells it."""
    secret = folder.parent / "secret"
    line = [sys.executable, "-c", f"import os; os.open({str(secret)!r}, os.O_NONBLOCK)"]
    with pytest.raises(AssertionError), unopened(secret):
        subprocess.run(line, check=False, stderr=subprocess.DEVNULL)


def _by_a_link(folder: Path) -> Path:
    (folder / "link").symlink_to("../secret")
    return overlay(folder / "top", "link")


def _by_a_linked_folder(folder: Path) -> Path:
    (folder / "link").symlink_to("..")
    return overlay(folder / "top", "link/secret")


def _further_below(folder: Path) -> Path:
    """The one that may be opened names one that may not."""
    overlay(folder / "below" / "middle", folder.parent / "secret")
    return overlay(folder / "top", "below/middle", "qcow2")


def _a_data_file(folder: Path) -> Path:
    path = folder / "top"
    option = f"data_file={folder.parent / 'secret'},data_file_raw=on"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", option, path, str(SIZE))
    return path


def _a_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return overlay(folder / "top", "fifo")


def _a_device(folder: Path) -> Path:
    (folder / "device").symlink_to("/dev/zero")
    return overlay(folder / "top", "device")


def _not_recorded(folder: Path) -> Path:
    Image(size=SIZE, backing_file="below/good").write(folder / "top")
    return folder / "top"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "its name": (lambda folder: overlay(folder / "top", folder.parent / "secret"), "outside of"),
    "a relative name": (lambda folder: overlay(folder / "top", "../secret"), "outside of"),
    "a link": (_by_a_link, "outside of"),
    "a linked folder": (_by_a_linked_folder, "outside of"),
    "further below": (_further_below, "outside of"),
    "a data file": (_a_data_file, "outside of"),
    "a FIFO": (_a_fifo, "it is a FIFO"),
    "a device": (_a_device, "it is a character device"),
    "an export": (lambda folder: overlay(folder / "top", "nbd://localhost"), "not a plain file"),
    "no format recorded": (_not_recorded, "is not recorded"),
    "itself": (lambda folder: overlay(folder / "top", "top", "qcow2"), "a loop"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leads_elsewhere(folder: Path, name: str) -> None:
    make, reason = REFUSED[name]
    image = make(folder)
    with unopened(folder.parent / "secret"):
        refused(["-f", "qcow2", str(image)], 1, reason)


def test_a_format_that_is_not_given(folder: Path) -> None:
    refused([str(folder / "below" / "good")], 2, "the format of")


def refused(words: list[str], status: int, reason: str) -> None:
    """The command ends with a line that names the file and the reason, and never listens."""
    with peers.socket_path() as path:
        line = [*SERVE, "-k", str(path), *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        assert not path.exists()
    (said,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (status, "")
    assert reason in said
    assert words[-1].rsplit("/", 2)[-2] in said
