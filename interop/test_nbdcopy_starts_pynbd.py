"""``nbdcopy -- [ pynbd serve disk.qcow2 ] -``: each side of a copy may be a server it starts."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

from interop import peers, samples

PYNBD = [sys.executable, "-m", "pynbd", "serve"]


def test_to_standard_output(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "nbdcopy")
    top, expected, actual = (tmp_path / name for name in ("top.qcow2", "expected", "actual"))
    samples.chain(tmp_path)
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, expected)
    with actual.open("wb") as output:
        line = [*peers.command("nbdcopy"), "--", "[", *PYNBD, str(top), "]", "-"]
        done = subprocess.run(line, check=True, stdout=output, stderr=subprocess.PIPE, timeout=60)
    assert done.stderr == b""
    assert filecmp.cmp(expected, actual, shallow=False)


def test_both_sides(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "nbdcopy")
    top, image = samples.chain(tmp_path), tmp_path / "a.raw"
    image.write_bytes(bytes((8 << 20) + (32 << 10)))
    source, target = ["[", *PYNBD, str(top), "]"], ["[", *PYNBD, "-f", "raw", str(image), "]"]
    peers.run("nbdcopy", "--", *source, *target)
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top, image)
