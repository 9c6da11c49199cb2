"""The manual: complete, printed without complaint, and docs/reference.md is up to date."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from pynbd.cli.main import commands
from pynbd.cli.qemu_nbd.command import qemu_nbd
from tests.cli.test_main import pynbd

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "made" / "man1"
    done = pynbd("man", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == sorted(map(str, folder.iterdir()))
    return folder


def all_commands() -> dict[str, click.Command]:
    context = click.Context(commands)
    found = {name: commands.get_command(context, name) for name in commands.list_commands(context)}
    pages = {f"pynbd-{name}": command for name, command in found.items() if command}
    return pages | {"pynbd-qemu-nbd": qemu_nbd}


def printed(path: Path) -> str:
    """What man(1) shows; it must have nothing to complain about."""
    if not shutil.which("man"):
        pytest.skip("man is missing")
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    environment |= {"MANROFFSEQ": "", "GROFF_NO_SGR": "1", "MANROFFOPT": "-c"}
    line = ["man", "--warnings", "-E", "UTF-8", "-P", "cat", "-l", str(path)]
    done = subprocess.run(
        line, env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stderr == ""
    return re.sub(".\b", "", done.stdout)  # bold is a letter over itself


def test_there_is_a_page_for_each_command(folder: Path) -> None:
    assert {path.stem for path in folder.iterdir()} >= {"pynbd", *all_commands()}


@pytest.mark.parametrize("name", all_commands())
def test_every_option_is_there(folder: Path, name: str) -> None:
    text = printed(folder / f"{name}.1")
    options = [param for param in all_commands()[name].params if isinstance(param, click.Option)]
    for param in options:
        for option in param.opts + param.secondary_opts:
            assert re.search(rf"(?m)^ +(-.*(, |/ ))?{option}\b", text), option
    for title in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"):
        assert re.search(rf"(?m)^{title}$", text)


def test_serve(folder: Path) -> None:
    text = printed(folder / "pynbd-serve.1")
    assert "pynbd-serve - serve IMAGE over NBD until" in text
    assert "pynbd serve -k /run/disk.sock -x disk disk.qcow2" in text
    assert "[default: text]" in text
    assert re.search(r"LISTEN_PID, LISTEN_FDS +socket activation", text)


def test_compare(folder: Path) -> None:
    """What a command says of its own statuses takes the place of what is true of the others."""
    text = printed(folder / "pynbd-compare.1")
    assert "4  one of them cannot be read" in text
    assert text.count("EXIT STATUS") == 1


def test_it_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    pynbd("man", str(tmp_path))
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = pynbd("man", str(file / "below"))
    assert done.returncode == 1
    assert re.fullmatch(r"pynbd: .*Not a directory.*\n", done.stderr)


def test_the_reference_is_up_to_date() -> None:
    """If not: pynbd man --markdown > docs/reference.md."""
    done = pynbd("man", "--markdown")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == REFERENCE.read_text()
