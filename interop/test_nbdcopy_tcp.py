"""Over TCP: pynbd takes any free port of localhost and prints where it is."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import peers, samples

SIZE = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    samples.sparse_file(path, SIZE)
    return path


@pytest.fixture
def uri(image: Path) -> Iterator[str]:
    line = [sys.executable, "-m", "pynbd", "serve", "-f", "raw", "-p", "0", str(image)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def test_both_ways(uri: str, image: Path, tmp_path: Path) -> None:
    peers.require("nbdcopy", "qemu-img")
    back, source = tmp_path / "back", tmp_path / "source"
    peers.run("nbdcopy", "--connections=4", uri, back)
    assert filecmp.cmp(image, back, shallow=False)
    samples.sparse_file(source, SIZE, seed=2)
    peers.run("nbdcopy", "--connections=4", "--flush", source, uri)
    peers.run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
    assert filecmp.cmp(image, source, shallow=False)
