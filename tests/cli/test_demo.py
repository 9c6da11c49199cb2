"""The demo family, as `make serve` writes it and QEMU reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from interop import peers


def test_the_family(tmp_path: Path) -> None:
    peers.require("qemu-img", "nbdinfo")
    line = [sys.executable, "-m", "pynbd", "demo", str(tmp_path / "demo")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    top = Path(done.stdout.strip())
    assert top == tmp_path / "demo" / "wednesday.qcow2"
    chain = json.loads(
        peers.run("qemu-img", "info", "--backing-chain", "--output=json", top).stdout
    )
    assert [Path(image["filename"]).name for image in chain] == [
        "wednesday.qcow2",
        "tuesday.qcow2",
        "monday.qcow2",
    ]
    for image in chain:
        checked = peers.run("qemu-img", "check", image["filename"]).stdout
        assert "No errors were found" in checked
    (bitmap,) = chain[0]["format-specific"]["data"]["bitmaps"]
    assert bitmap["name"] == "since-tuesday"
    # The bitmap is dirty where the last image says something, and nowhere else.
    with peers.qemu_nbd(top, "-r", "-f", "qcow2", "-B", "since-tuesday", "-A") as uri:
        dirty, depth = (
            json.loads(peers.run("nbdinfo", f"--map=qemu:{context}", "--json", uri).stdout)
            for context in ("dirty-bitmap:since-tuesday", "allocation-depth")
        )
    assert [(row["offset"], row["length"]) for row in dirty if row["type"] == 1] == [
        (row["offset"], row["length"]) for row in depth if row["type"] == 1
    ]


def test_what_to_type_next(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pynbd", "demo", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    for word in ("nbdinfo --map nbd://localhost", "since-tuesday", "qemu-img convert"):
        assert word in done.stderr


def demo(directory: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pynbd", "demo", str(directory)]
    return subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)


def test_a_family_that_is_there_is_left_alone(tmp_path: Path) -> None:
    """It may be being served."""

    def family() -> dict[str, tuple[int, int]]:
        assert demo(tmp_path / "demo").returncode == 0
        paths = (tmp_path / "demo").iterdir()
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    first = family()
    assert first.keys() == {"monday.qcow2", "tuesday.qcow2", "wednesday.qcow2"}
    assert family() == first
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "monday.qcow2"
    mine.write_text("mine")
    for place in tmp_path, mine:
        done = demo(place)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"pynbd: {place}: it is there, and is no empty directory\n"
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine]
