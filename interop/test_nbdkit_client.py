"""nbdkit as a client of pynbd (its nbd plugin), and its filters between pynbd and others."""

from __future__ import annotations

import filecmp
from pathlib import Path

from interop import peers, samples
from interop.conftest import PynbdServe

SIZE = 8 << 20


def test_nbd_plugin(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """A proxy: content, size and map come through, writes and zeroes go through."""
    peers.require("nbdkit", "nbdcopy", "nbdinfo", "nbdsh")
    image, source = tmp_path / "a.raw", tmp_path / "source"
    samples.sparse_file(image, SIZE)
    samples.sparse_file(source, SIZE, seed=2)
    direct = pynbd_serve(image, "-f", "raw")
    with peers.nbdkit("nbd", f"uri={direct}", "shared=true") as proxy:
        maps = [peers.run("nbdinfo", "--map", uri).stdout for uri in (direct, proxy)]
        assert maps[0] == maps[1]
        peers.run("nbdcopy", "--connections=4", "--flush", source, proxy)
        assert filecmp.cmp(source, image, shallow=False)
        peers.nbdsh("h.zero(100000, 1 << 20); h.trim(1 << 20, 2 << 20); h.flush()", proxy)
    content = source.read_bytes()
    for offset, length in (1 << 20, 100000), (2 << 20, 1 << 20):
        content = content[:offset] + bytes(length) + content[offset + length :]
    assert image.read_bytes() == content


def test_nbd_plugin_of_a_chain(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdkit", "qemu-img", "qemu-io", "nbdinfo")
    top = samples.chain(tmp_path)
    direct = pynbd_serve(top, "-r")
    with peers.nbdkit("--filter=cache", "nbd", f"uri={direct}") as proxy:
        peers.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", proxy, top)
    with peers.nbdkit("--filter=cow", "nbd", f"uri={direct}") as proxy:
        peers.nbdsh("h.pwrite(b'cow' * 1000, 0); assert h.pread(3, 0) == b'cow'", proxy)
        peers.run("qemu-img", "convert", "-f", "raw", "-O", "raw", direct, tmp_path / "copy")
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, tmp_path / "copy")
