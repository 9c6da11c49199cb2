"""pynbd copy from servers whose connections agree, but which take fewer than are asked for."""

from __future__ import annotations

from pathlib import Path

from interop import peers
from interop.transferring import pynbd, same


def test_qemu_nbd_for_two_clients(tmp_path: Path) -> None:
    """The third and the fourth are let wait."""
    peers.require("qemu-nbd", "qemu-img")
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"\x22" * (1 << 20))
    with peers.qemu_nbd(source, "-f", "raw", "-r", "-e", "2") as uri:
        pynbd("copy", uri, copy)
    same(source, copy)
