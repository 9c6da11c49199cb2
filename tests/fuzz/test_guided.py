"""What a run says of targets that have a defect: a crash, a hang, and too much memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.guided import CRASHED, RSS_LIMIT_MB, Bounds, outcome
from tests.fuzz.targets import Target

RUNS = 10

_LEFT: list[bytearray] = []


def crashes(data: bytes) -> None:
    assert data != b"seed"


def hangs(data: bytes) -> None:
    while data == b"seed":
        time.sleep(0.01)


def grows(data: bytes) -> None:
    if data == b"seed":
        held = bytearray(b"x") * (2 * RSS_LIMIT_MB << 20)
        time.sleep(10)  # the limit is looked at once a second
        del held


def leaves_behind(data: bytes) -> None:
    """The process comes to the limit in seven inputs, none of them to blame."""
    _LEFT.append(bytearray(b"x") * (RSS_LIMIT_MB // 7 << 20))
    time.sleep(0.3)


def refuses(data: bytes) -> None:
    if data == b"seed":
        raise ValueError("an answer")


def test_the_last_input_that_failed_is_the_one(tmp_path: Path) -> None:
    lines = [f"Test unit written to {tmp_path}/{name}" for name in ("slow-unit-1", "crash-2")]
    (tmp_path / "log").write_text("\n".join(lines))
    found = outcome(tmp_path, CRASHED)
    assert found.artifact == tmp_path / "crash-2"
    assert found.verdict == "CRASH"


def faulty(one_input: Callable[[bytes], None]) -> Target:
    return Target(one_input.__name__, (ValueError,), lambda: [b"seed"], one_input, 64, (), 0)


@pytest.mark.skipif(
    find_spec("atheris") is None and os.environ.get("CI") != "true", reason="there is no atheris"
)
@pytest.mark.timeout(300)
def test_what_comes_of_a_defect(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.test_guided", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=290,
    )
    assert ran.stdout.endswith("well: False\n"), ran.stdout + ran.stderr
    for name, verdict in (("crashes", "CRASH"), ("hangs", "TIMEOUT"), ("grows", "OOM")):
        (artifact,) = (tmp_path / name).glob(f"{verdict.lower()}-*")
        assert artifact.read_bytes() == b"seed"
        assert f"again: python -m tests.fuzz {name} --input {artifact}\n" in ran.stdout
    lines = {line.split()[0]: line.split() for line in ran.stdout.splitlines() if "/s" in line}
    assert {name: line[-1] for name, line in lines.items()} == {
        "crashes": "CRASH",
        "hangs": "TIMEOUT",
        "grows": "OOM",
        "leaves_behind": "ok",
        "refuses": "ok",
    }
    assert int(lines["leaves_behind"][1]) >= RUNS
    assert "\n  in " in ran.stdout  # more than one process


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    targets = [faulty(one_input) for one_input in (crashes, hangs, grows, leaves_behind, refuses)]
    print("well:", run(targets, folder, sys.argv[1], Bounds(0, RUNS, 1, 5), 4))
