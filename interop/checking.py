"""What qemu-img check says of an image, and what pynbd does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from interop import peers
from pynbd.cli.check import check
from pynbd.errors import ImageError


@dataclass(frozen=True)
class Said:
    """An exit status, and the JSON if there was any."""

    status: int
    report: dict[str, Any] | None


def qemu_check(image: Path, *args: str) -> Said:
    # qemu looks for data files from where it works.
    line = ["check", "--output=json", *args, image.name]
    done = peers.run("qemu-img", *line, check=False, cwd=image.parent)
    return _said(done.returncode, done.stdout)


def pynbd_check(image: Path, *args: str) -> Said:
    line = ["--json", *args, str(image)]
    done = CliRunner().invoke(check, line, standalone_mode=False)
    if isinstance(done.exception, ImageError):
        return Said(1, None)
    if isinstance(done.exception, SystemExit):
        return _said(done.exit_code, done.stdout)
    if done.exception:
        raise done.exception
    return _said(done.return_value, done.stdout)


def _said(status: int, output: str) -> Said:
    if not output.strip():
        return Said(status, None)
    report = json.loads(output)
    del report["filename"]
    return Said(status, report)


def content(image: Path) -> bytes | None:
    """What a guest sees of an image, without what is below it; None if it cannot be read."""
    raw = image.with_suffix(".raw")
    line = ["convert", "-q", "-O", "raw", image.name, raw.name]
    done = peers.run("qemu-img", *line, check=False, cwd=image.parent)
    return None if done.returncode else raw.read_bytes()
