"""Block devices for tests: loop devices, where this process may make them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """The name of a device that is ``path``. What was cut off from the end of the file since is
    EIO.
    """
    found = subprocess.run(
        ["losetup", "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("no loop device can be made here")
    device = found.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
