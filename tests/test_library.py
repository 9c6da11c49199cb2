"""docs/library.md: its programs run and print what stands there, and their types are right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from interop import documented, peers
from tests.test_pytest_plugin import PLUGINS

PAGE = "library.md"


def test_everything_on_the_page(tmp_path: Path) -> None:
    peers.require(*peers.PEERS)
    options = " ".join([*PLUGINS, "-p no:cacheprovider", "-p no:asyncio"])
    documented.run(PAGE, tmp_path, PYTEST_ADDOPTS=options)


def test_types(tmp_path: Path) -> None:
    """Under mypy --strict; a test suite needs no types."""
    names = []
    for block in documented.blocks(PAGE):
        if block.kind == "python" and not block.name.startswith("test_"):
            (tmp_path / block.name).write_text(block.text)
            names.append(block.name)
    assert len(names) >= 5
    line = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [*line, *names],
        cwd=tmp_path,
        env={"MYPYPATH": str(documented.ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout
