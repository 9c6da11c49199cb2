"""docs/protocol-support.md and the tests name the same rows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "protocol-support.md"
SIZES = "H19 O36 S11 M32 F12 C14 B21 W15 R11 X17 P22 L8 T21"
"""The last row of each group; they are numbered from 1."""


def documented() -> list[str]:
    """The ids in the first column of the tables."""
    return re.findall(r"^\| ([A-Z]\d+) \|", DOCUMENT.read_text(), re.MULTILINE)


def named_by_tests() -> Iterator[str]:
    """The arguments of every `row` in the sources of the tests."""
    for path in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="row"), args=ids):
                    yield from (ast.literal_eval(id_) for id_ in ids)


def test_every_row_is_documented_once() -> None:
    rows = [f"{last[0]}{n + 1}" for last in SIZES.split() for n in range(int(last[1:]))]
    assert documented() == rows


def test_rows_are_complete() -> None:
    for line in DOCUMENT.read_text().splitlines():
        if re.match(r"\| [A-Z]\d", line):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 4, line
            assert all(cells), line


def test_every_row_is_tested() -> None:
    assert set(documented()) - set(named_by_tests()) == set()


def test_every_tested_row_is_documented() -> None:
    assert set(named_by_tests()) - set(documented()) == set()
