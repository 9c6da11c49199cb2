"""What a shell completes after ``pynbd completion``: in bash itself, and as zsh and fish ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_main import pynbd

SHELLS = ["bash", "zsh", "fish"]

# Readline sets these variables for a word that is completed.
BASH = """
eval "$(pynbd completion bash)"
complete -p pynbd > /dev/null
compopt() { echo compopt "$@"; }
COMP_WORDS=("$@")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_pynbd_completion pynbd
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH on which ``pynbd`` is the one under test."""
    program = tmp_path / "pynbd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pynbd "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def completed(path: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    if not shutil.which("bash"):
        pytest.skip("bash is missing")
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", *words],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_subcommands(path: str) -> None:
    assert {"serve", "map", "completion"} <= set(completed(path, "pynbd", ""))
    assert completed(path, "pynbd", "ser") == ["serve"]


def test_options(path: str) -> None:
    assert completed(path, "pynbd", "serve", "--log") == ["--log-format"]
    assert {"--socket", "--trace", "--read-only"} <= set(completed(path, "pynbd", "serve", "--"))


def test_choices(path: str) -> None:
    assert completed(path, "pynbd", "serve", "--log-format", "") == ["text", "json"]
    assert completed(path, "pynbd", "serve", "-f", "q") == ["qcow2"]


@pytest.mark.parametrize("words", [["serve", ""], ["serve", "-k", ""], ["info", ""], ["map", "d"]])
def test_file_names(path: str, words: list[str]) -> None:
    """Bash itself completes them."""
    assert completed(path, "pynbd", *words) == ["compopt -o default", ""]


def test_directory_names(path: str) -> None:
    words = ["pynbd", "serve", "--tls-certificates", ""]
    assert completed(path, *words) == ["compopt -o dirnames", ""]


@pytest.mark.parametrize("shell", SHELLS)
def test_how_shells_ask(shell: str) -> None:
    """The line so far and the number of the word, or for fish the word itself."""
    script = pynbd("completion", shell).stdout
    assert f"_PYNBD_COMPLETE={shell}_complete" in script
    asked = {
        "_PYNBD_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "pynbd serve --log-format j",
        "COMP_CWORD": "j" if shell == "fish" else "3",
    }
    line = [sys.executable, "-m", "pynbd"]
    done = subprocess.run(
        line, env={**os.environ, **asked}, capture_output=True, text=True, timeout=20, check=True
    )
    assert "json" in done.stdout
    assert "text" not in done.stdout


@pytest.mark.parametrize("program", ["pynbd", "pynbd-qemu-nbd"])
@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_well_formed(shell: str, program: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is missing")
    script = pynbd("completion", shell, "--program", program).stdout
    subprocess.run([shell, "-n"], input=script, text=True, timeout=20, check=True)


def test_the_drop_in() -> None:
    script = pynbd("completion", "bash", "--program", "pynbd-qemu-nbd").stdout
    assert "_PYNBD_QEMU_NBD_COMPLETE=bash_complete" in script
    asked = {
        "_PYNBD_QEMU_NBD_COMPLETE": "bash_complete",
        "COMP_WORDS": "pynbd-qemu-nbd disk --cache w",
        "COMP_CWORD": "3",
    }
    line = [sys.executable, "-m", "pynbd.qemu_nbd"]
    done = subprocess.run(
        line, env={**os.environ, **asked}, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.split() == ["plain,writeback", "plain,writethrough"]


def test_a_shell_that_is_not_there() -> None:
    done = pynbd("completion", "csh")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pynbd: shell: 'csh' is not one of 'bash', 'zsh', 'fish'\n"
