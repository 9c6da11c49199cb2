"""SECURITY.md: its limits are those that there are, with their defaults, and its commands work.

What it promises is tested where it is done: tests/block/test_confinement.py and
tests/cli/test_untrusted.py (files and formats), tests/block/test_limits.py (memory),
tests/server/test_limits.py (clients).
"""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import click
import pytest

from pynbd.block.limits import ImageLimits
from pynbd.block.qcow2.builder import Image
from pynbd.cli.main import commands
from pynbd.cli.serve import serve
from pynbd.errors import UsageError
from pynbd.server.limits import Limits
from tests.cli.looking import pynbd_here

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text()
README = (ROOT / "README.md").read_text()
_ROW = re.compile(
    r"^\|[^|]+\| ([\d,]+)( MiB)?[^|]*\| `(--[a-z-]+)` \| `([a-z_]+)` \| ([^|]+) \|", re.MULTILINE
)
_COMMAND = re.compile(r"^pynbd (.*)$", re.MULTILINE)


@pytest.mark.parametrize("kind", [ImageLimits, Limits])
def test_the_tables_of_limits(kind: type[ImageLimits | Limits]) -> None:
    options = {option.name: option for option in serve.params}
    rows = {row[3]: row for row in _ROW.findall(PAGE) if row[3] in kind.__dataclass_fields__}
    assert rows.keys() == kind.__dataclass_fields__.keys()
    for field, (number, unit, option, _, zero) in rows.items():
        value = int(number.replace(",", "")) << (20 if unit else 0)
        assert value == getattr(kind(), field), field
        assert options[field].opts == [option]
        with (
            nullcontext()
            if zero != "no number"
            else pytest.raises(UsageError, match=f"{field}: 1 or more")
        ):
            kind(**{field: 0})


def commands_with(option: str) -> set[str]:
    context = click.Context(commands)
    return {
        name
        for name in commands.list_commands(context)
        if (command := commands.get_command(context, name))
        and option in {parameter.name for parameter in command.params}
    }


def test_the_commands_that_take_limits_of_images() -> None:
    (named,) = re.findall(r"(`info`.*) have the first three", PAGE)
    assert commands_with("metadata") == {"serve", *re.findall("`([a-z]+)`", named)}
    (named,) = re.findall(r"`--untrusted`, which (.*) take", README)
    assert commands_with("untrusted") == set(re.findall("`([a-z]+)`", named))


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an image that names a file outside its directory, and of one that does not."""
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line) for line in _COMMAND.findall(PAGE)]
    assert [command[0] for command in lines] == ["map", "check", "serve"]
    Image(size=1 << 20).write("upload.qcow2")
    for command in lines[:2]:
        assert pynbd_here(monkeypatch, capsys, *command)[::2] == (0, "")
    Image(size=1 << 20, backing_file="/etc/hosts", backing_format="raw").write("upload.qcow2")
    for command in (lines[0], lines[2]):
        status, _, err = pynbd_here(monkeypatch, capsys, *command)
        assert (status, "outside of" in err) == (1, True)
