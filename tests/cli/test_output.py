"""Sizes and tables for people."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pynbd.cli.output import in_units, one_line, printable, table


@pytest.mark.parametrize(
    "count,shown",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (1 << 20, "1 MiB"),
        (999 << 20, "999 MiB"),
        (1000 << 20, "1000 MiB"),
        ((1 << 30) - (1 << 18), "1 GiB"),
        (10**12, "931 GiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_in_units(count: int, shown: str) -> None:
    assert in_units(count) == shown


def test_printable() -> None:
    assert printable("Platte é\x1b[31m\n\udcff") == "Platte é?[31m??"


def test_one_line() -> None:
    """A name may be of any length: whose it is, and what is wrong with it, is told all the same."""
    line = one_line("disk.qcow2: its data file '" + "x" * 10000 + "\n' cannot be a file name")
    assert len(line) <= 280
    assert line.startswith("disk.qcow2: its data file 'xxx")
    assert line.endswith("xxx?' cannot be a file name")
    assert one_line("y" * 280) == "y" * 280


def test_table() -> None:
    rows = [("NAME", "SIZE", ""), ("a", "1 KiB", "x"), ("longer", "", "")]
    assert table(rows) == "  NAME    SIZE\n  a       1 KiB  x\n  longer\n"


@pytest.mark.parametrize(
    "command", ["completion bash", "man man1", "man --markdown", "demo family"]
)
def test_output_that_nobody_reads(command: str, tmp_path: Path) -> None:
    """A full disk is named; a reader that has left ends it without a word, as SIGPIPE would."""
    line = [sys.executable, "-m", "pynbd", *command.split()]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            line, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=20, check=False
        )
    assert done.returncode == 1
    assert done.stderr.endswith(b"pynbd: standard output: No space left on device\n")
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        said = process.stderr.read()
    assert process.returncode == 141
    assert b"pynbd:" not in said
