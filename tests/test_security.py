"""SECURITY.md: its limits are those that there are, with their defaults, and its commands work.

What it promises is tested where it is done: tests/block/test_confinement.py and
tests/cli/test_untrusted.py (files and formats), tests/block/test_limits.py (memory),
tests/server/test_limits.py (clients).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pynbd.block.limits import ImageLimits
from pynbd.block.qcow2.builder import Image
from pynbd.block.sizes import parse_size
from pynbd.cli.serve import serve
from tests.cli.looking import pynbd_here

PAGE = (Path(__file__).parents[1] / "SECURITY.md").read_text()
_ROW = re.compile(r"^\|[^|]+\| ([\d.]+)( MiB)?[^|]*\| `(--[a-z-]+)` \|", re.MULTILINE)
_COMMAND = re.compile(r"^pynbd (.*)$", re.MULTILINE)


def test_the_table_of_limits() -> None:
    rows = {
        option: int(number) << 20 if unit else int(number)
        for number, unit, option in _ROW.findall(PAGE)
    }
    options = {
        option.opts[0]: option
        for option in serve.params
        if option.name in ImageLimits.__dataclass_fields__ and option.opts[0].startswith("--")
    }
    assert rows.keys() == options.keys()
    for name, value in rows.items():
        assert parse_size(str(options[name].default)) == value, name
        assert getattr(ImageLimits(), str(options[name].name)) == value, name


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an image that names a file outside its directory, and of one that does not."""
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in _COMMAND.findall(PAGE)]
    assert [command[0] for command in commands] == ["info", "check", "serve"]
    Image(size=1 << 20).write("upload.qcow2")
    for command in commands[:2]:
        assert pynbd_here(monkeypatch, capsys, *command)[::2] == (0, "")
    Image(size=1 << 20, backing_file="/etc/hosts", backing_format="raw").write("upload.qcow2")
    for command in (commands[0], commands[2]):
        status, _, err = pynbd_here(monkeypatch, capsys, *command)
        assert (status, "outside of" in err) == (1, True)
