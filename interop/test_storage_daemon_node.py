"""qemu-storage-daemon's block layer as a client, which serves what it finds to others."""

from __future__ import annotations

import filecmp
from pathlib import Path

from interop import peers, samples, storage_daemon
from interop.conftest import PynbdServe

SIZE = 8 << 20


def test_read_write_through_it(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """nbdcopy to the daemon's export arrives in pynbd's file, and back out the same way."""
    peers.require("qemu-storage-daemon", "nbdcopy", "nbdsh")
    image, source, back = (tmp_path / name for name in ("a.raw", "source", "back"))
    samples.sparse_file(source, SIZE)
    samples.sparse_file(image, SIZE, seed=2)
    client = storage_daemon.nbd_client(pynbd_serve(image, "-f", "raw"), "pynbd", "discard=unmap")
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, client, export="pynbd") as (_, uri),
    ):
        peers.run("nbdcopy", "--connections=4", "--flush", source, uri)
        assert filecmp.cmp(source, image, shallow=False)
        peers.run("nbdcopy", "--connections=4", uri, back)
        peers.nbdsh(f"h.trim({SIZE}, 0); h.flush()", uri)
    assert filecmp.cmp(source, back, shallow=False)
    assert samples.allocated(image) == 0


def test_map_through_it(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """What pynbd says of a chain's zeroes, the daemon's own clients hear."""
    peers.require("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdinfo")
    top = samples.chain(tmp_path)
    direct = pynbd_serve(top, "-r")
    client = storage_daemon.nbd_client(direct, "pynbd", "read-only=on")
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, client, export="pynbd", writable=False) as (_, uri),
    ):
        maps = [peers.run("nbdinfo", "--map", server).stdout for server in (direct, uri)]
        peers.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, top)
    assert maps[0] == maps[1]


def test_qcow2_above_an_export(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """The daemon keeps a qcow2 image inside pynbd's raw export, as a virtual machine would."""
    peers.require("qemu-img", "qemu-storage-daemon", "nbdcopy")
    image, source = tmp_path / "a.raw", tmp_path / "source"
    samples.sparse_file(source, SIZE)
    samples.empty_file(image, 2 * SIZE)
    below = pynbd_serve(image, "-f", "raw")
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", below, str(SIZE))
    nodes = [
        storage_daemon.nbd_client(below, "pynbd", "discard=unmap"),
        "driver=qcow2,node-name=disk,file=pynbd,discard=unmap",
    ]
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, *nodes, export="disk") as (_, uri),
    ):
        peers.run("nbdcopy", "--flush", source, uri)
    peers.run("qemu-img", "check", "-f", "qcow2", below)
    peers.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, below)
