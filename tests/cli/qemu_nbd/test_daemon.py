"""The pid file. What `Daemon.fork` does is seen from outside, in interop."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pynbd.cli.qemu_nbd.daemon import write_pid_file
from pynbd.errors import PynbdError


def test_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("something that is longer\n")
    write_pid_file(str(path))
    assert path.read_text() == f"{os.getpid()}\n"


def test_pid_file_is_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    write_pid_file(str(path))
    assert path.stat().st_mode & 0o777 == 0o600


def test_pid_file_that_is_held(tmp_path: Path) -> None:
    """By another open file description; that it is in this process makes no difference."""
    path = tmp_path / "pid"
    write_pid_file(str(path))
    with pytest.raises(PynbdError, match=f"^--pid-file: {path} is that of a process that lives$"):
        write_pid_file(str(path))
    assert path.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("name", ["missing/pid", "."])
def test_pid_file_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(PynbdError, match=r"^--pid-file: .*: (No such file|Is a directory)"):
        write_pid_file(str(tmp_path / name))
