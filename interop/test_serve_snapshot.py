"""pynbd serve --snapshot: other people's clients write, the image stays, and nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe, serving
from interop.transferring import same


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the overlays of the servers are."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def open_in(folder: Path, pid: int) -> list[Path]:
    """The files in a folder that a process has open, with or without a name."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    opened = [os.readlink(link) for link in links if link.exists() or link.is_symlink()]
    return [Path(name) for name in opened if name.startswith(str(folder))]


def test_writes_are_seen_and_do_not_reach_the_image(tmp_path: Path, temporary: Path) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    (tmp_path / "images").mkdir()
    top = samples.chain(tmp_path / "images")
    before = {path: path.read_bytes() for path in top.parent.iterdir()}
    # A copy that is really written, with the same requests.
    shutil.copytree(top.parent, tmp_path / "written")
    written = tmp_path / "written" / top.name
    requests = [
        "write -q -P 1 0 1M",
        "write -q -P 2 1234567 100001",
        "write -q -z -u 5M 300k",
        "write -q -z 3M 1k",
        "flush",
        "write -q -f -P 3 8M 32k",
    ]
    with serving(top, "-s", "-A") as uri:
        samples.qemu_io(uri, *requests, driver="raw")
        with peers.qemu_nbd(written, "-f", "qcow2") as theirs:
            samples.qemu_io(theirs, *requests, driver="raw")
            same(theirs, uri)
        assert not list(temporary.iterdir())
        # Others read the image meanwhile.
        peers.run("qemu-img", "check", "-q", top)
    with serving(top, "-s") as uri:
        peers.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, top)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(temporary.iterdir())


def test_several_servers_of_one_image(tmp_path: Path, temporary: Path) -> None:
    peers.require("qemu-img", "qemu-io")
    path = tmp_path / "disk"
    content = samples.sparse_file(path, (3 << 20) + 700)
    with serving(path, "-s") as one, serving(path, "-s", "-f", "raw") as other:
        samples.qemu_io(one, "write -q -P 1 0 3M", driver="raw")
        samples.qemu_io(other, "write -q -P 2 1M 1M", driver="raw")
        samples.qemu_io(one, "read -q -P 1 0 3M", driver="raw")
        samples.qemu_io(other, "read -q -P 2 1M 1M", driver="raw")
    assert path.read_bytes() == content


def test_a_copy_onto_it(tmp_path: Path, temporary: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "nbdcopy")
    source, disk = tmp_path / "source", tmp_path / "disk.qcow2"
    samples.sparse_file(source, 20 << 20)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "20M")
    before = disk.read_bytes()
    uri = pynbd_serve(disk, "-s")
    peers.run("nbdcopy", source, uri)
    same(source, uri)
    peers.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-S", "0", source, uri)
    same(source, uri)
    assert disk.read_bytes() == before


def test_a_killed_server_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    peers.require("qemu-io")
    path = tmp_path / "disk"
    content = samples.sparse_file(path, 3 << 20)
    with peers.socket_path() as socket:
        line = [sys.executable, "-m", "pynbd", "serve", "-s", "-k", str(socket), str(path)]
        with subprocess.Popen(line, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            samples.qemu_io(peers.unix_uri(socket), "write -q -P 1 0 2M", "flush", driver="raw")
            (overlay,) = open_in(temporary, server.pid)
            assert overlay.name.endswith(" (deleted)")
            server.send_signal(signal.SIGKILL)
    assert not list(temporary.iterdir())
    assert path.read_bytes() == content
