"""Which file a picture becomes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pynbd.cli.picture.columns import Layer
from pynbd.cli.picture.drawing import DiskPicture, draw, renderer
from pynbd.errors import PynbdError, UsageError

NOTHING = np.zeros((5, 0), np.int64)
EMPTY = DiskPicture("a.raw", 0, [Layer("a.raw", "raw", 0, NOTHING, NOTHING)], [])


def test_the_suffix_decides(tmp_path: Path) -> None:
    draw(EMPTY, tmp_path / "disk.svg")
    assert (tmp_path / "disk.svg").read_text().startswith("<svg ")
    draw(EMPTY, tmp_path / "disk.PNG")
    with Image.open(tmp_path / "disk.PNG") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("name", ["disk.jpg", "disk", ".svg"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--image: .*: the name has to end in \.svg or \.png"):
        draw(EMPTY, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_png_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynbd.cli.picture.png", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PynbdError, match=r"pip install 'pynbd\[picture\]', or draw \.svg"):
        renderer(Path("disk.png"))
    assert renderer(Path("disk.svg"))
