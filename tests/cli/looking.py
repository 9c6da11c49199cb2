"""Images to be looked at, and the program that looks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pynbd.block.qcow2.builder import Bitmap, Data, Image, InternalSnapshot, Zero
from pynbd.block.qcow2.format import BitmapFlags
from pynbd.cli import complaints
from pynbd.cli.main import commands

K, M = 1 << 10, 1 << 20


def pynbd(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pynbd", *map(str, args)]
    return subprocess.run(
        line,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=cwd,
        stdin=subprocess.PIPE,
    )


def pynbd_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str | Path
) -> tuple[object, str, str]:
    """Status and output of the program, without a process of its own; but for `serve`, which keeps
    signals from its process for ever.
    """
    if args[0] == "serve":
        done = pynbd(*args)
        return done.returncode, done.stdout, done.stderr
    monkeypatch.setattr(sys, "argv", ["pynbd", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        complaints.run(commands, "pynbd")
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


def write_chain(folder: Path) -> Path:
    """The top of two images of a MiB: a snapshot, a bitmap of each kind, one of them below."""
    below = Image(
        size=M,
        clusters={0: Data(b"below"), 64 * K: Data(b"below")},
        bitmaps=[Bitmap("older", dirty=[(0, 64 * K)])],
    )
    below.write(folder / "below.qcow2")
    top = Image(
        size=M,
        clusters={64 * K: Data(b"top"), 128 * K: Zero()},
        snapshots=[InternalSnapshot("before", {}, id="7")],
        backing_file="below.qcow2",
        backing_format="qcow2",
        bitmaps=[
            Bitmap("recording", granularity=4 * K, dirty=[(64 * K, 8 * K)]),
            Bitmap("resting", flags=BitmapFlags.NONE),
            Bitmap("torn", flags=BitmapFlags.IN_USE),
        ],
    )
    top.write(folder / "top.qcow2")
    return folder / "top.qcow2"
