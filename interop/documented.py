"""The programs and command lines of a page of documentation, and running them as a reader would.

A fence says what a block is: ``python NAME.py`` is a program, which the ``text`` block after it is
the output of; ``console`` has command lines after ``$`` (more of the same after ``>``) and what
they print, where ``...`` stands for anything.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from interop import peers

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block. ``name``: that of a program, else empty."""

    kind: str
    name: str
    text: str


def blocks(page: str) -> list[Block]:
    """Those of ``docs/page``, in its order."""
    text = (ROOT / "docs" / page).read_text()
    return [Block(*match) for match in _FENCE.findall(text)]


def program(page: str, name: str) -> str:
    """The text of one program."""
    (found,) = (block.text for block in blocks(page) if block.name == name)
    return found


def run(page: str, folder: Path, **environment: str) -> None:
    """Run everything on a page in its order; an AssertionError shows what printed otherwise."""
    programs = folder / "bin"
    programs.mkdir()
    own = {"pynbd": "-m pynbd", "pytest": "-m pytest", "python3": ""}
    for name, arguments in own.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    for name in peers.PEERS:
        (programs / name).symlink_to(peers.find(name))
    found_there = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def printed(line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=folder,
            env=os.environ | found_there | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{line}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    waiting = ""
    for block in blocks(page):
        if block.kind == "python":
            (folder / block.name).write_text(block.text)
            waiting = f"python3 {block.name}"
        elif block.kind == "text":
            _compare(waiting, block.text, printed(waiting))
        elif block.kind == "console":
            for line, expected in _commands(block.text):
                _compare(line, expected, printed(line))


def _commands(text: str) -> list[tuple[str, str]]:
    """(command line, output) of a ``console`` block."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            command, output = found[-1]
            more = line.removeprefix("> ")
            found[-1] = (command + more, "") if more != line else (command, output + line)
    return found


def _compare(line: str, expected: str, printed: str) -> None:
    checker = doctest.OutputChecker()
    if not checker.check_output(expected, printed, doctest.ELLIPSIS):
        raise AssertionError(f"{line.rstrip()}\nhas printed\n{printed}\nin place of\n{expected}")
