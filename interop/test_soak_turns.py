"""One image is written by pynbd and by QEMU in turns; ``make soak`` takes more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers
from interop.soak.turns import CHOICES, Turns

TURNS = 8


@pytest.mark.parametrize("name", CHOICES)
def test_turns(name: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon")
    counts = Turns(name, tmp_path, seed=1).run(TURNS)
    assert counts["by_pynbd"] == TURNS // 2
