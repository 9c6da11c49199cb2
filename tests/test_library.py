"""docs/library.md: its programs run and print what stands there, and their types are right."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from interop import peers, terminal
from interop.documented import LIBRARY, programs
from tests.test_pytest_plugin import PLUGINS

ROOT = LIBRARY.parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has who saved every program."""
    for name, text in programs().items():
        assert name.endswith(".py"), text
        (tmp_path / name).write_text(text)
    return tmp_path


def test_everything_on_the_page(folder: Path) -> None:
    peers.require("qemu-img", "nbdinfo", "nbdsh", "nbdcopy")
    options = " ".join([*PLUGINS, "-p no:cacheprovider", "-p no:asyncio"])
    environment = {"PYTEST_ADDOPTS": options, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    with closing(terminal.Terminal(folder, terminal.environment() | environment)) as shell:
        for step in terminal.steps(LIBRARY):
            status, output = shell.run(step.command, step.output)
            where = f"library.md:{step.line}: {step.command}"
            assert status == 0, f"{where}: status {status}\n{output}"
            assert terminal.matches(output, step.output), f"{where}\n{output}"


def test_types(folder: Path) -> None:
    """Under mypy --strict; a test suite needs no types."""
    names = [name for name in programs() if not name.startswith("test_")]
    assert len(names) >= 5
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *names],
        cwd=folder,
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_links() -> None:
    for target in terminal.links(LIBRARY):
        assert (LIBRARY.parent / target).exists()
