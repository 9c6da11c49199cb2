"""``nbdinfo -- [ pynbd serve disk.qcow2 ]``: socket activation, by libnbd's own programs.

pynbd serves the socket that it inherits, prints nothing, and leaves with its client.
"""

from __future__ import annotations

import sys
from pathlib import Path

from interop import peers, samples

PYNBD = [sys.executable, "-m", "pynbd", "serve"]


def test_nbdinfo(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "nbdinfo")
    top = samples.chain(tmp_path)
    line = ["--size", "--", "[", *PYNBD, str(top), "]"]
    said = peers.run("nbdinfo", *line)
    assert (said.stdout, said.stderr) == (f"{(8 << 20) + (32 << 10)}\n", "")


def test_nbdsh(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "nbdsh")
    line = [*PYNBD, str(samples.chain(tmp_path))]
    script = f"""
h.connect_systemd_socket_activation({line!r})
print(h.get_size())
h.shutdown()
"""
    assert peers.nbdsh(script) == f"{(8 << 20) + (32 << 10)}\n"


def test_image_that_is_not_there(tmp_path: Path) -> None:
    """The reason is pynbd's last word, and nbdinfo does not hang."""
    peers.require("nbdinfo")
    line = ["--size", "--", "[", *PYNBD, str(tmp_path / "nowhere.qcow2"), "]"]
    said = peers.run("nbdinfo", *line, check=False, timeout=20)
    assert said.returncode == 1
    assert "nowhere.qcow2: cannot be opened: No such file or directory" in said.stderr
