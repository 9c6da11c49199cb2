"""A disk in Python with a metadata context of its own, in twenty lines: that of docs/library.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from interop import peers
from interop.conftest import PynbdServe
from interop.documented import programs

SIZE = 1 << 20
# Each line of 16 bytes says where it is.
CONTENT = b"".join(b"%15d\n" % at for at in range(0, SIZE, 16))


@pytest.fixture
def uri(tmp_path: Path, pynbd_serve: PynbdServe) -> str:
    file = tmp_path / "heat.py"
    file.write_text(programs()["heat.py"])
    return pynbd_serve(f"--python={file}:Heat")


def read(uri: str, offset: int, length: int) -> None:
    peers.nbdsh(f"h.pread({length}, {offset})", uri)


def mapped(uri: str, context: str) -> list[tuple[int, int, int]]:
    rows = json.loads(peers.run("nbdinfo", "--json", f"--map={context}", uri).stdout)
    return [(row["offset"], row["length"], row["type"]) for row in rows]


def test_what_it_is(uri: str) -> None:
    peers.require("nbdinfo")
    (export,) = json.loads(peers.run("nbdinfo", "--json", "--list", uri).stdout)["exports"]
    assert export["export-size"] == SIZE
    assert export["is_read_only"]
    assert export["can_multi_conn"]
    assert not export["can_trim"]
    assert not export["can_cache"]
    assert export["contexts"] == ["base:allocation", "x-heat:reads"]


def test_the_context(uri: str) -> None:
    peers.require("nbdinfo", "nbdsh")
    assert mapped(uri, "x-heat:reads") == [(0, SIZE, 0)]
    for _ in range(5):
        read(uri, 8192, 4096)
    read(uri, 8192 + 4095, 2)
    hot = [(8192, 4096, 6), (12288, 4096, 1)]
    assert mapped(uri, "x-heat:reads") == [(0, 8192, 0), *hot, (16384, SIZE - 16384, 0)]
    assert mapped(uri, "base:allocation") == [(0, SIZE, 0)]


def test_part_of_the_context(uri: str) -> None:
    """From the middle of a block; one extent; and all by the filter of extended headers."""
    peers.require("nbdsh")
    read(uri, 8192, 4096)
    script = """
h.add_meta_context("x-heat:reads")
h.add_meta_context("base:allocation")
h.connect_uri(URI)
show = lambda name, offset, extents, error: print(name, offset, extents)
h.block_status(4096, 10000, show)
h.block_status(4096, 10000, show, nbd.CMD_FLAG_REQ_ONE)
h.block_status_filter(1 << 20, 0, ["x-heat:reads"], show)
"""
    assert peers.nbdsh(script.replace("URI", repr(uri))).splitlines() == [
        "base:allocation 10000 [4096, 0]",
        "x-heat:reads 10000 [2288, 1, 1808, 0]",
        "base:allocation 10000 [4096, 0]",
        "x-heat:reads 10000 [2288, 1]",
        f"x-heat:reads 0 [(8192, 0), (4096, 1), ({SIZE - 12288}, 0)]",
    ]


def test_the_content(uri: str, tmp_path: Path) -> None:
    peers.require("nbdcopy", "qemu-img")
    peers.run("nbdcopy", uri, tmp_path / "one")
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == CONTENT
    assert (tmp_path / "two").read_bytes() == CONTENT


def test_it_is_not_written(uri: str) -> None:
    peers.require("qemu-io")
    done = peers.run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, check=False)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr


def test_socket_activation(tmp_path: Path) -> None:
    """nbdinfo starts it, and it ends with nbdinfo."""
    peers.require("nbdinfo")
    file = tmp_path / "heat.py"
    file.write_text(programs()["heat.py"])
    line = [sys.executable, "-m", "pynbd", "serve", "--python", f"{file}:Heat"]
    assert peers.run("nbdinfo", "--size", "--", "[", *line, "]").stdout == f"{SIZE}\n"
