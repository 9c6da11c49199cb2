"""Damaged images on the real command line: what is refused is one line and status 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from interop.damage import generator
from interop.damage.generator import Case

SEED = 6
COMMANDS = {"info": {0, 1}, "map": {0, 1}, "check": {0, 1, 2, 3, 63}}
REFUSED = [
    "data file/extension data file/length/bit 11",
    "over raw/names/backing file/too long",
    "over raw/names/backing file/the longest",
    "over raw/names/backing file/signs that steer a terminal",
    "over raw/names/backing file/not UTF-8",
    "plain/header v3/incompatible_features/2^64 - 1",
    "chain/loop/3 images",
    "chain/backing file, raw/a FIFO",
]


def said(command: str, image: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pynbd", command, str(image)]
    return subprocess.run(
        line, check=False, capture_output=True, encoding="utf-8", errors="replace", timeout=60
    )


def check_said(case: Case, command: str, done: subprocess.CompletedProcess[str]) -> None:
    where = f"{command}, {case.name}: {done}"
    assert done.returncode in COMMANDS[command], where
    lines = done.stderr.splitlines()
    assert all(len(line) < 300 and line.isprintable() for line in lines), where
    assert "Traceback" not in done.stderr, where
    if done.returncode == 1:
        assert lines[-1].startswith("pynbd: "), where


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in generator.every() if case.name == name)
    path = case.place(tmp_path)
    done = said("map", path)
    check_said(case, "map", done)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done
    assert str(tmp_path) in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_is_damaged(command: str, tmp_path: Path) -> None:
    for number, case in enumerate(generator.spread(generator.every(), 4, SEED)):
        folder = tmp_path / str(number)
        folder.mkdir()
        check_said(case, command, said(command, case.place(folder)))
