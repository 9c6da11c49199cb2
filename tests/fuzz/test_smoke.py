"""Every target of this folder, for a moment: its seeds, mutations of them, and a guided run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.targets import load, mutated, names

SEED = 1
GUIDED_RUNS = 100


@pytest.mark.parametrize("name", names())
def test_mutated(name: str, tmp_path: Path) -> None:
    target = load(name)
    seeds = list(target.seeds())
    rng = random.Random(f"{name} {SEED}")
    inputs = [*seeds, *(mutated(rng, seeds, target.dictionary) for _ in range(target.smoke))]
    for data in inputs:
        try:
            target.run(data)
        except BaseException as error:
            (path := tmp_path / "input").write_bytes(data)
            error.add_note(f"again: python -m tests.fuzz {name} --input {path}")
            raise


@pytest.mark.skipif(
    find_spec("atheris") is None and os.environ.get("CI") != "true", reason="there is no atheris"
)
@pytest.mark.timeout(600)
def test_guided(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--runs", str(GUIDED_RUNS), "--seed", str(SEED)]
    command += ["--hang", "60", "--corpus", str(tmp_path)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=590
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("  ok\n") == len(names())
