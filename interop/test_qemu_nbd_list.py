"""``qemu-nbd --list`` prints what qemu's own client sees of an export."""

from __future__ import annotations

from pathlib import Path

from interop import peers, samples
from interop.conftest import PynbdServe


def test_list(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    top = samples.chain(tmp_path)
    uri = pynbd_serve(top, "-r", "-x", "a disk", "-D", "for a test")
    said = peers.run("qemu-nbd", "--list", "-k", uri.partition("socket=")[2]).stdout
    assert (
        said
        == """\
exports available: 1
 export: 'a disk'
  description: for a test
  size:  8421376
  flags: 0x158f ( readonly flush fua df multi cache block-status-payload )
  min block: 1
  opt block: 4096
  max block: 33554432
  transaction size: 64-bit
  available meta contexts: 4
   base:allocation
   qemu:allocation-depth
   qemu:dirty-bitmap:b0
   qemu:dirty-bitmap:b1
"""
    )
