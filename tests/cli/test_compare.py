"""``pynbd compare``: its arguments; what it does is in tests/client and
interop/test_compare_qemu_img.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pynbd.block.qcow2.builder import Data, Image
from tests.cli.looking import pynbd_here

M = 1 << 20


@pytest.fixture
def disks(tmp_path: Path) -> tuple[Path, Path]:
    """One disk in two formats."""
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    Image(size=M, clusters={0: Data(b"now")}).write(image)
    raw.write_bytes(b"now".ljust(M, b"\0"))
    return image, raw


def test_formats(
    disks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """-f is that of A, -F that of B."""
    image, raw = disks
    for line in [image, raw], ["-f", "qcow2", "-F", "raw", image, raw], ["-F", "qcow2", raw, image]:
        said = pynbd_here(monkeypatch, capsys, "compare", *line)
        assert said == (0, "Images are identical.\n", "")
    said = pynbd_here(monkeypatch, capsys, "compare", "-q", "-f", "raw", image, raw)
    assert said == (1, "", "")


@pytest.mark.parametrize(
    "line, said",
    [
        (["{a}"], "missing argument 'B'"),
        (["{a}", "-"], "B: a pipe is no disk; a file of that name is ./-"),
        (["-F", "raw", "{a}", "nbd://x"], "--b-format is for images"),
        (["-f", "raw", "nbd://x", "{a}"], "--format is for images"),
        (["-U", "nbd://x", "nbd://y"], "--force-share is for images"),
        (["-R", "x", "{a}", "{a}"], "--requests: 'x' is not a whole number, 1 to 1024"),
        (["{a}", "/no/where"], "/no/where: cannot be opened: No such file or directory"),
        (
            ["{a}", "nbd+unix:///?socket=/no/where"],
            "pynbd: nbd+unix:///?socket=/no/where: No such file or directory\n",
        ),
    ],
)
def test_status_2(
    line: list[str],
    said: str,
    disks: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.format(a=disks[0]) for word in line]
    status, out, err = pynbd_here(monkeypatch, capsys, "compare", *words)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_closed_standard_output(disks: tuple[Path, Path]) -> None:
    """The status tells."""
    line = f'exec "{sys.executable}" -m pynbd compare "{disks[0]}" "{disks[1]}" >&-'
    done = subprocess.run(["/bin/sh", "-c", line], check=False, timeout=30, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
