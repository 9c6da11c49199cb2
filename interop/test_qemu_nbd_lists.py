"""``pynbd-qemu-nbd --list`` prints of any server what ``qemu-nbd --list`` prints of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import drop_in, peers
from interop.conftest import serving
from interop.drop_in import OURS, REAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdkit")
    folder = tmp_path_factory.mktemp("images")
    drop_in.images(folder)
    return folder


SERVERS = {
    "qemu-nbd": "-f raw disk.raw",
    "qemu-nbd read-only": "-r -f raw -x disk -D text disk.raw",
    "qemu-nbd shared": "-e 0 -A -B b0 -B b1 -f qcow2 top.qcow2",
    "pynbd": "-r top.qcow2",
    "pynbd named": "-x disk -D text disk.raw",
    "nbdkit": "memory 1M",
    "nbdkit simple": "--no-sr memory 1M",
    "nbdkit min block": (
        "--filter=blocksize-policy memory 1M blocksize-minimum=512 blocksize-preferred=4096"
        " blocksize-maximum=1M"
    ),
    "nbdkit many": "file dir={folder}",
    "nbdkit read-only": "-r memory 1M",
    "nbdkit empty": "memory 0",
}


@contextmanager
def server(name: str, folder: Path) -> Iterator[str]:
    args = SERVERS[name].format(folder=folder).split()
    match name.split()[0]:
        case "qemu-nbd":
            with drop_in.running(REAL, "-t", *args, folder=folder) as run:
                yield run.uri
        case "pynbd":
            with serving(folder / args[-1], *args[:-1]) as uri:
                yield uri
        case _:
            with peers.nbdkit(*args) as uri:
                yield uri


@pytest.mark.parametrize("name", SERVERS)
def test_same_text(name: str, folder: Path) -> None:
    with server(name, folder) as uri:
        socket = uri.partition("socket=")[2]
        real, ours = (
            drop_in.refused(program, "-L", "-k", socket, folder=folder) for program in (REAL, OURS)
        )
    assert real.returncode == 0
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, real.stdout, "")


def test_server_that_does_not_list(folder: Path) -> None:
    """One without fixed newstyle negotiation."""
    with peers.nbdkit("--mask-handshake=0", "memory", "1M") as uri:
        socket = uri.partition("socket=")[2]
        real, ours = (
            drop_in.refused(program, "-L", "-k", socket, folder=folder) for program in (REAL, OURS)
        )
    assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout) == (1, "")
    assert ours.stderr.count("\n") == 1


def test_on_tcp_nobody_is_there(folder: Path) -> None:
    done = drop_in.refused(OURS, "-L", "-b", "127.0.0.1", "-p", "1", folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{OURS}: nbd://127.0.0.1:1/: Connection refused\n"
