"""``--untrusted``: every command that opens an image opens nothing else for it than what is beside
it, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import pynbd as library
from pynbd.block.qcow2.builder import Image
from tests.cli.looking import pynbd, pynbd_here

SIZE = 1 << 20
COMMANDS: list[list[str]] = [
    ["serve", "-f", "qcow2", "IMAGE"],
    ["serve", "-f", "qcow2", "-s", "IMAGE"],
    ["info", "-f", "qcow2", "IMAGE"],
    ["map", "-f", "qcow2", "IMAGE"],
    ["compare", "-f", "qcow2", "-F", "raw", "IMAGE", "images/good"],
    ["compare", "-f", "raw", "-F", "qcow2", "images/good", "IMAGE"],
    ["copy", "-f", "qcow2", "IMAGE", "copy.raw"],
]
each_command = pytest.mark.parametrize("command", COMMANDS, ids=" ".join)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with images, a secret beside it, and the current one above both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "secret").write_bytes(b"secret".ljust(SIZE, b"\0"))
    (tmp_path / "images" / "good").write_bytes(b"good".ljust(SIZE, b"\0"))
    return tmp_path / "images"


def overlay(path: Path, backing: str, backing_format: str | None = "raw") -> Path:
    Image(size=SIZE, backing_file=backing, backing_format=backing_format).write(path)
    return path


def line(command: Sequence[str], image: Path) -> list[str]:
    """The arguments of a command, about an image."""
    return [command[0], "--untrusted", *(str(image) if x == "IMAGE" else x for x in command[1:])]


@each_command
@pytest.mark.parametrize("name", ["../secret", "{}/secret", "link"])
def test_files_outside(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    name: str,
) -> None:
    (folder / "link").symlink_to("../secret")
    image = overlay(folder / "top", name.format(folder.parent))
    status, out, err = pynbd_here(monkeypatch, capsys, *line(command, image))
    assert status == (2 if command[0] == "compare" else 1)
    (said,) = err.splitlines()
    assert "outside of" in said
    assert str(folder) in said
    assert "secret" not in out or command[0] == "info"  # which tells the name


@each_command
def test_a_format_that_is_not_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    image = overlay(folder / "top", "good")
    formats = ("-f", "-F") if command[-1] == "IMAGE" else ("-f",)
    args = [
        word
        for before, word in zip(["", *command], command, strict=False)
        if not {word, before} & set(formats)
    ]
    status, _, err = pynbd_here(monkeypatch, capsys, *line(args, image))
    (said,) = err.splitlines()
    assert (status, "untrusted: the format of" in said) == (2, True)


@each_command
def test_a_backing_format_that_is_not_recorded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    image = overlay(folder / "top", "good", None)
    status, _, err = pynbd_here(monkeypatch, capsys, *line(command, image))
    (said,) = err.splitlines()
    assert status
    assert "is not recorded" in said
    assert "--probe-backing" not in said
    assert "qemu-img" not in said  # which would open what the image names
    status, _, err = pynbd_here(monkeypatch, capsys, *line(command, image), "--probe-backing")
    (said,) = err.splitlines()
    assert (status, "excludes probe-backing" in said) == (2, True)


@each_command
def test_a_fifo_in_place_of_the_image(folder: Path, command: list[str]) -> None:
    """Nobody waits for its other end."""
    os.mkfifo(folder / "top")
    for untrusted in (True, False):
        args = line(command, folder / "top")
        if not untrusted:
            args.remove("--untrusted")
        done = pynbd(*args)
        (said,) = done.stderr.splitlines()
        assert done.returncode
        assert "regular file" in said


@pytest.mark.parametrize("command", COMMANDS[2:], ids=" ".join)
def test_what_is_beside_the_image(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    image = overlay(folder / "top", "good")
    status, _, err = pynbd_here(monkeypatch, capsys, *line(command, image))
    assert (status, err) == (0, "")


def test_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks at no other file; the image has to be one."""
    image = overlay(folder / "top", "../secret")
    for repair in ([], ["-r", "all"]):
        args = ["check", "--untrusted", *repair]
        status, _, err = pynbd_here(monkeypatch, capsys, *args, image)
        assert (status, "the format of" in err) == (2, True)
        assert pynbd_here(monkeypatch, capsys, *args, "-f", "qcow2", image)[::2] == (0, "")
        device = Path("/dev/null")
        status, _, err = pynbd_here(monkeypatch, capsys, *args, "-f", "qcow2", device)
        assert (status, "regular files" in err) == (1, True)


async def test_the_library(folder: Path) -> None:
    image = overlay(folder / "top", "good")
    options = {"format": "qcow2", "untrusted": True, "read_only": True}
    async with (
        library.serve(image, **options) as server,  # type: ignore[arg-type]
        library.connect(server.uri) as client,
    ):
        assert await client.pread(0, 4) == b"good"
    overlay(folder / "top", "../secret")
    with pytest.raises(library.ImageError, match="outside of"):
        async with library.serve(image, **options):  # type: ignore[arg-type]
            pass
    async with await library.open_image(folder / "good", format="raw") as node:
        with pytest.raises(library.UsageError, match="untrusted"):
            async with library.serve(node, untrusted=True):
                pass
