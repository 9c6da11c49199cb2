"""``pynbd copy``: its arguments; what it does is in tests/client and interop/test_copy_*.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pynbd.block.qcow2.builder import Data, Image, InternalSnapshot
from tests.cli.looking import pynbd_here

M = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    snapshots = [InternalSnapshot("before", {0: Data(b"earlier")})]
    Image(size=M, clusters={0: Data(b"now")}, snapshots=snapshots).write(path)
    return path


def test_it_is_silent(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    assert pynbd_here(monkeypatch, capsys, "copy", disk, new) == (0, "", "")
    assert new.read_bytes() == b"now".ljust(M, b"\0")


def test_a_snapshot_and_a_format(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    line = ["copy", "-l", "before", "--flush", "--target-is-zero", disk, new]
    assert pynbd_here(monkeypatch, capsys, *line) == (0, "", "")
    assert new.read_bytes() == b"earlier".ljust(M, b"\0")
    assert pynbd_here(monkeypatch, capsys, "copy", "-f", "raw", disk, new) == (0, "", "")
    assert new.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    "line, said",
    [
        (["{disk}"], "missing argument 'DST'"),
        (["", "{new}"], "SRC: the name of an image or an NBD URI is expected"),
        (["{disk}", ""], "DST: the name of an image or an NBD URI is expected"),
        (["{disk}", "-"], "DST: a pipe is no disk; a file of that name is ./-"),
        (["{disk}", "ssh:x"], "DST: 'ssh:x' is a protocol name, neither a file nor a URI"),
        (["{disk}", "nbd+what://x"], "nbd+what"),
        (["-o", "size=1M", "{disk}", "{new}.qcow2"], "-o size: a copy is as large as SRC"),
        (["-o", "compat=1.1", "{disk}", "{new}"], "-o: it is for a new qcow2 image (-O qcow2"),
        (["-o", "compat=1.1", "-O", "raw", "{disk}", "{new}.qcow2"], "-o: it is for a new qcow2"),
        (["-o", "compat=1.1", "-n", "{disk}", "{new}.qcow2"], "-o: with --no-create no image is"),
        (
            ["-B", "x", "--bitmap", "b", "{disk}", "{new}.qcow2"],
            "--backing: with --bitmap no",
        ),
        (["-B", "x", "{disk}", "nbd://x"], "--backing is for files: DST is a URI"),
        (["-n", "{disk}", "nbd://x"], "--no-create is for files: DST is a URI"),
        (["-B", "x", "-o", "backing_file=y", "{disk}", "{new}"], "-o backing_file: it is given tw"),
        (
            ["-B", "x", "--target-is-zero", "{disk}", "{new}.qcow2"],
            "--target-is-zero: with --b",
        ),
        (["-B", "x", "{disk}", "{new}.qcow2"], "backing_fmt: needed, raw or qcow2"),
        (["-O", "raw", "{disk}", "nbd://x"], "--target-format is for files: DST is a URI"),
        (["-U", "nbd://x", "{new}"], "--force-share is for images"),
        (["-l", "s", "nbd://x", "{new}"], "--load-snapshot is for images"),
        (["--bitmap", "b", "-l", "s", "{disk}", "{new}"], "--bitmap: bitmaps describe the active"),
        (
            ["--bitmap", "b", "--target-is-zero", "{disk}", "{new}"],
            "--target-is-zero: with --bitmap DST is an earlier copy",
        ),
        (["--bitmap", "a", "--bitmap", "b", "{disk}", "{new}"], "--bitmap: one at a time"),
        (["{disk}", "{new}.vmdk"], "new.vmdk would be raw, whatever its name says (-O raw"),
        (["-S", "3", "{disk}", "{new}"], "--sparse: '3' is not a power of two, 512 to 32m, or 0"),
        (["-R", "0", "{disk}", "{new}"], "--requests: '0' is not a whole number, 1 to 1024"),
        (["-C", "65", "{disk}", "{new}"], "--connections: '65' is not a whole number, 1 to 64"),
        (["--request-size", "2k", "{disk}", "{new}"], "--request-size: '2k' is not a power of two"),
    ],
)
def test_arguments_that_make_no_sense(
    line: list[str],
    said: str,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = tmp_path / "new"
    words = [word.format(disk=disk, new=new) for word in line]
    status, out, err = pynbd_here(monkeypatch, capsys, "copy", *words)
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("pynbd: ")
    assert err.count("\n") == 1
    assert not new.exists()


def test_closed_standard_descriptors(disk: Path, tmp_path: Path) -> None:
    """What it opens does not become its standard error, or anything else that is written to."""
    new = tmp_path / "new"
    line = f'exec "{sys.executable}" -m pynbd copy "{disk}" "{new}" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", line], check=False, timeout=30).returncode == 0
    assert new.read_bytes() == b"now".ljust(M, b"\0")
