"""Generated chains, each built once for all tests of a run, whichever process they run in.

They are to be looked at, not changed.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from interop import generator
from interop.generator import Chain, ChainPlan


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run; the processes of pytest-xdist have their own below it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "chains"
    folder.mkdir(exist_ok=True)
    return folder


def built(plan: ChainPlan, folder: Path) -> Chain:
    """The chain of a plan, below ``folder``."""
    home, done = folder / plan.id, folder / f"{plan.id}.done"
    with (folder / f"{plan.id}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            home.mkdir()
            generator.build(plan, home)
            done.touch()
    layers = [home / f"layer{number}.{layer.format}" for number, layer in enumerate(plan.layers)]
    bitmaps = [bitmap.name for bitmap in plan.layers[-1].bitmaps]
    return Chain(layers[-1], tuple(layers), tuple(bitmaps))
