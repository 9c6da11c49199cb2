"""The mix of requests to disks with more L2 tables than the server keeps in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers
from interop.soak.far import SHAPES, run_far


@pytest.mark.parametrize("name", SHAPES)
def test_far(name: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-nbd")
    run_far(name, tmp_path, 700, seed=1)
