"""``pynbd serve --python FILE.py:NAME``: what NAME may be, and what is said where it is not."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.cli.test_serve import connect, export_name, failing, one_line, read, serving, started

DISK = """
    import dataclasses
    import pynbd

    class Text(pynbd.Disk):
        def __init__(self, text=b"from a class"):
            self.text = text
            self.size = len(text)

        async def pread(self, offset, length):
            return self.text[offset : offset + length]

    an_object = Text(b"an object")

    def function():
        return Text(b"a function")

    async def coroutine():
        return Text(b"a coroutine")

    @dataclasses.dataclass
    class NoDisk:
        size: int = 5

    def number():
        return 5

    async def fails():
        raise ValueError("it does\\nnot work")

    class Demanding(Text):
        def __init__(self, text):
            super().__init__(text)

    class Boundless(Text):
        size = None

        def __init__(self):
            pass

    nothing = None
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, DISK)


def written(folder: Path, text: str) -> Path:
    path = folder / "text.py"
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize(
    "name, content",
    [
        ("Text", b"from a class"),
        ("an_object", b"an object"),
        ("function", b"a function"),
        ("coroutine", b"a coroutine"),
    ],
)
def test_what_is_served(file: Path, name: str, content: bytes) -> None:
    with (
        serving("-p", "0", "--python", f"{file.name}:{name}", cwd=file.parent) as uri,
        connect(uri) as sock,
    ):
        assert export_name(sock) == len(content)
        assert read(sock, 0, len(content)) == content
    assert {path.name for path in file.parent.iterdir()} == {"text.py"}


def test_it_imports_its_neighbours(tmp_path: Path, file: Path) -> None:
    (tmp_path / "other.py").write_text("from text import an_object\n")
    where = f"{tmp_path}/other.py:an_object"
    with serving("-p", "0", "--python", where) as uri, connect(uri) as sock:
        assert export_name(sock) == 9


@pytest.mark.parametrize(
    "name, parts",
    [
        ("Other", ["text.py: no 'Other'; there is 'Text', 'an_object', 'Demanding', 'Boundless'"]),
        ("nothing", ["text.py: no 'nothing'"]),
        ("NoDisk", ["text.py:NoDisk: NoDisk, where a pynbd.Disk is expected"]),
        ("number", ["text.py:number: int, where a pynbd.Disk is expected"]),
        ("dataclasses", ["text.py:dataclasses: module, where a pynbd.Disk is expected"]),
        ("fails", ["text.py:29: ValueError: it does not work"]),
        ("Demanding", ["text.py: TypeError: ", "missing 1 required positional argument: 'text'"]),
        ("Boundless", ["text.py: Boundless.size: None is not a whole number"]),
    ],
)
def test_what_is_no_disk(file: Path, name: str, parts: list[str]) -> None:
    one_line(failing("--python", f"{file}:{name}"), 1, *parts)


@pytest.mark.parametrize(
    "text, part",
    [
        ("x = 1\nclass (:\n", "text.py:2: SyntaxError: "),
        ("x = '\0'\n", "text.py"),
        ("# coding: nonsense\n", "text.py: SyntaxError: unknown encoding: nonsense"),
        ("import nonsense_of_mine\n", "text.py:1: ModuleNotFoundError: No module named"),
        ("\n\n1 / 0\n", "text.py:3: ZeroDivisionError: division by zero"),
        ("open('/nonexistent')\n", "text.py:1: FileNotFoundError: [Errno 2]"),
        ("import sys\nsys.exit(3)\n", "text.py:2: SystemExit: 3"),
        ("raise KeyError\n", "text.py:1: KeyError\n"),
        ("import pynbd\n", "text.py: no 'Text'; there is no disk in it"),
    ],
)
def test_a_file_that_fails(tmp_path: Path, text: str, part: str) -> None:
    one_line(failing("--python", f"{written(tmp_path, text)}:Text"), 1, part)


def test_a_traceback_for_who_asks(tmp_path: Path) -> None:
    status, errors = failing("-v", "--python", f"{written(tmp_path, '1 / 0')}:Text")
    assert status == 1
    assert "Traceback (most recent call last):" in errors
    assert errors.endswith(f"pynbd: {tmp_path}/text.py:1: ZeroDivisionError: division by zero\n")


def test_no_file(tmp_path: Path) -> None:
    one_line(failing("--python", f"{tmp_path}/none.py:X"), 1, "none.py: No such file or directory")
    one_line(failing("--python", f"{tmp_path}:X"), 1, "Is a directory")


@pytest.mark.parametrize("where", ["", "text.py", "text.py:", ":Text", "text.py:a.b", "text.py:5"])
def test_it_names_file_and_name(where: str) -> None:
    one_line(failing("--python", where), 2, "--python: FILE.py:NAME is expected", where)


@pytest.mark.parametrize(
    "args, option",
    [
        (["disk.qcow2"], "IMAGE"),
        (["-f", "raw"], "--format"),
        (["-l", "1"], "--load-snapshot"),
        (["-A"], "--allocation-depth"),
        (["-B", "b"], "--bitmap"),
        (["--force-share"], "--force-share"),
        (["--probe-backing"], "--probe-backing"),
    ],
)
def test_options_for_images(file: Path, args: list[str], option: str) -> None:
    said = failing("--python", f"{file}:Text", *args)
    one_line(said, 2, f"{option}: it does not go with --python")


def test_an_image_or_a_disk() -> None:
    one_line(failing(), 2, "missing argument 'IMAGE'")


def test_read_only(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        import pynbd

        class Text(pynbd.Disk):
            size = 512
            async def pread(self, offset, length):
                return bytes(length)
            async def pwrite(self, offset, data):
                pass
            async def close(self):
                print("closed")
        """,
    )
    with started("-r", "-p", "0", "--python", f"{file}:Text") as server:
        with connect(server.uri) as sock:
            assert export_name(sock) == 512
        assert server.end() == (0, "closed\n", "")


CLINGING = """
import asyncio
import pynbd

class Clinging(pynbd.Disk):
    size = 512
    async def pread(self, offset, length):
        return bytes(length)
    async def close(self):
        {close}
"""


def test_a_close_that_fails(tmp_path: Path) -> None:
    """What could not be finished is told, and is the status."""
    file = written(tmp_path, CLINGING.format(close='raise OSError(28, "no space", "the disk")'))
    with started("-p", "0", "--python", f"{file}:Clinging") as server:
        assert server.end() == (1, "", "pynbd: the disk: no space\n")


def test_a_second_signal_skips_the_close(tmp_path: Path) -> None:
    file = written(tmp_path, CLINGING.format(close="await asyncio.sleep(3600)"))
    with started("-p", "0", "--python", f"{file}:Clinging") as server:
        server.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1.1)  # signals within a second are one
        assert server.end() == (0, "", "")
