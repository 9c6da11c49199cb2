"""Images from strangers: which files are opened for them, which are refused, and that nothing was
done to these.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.chain import open_image
from pynbd.block.overlay import open_with_overlay
from pynbd.block.qcow2.builder import Data, Image, Written, poke
from pynbd.errors import ImageError, PynbdError, UnsupportedFeature, UsageError

SIZE = 1 << 20

_listening: list[list[str]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """What is opened, by what it really is; not what is only looked up."""
    if event == "open" and isinstance(args[0], str) and not args[2] & os.O_PATH:
        for opened in _listening:
            opened.append(os.path.realpath(args[0]))


sys.addaudithook(_audit)  # for ever


@contextmanager
def opens() -> Iterator[list[str]]:
    """The files that are opened meanwhile."""
    _listening.append([])
    try:
        yield _listening[-1]
    finally:
        _listening.pop()


def raw(path: Path, data: bytes = b"") -> Path:
    path.write_bytes(data.ljust(SIZE, b"\0"))
    return path


def overlay(path: Path, backing: str | Path, backing_format: str | None = "raw") -> Path:
    Image(size=SIZE, backing_file=str(backing), backing_format=backing_format).write(path)
    return path


async def refused(image: object, *parts: str | Path, **options: Any) -> list[str]:
    """It is refused with one line that has all ``parts``; what was opened before that."""
    options = {"format": "qcow2", "untrusted": True} | options
    before = len(os.listdir("/proc/self/fd"))
    with opens() as opened, pytest.raises(PynbdError) as caught:
        await open_image(image, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text, text
    assert len(os.listdir("/proc/self/fd")) == before
    return opened


async def content(image: Path, length: int = 4, **options: Any) -> bytes:
    async with await open_image(image, **{"format": "qcow2", "untrusted": True} | options) as node:
        return await node.pread(0, length)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The directory of images; its parent is outside."""
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


# What is allowed


@pytest.mark.parametrize("name", ["base", "./base", "sub/../base", "sub/base", "{}/base"])
async def test_a_file_in_the_directory(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    raw(folder / "base", b"base")
    raw(folder / "sub" / "base", b"base")
    assert await content(overlay(folder / "top", name.format(folder))) == b"base"


async def test_what_links_inside_lead_to(folder: Path) -> None:
    raw(folder / "base", b"base")
    (folder / "there").symlink_to(folder / "base")
    assert await content(overlay(folder / "top", "there")) == b"base"


async def test_the_directory_is_where_the_image_really_is(folder: Path, tmp_path: Path) -> None:
    """Whatever the way there."""
    raw(folder / "base", b"base")
    overlay(folder / "top", folder / "base")
    (tmp_path / "way").symlink_to(folder)
    (tmp_path / "link").symlink_to(folder / "top")
    assert await content(tmp_path / "way" / "top") == b"base"
    assert await content(tmp_path / "link") == b"base"
    overlay(folder / "top", "base")
    assert await content(tmp_path / "way" / "top") == b"base"
    raw(tmp_path / "base", b"evil")
    opened = await refused(tmp_path / "link", tmp_path / "base", "outside of", folder)
    assert opened == [str(folder / "top")]


async def test_a_chain_in_subdirectories(folder: Path) -> None:
    (folder / "sub").mkdir()
    raw(folder / "base", b"base")
    overlay(folder / "sub" / "middle", "../base")
    assert await content(overlay(folder / "top", "sub/middle", "qcow2")) == b"base"


async def test_a_raw_image(folder: Path) -> None:
    assert await content(raw(folder / "disk", b"QFI\xfb"), format="raw") == b"QFI\xfb"


async def test_a_data_file_is_looked_for_beside_the_image_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image(size=SIZE, data_file="data", clusters={0: Data(b"data")}).write(folder / "top")
    raw(tmp_path / "data", b"evil")
    monkeypatch.chdir(tmp_path)
    assert await content(folder / "top") == b"data"
    assert await content(folder / "top", untrusted=False) == b"evil"


async def test_it_is_written(folder: Path) -> None:
    raw(folder / "base", b"base")
    path = overlay(folder / "top", "base")
    node = await open_image(path, format="qcow2", untrusted=True, read_only=False)
    assert await node.pwrite_batch([(0, b"new")]) == [None]
    await node.close()
    assert await content(path) == b"newe"
    node = await open_with_overlay(path, format="qcow2", untrusted=True)
    assert await node.pwrite_batch([(0, b"gone")]) == [None]
    await node.close()
    assert await content(path) == b"newe"


def _uncounted(path: Path, written: Written) -> None:
    """The refcount of the last cluster is 0."""
    block = int.from_bytes(path.read_bytes()[written.header.refcount_table_offset :][:8], "big")
    poke(path, block + 2 * (path.stat().st_size // 65536 - 1), b"\0\0")


def _cut_short(path: Path, written: Written) -> None:
    os.truncate(path, path.stat().st_size - 65536)


@pytest.mark.parametrize("damage", [_uncounted, _cut_short])
async def test_what_is_damaged_is_not_written(
    folder: Path, damage: Callable[[Path, Written], None]
) -> None:
    """Nobody who writes would see it; a check does."""
    path = folder / "top"
    damage(path, Image(size=SIZE, clusters={0: Data(b"a"), 65536: Data(b"b" * 65536)}).write(path))
    before = path.read_bytes()
    await refused(path, path, "untrusted", "-r reads it", read_only=False)
    assert path.read_bytes() == before
    assert await content(path, 1) == b"a"
    async with await open_image(path, format="qcow2", read_only=False):
        pass  # who trusts it may


# What is refused


@pytest.mark.parametrize(
    "name", ["../secret", "{}/secret", "sub/../../secret", "sub/../../images/../secret", "{}/no"]
)
async def test_a_name_that_leads_out(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "sub").mkdir()
    raw(tmp_path / "secret", b"root")
    path = overlay(folder / "top", name.format(tmp_path))
    said = ("outside of", folder, "untrusted", f"backing file of {path}")
    assert await refused(path, *said) == [str(path)]


async def test_a_name_that_leads_out_is_not_even_looked_up(folder: Path) -> None:
    """Else it would be told whether the file is there."""
    assert await refused(overlay(folder / "top", "../nothing"), "outside of") == [
        str(folder / "top")
    ]


async def test_a_neighbour_whose_name_begins_like_the_directory(folder: Path) -> None:
    other = folder.with_name("images-of-others")
    other.mkdir()
    raw(other / "secret")
    await refused(overlay(folder / "top", other / "secret"), "outside of")


@pytest.mark.parametrize("link", ["file", "directory", "chain"])
async def test_links_that_lead_out(folder: Path, tmp_path: Path, link: str) -> None:
    raw(tmp_path / "secret", b"root")
    name = "link"
    if link == "directory":
        (folder / "link").symlink_to(tmp_path)
        name = "link/secret"
    elif link == "chain":
        (folder / "between").symlink_to("../secret")
        (folder / "link").symlink_to("between")
    else:
        (folder / "link").symlink_to(tmp_path / "secret")
    path = overlay(folder / "top", name)
    assert await refused(path, folder / name, "outside of", folder) == [str(path)]


async def test_a_lower_layer_that_leads_out(folder: Path, tmp_path: Path) -> None:
    """Although it is in a directory below: the directory of the top image counts."""
    raw(tmp_path / "secret")
    (folder / "sub").mkdir()
    middle = overlay(folder / "sub" / "middle", "../../secret")
    path = overlay(folder / "top", "sub/middle", "qcow2")
    assert await refused(path, "outside of", folder) == [str(path), str(middle)]


async def test_a_data_file_that_is_outside(folder: Path, tmp_path: Path) -> None:
    raw(tmp_path / "secret")
    Image(size=SIZE, data_file="data").write(folder / "top")
    (folder / "data").unlink()
    (folder / "data").symlink_to("../secret")
    opened = await refused(folder / "top", folder / "data", "outside of", "data file of")
    assert opened == [str(folder / "top")]


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "a directory": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a character device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["image", "backing file", "data file"])
async def test_only_regular_files(folder: Path, kind: str, role: str) -> None:
    """Nobody waits for what is none, nor is anything done to it, for reading and for writing."""
    path = folder / "top"
    if role == "backing file":
        overlay(path, "odd")
    elif role == "data file":
        Image(size=SIZE, data_file="odd").write(path)
        (folder / "odd").unlink()
    else:
        path = folder / "odd"
    KINDS[kind](folder / "odd")
    for read_only in (True, False):
        opened = await refused(path, folder / "odd", kind, "regular files", read_only=read_only)
        assert set(opened) == ({str(path)} if role != "image" else set())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "device" not in kind])
@pytest.mark.parametrize("read_only", [True, False])
async def test_what_is_no_file_is_refused_from_anybody(
    folder: Path, kind: str, read_only: bool
) -> None:
    KINDS[kind](folder / "odd")
    for format_name in (None, "raw"):
        options = {"untrusted": False, "format": format_name, "read_only": read_only}
        await refused(folder / "odd", folder / "odd", **options)
    path = overlay(folder / "top", "odd")
    await refused(path, folder / "odd", "backing file of", untrusted=False, read_only=read_only)
    Image(size=SIZE, data_file="x").write(path)
    (folder / "x").unlink()
    KINDS[kind](folder / "x")
    await refused(path, folder / "x", "data file of", untrusted=False, read_only=read_only)


# Formats


async def test_no_format_is_guessed(folder: Path) -> None:
    raw(folder / "base", b"base")
    path = overlay(folder / "top", "base", None)
    with pytest.raises(UsageError, match="--format"):
        await open_image(path, untrusted=True)
    with pytest.raises(UsageError, match="excludes probe-backing"):
        await open_image(path, format="qcow2", untrusted=True, probe_backing=True)
    opened = await refused(path, "'base'", "not recorded")
    assert opened == [str(path)]


@pytest.mark.parametrize("format_name", ["vmdk", "luks", "QCOW2", "host_device", ""])
async def test_a_recorded_format_that_is_neither_raw_nor_qcow2(
    folder: Path, format_name: str
) -> None:
    raw(folder / "base")
    path = overlay(folder / "top", "base", format_name)
    assert await refused(path, repr(format_name), "raw", "qcow2") == [str(path)]


async def test_what_is_raw_may_look_like_an_image(folder: Path, tmp_path: Path) -> None:
    """It is not taken for one, and what it names is not opened."""
    raw(tmp_path / "secret")
    base = overlay(folder / "base", "../secret")
    assert await content(overlay(folder / "top", "base", "raw"), 8) == base.read_bytes()[:8]


@pytest.mark.parametrize("name", ["json:{}", "nbd://localhost/", "fd:3", "file:base", "a:b"])
async def test_protocol_names(folder: Path, name: str) -> None:
    with pytest.raises(UnsupportedFeature, match="not a plain file name"):
        await open_image(overlay(folder / "top", name), format="qcow2", untrusted=True)


async def test_json(folder: Path) -> None:
    path = raw(folder / "disk")
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{path}"}}}}'
    with pytest.raises(UsageError, match="the name of a file"):
        await open_image(name, format="raw", untrusted=True)


async def test_options_of_a_node(folder: Path, tmp_path: Path) -> None:
    """Those of a program are under the same rules."""
    top: dict[str, object] = {"file.filename": str(overlay(folder / "top", "base"))}
    raw(folder / "base", b"base")
    raw(tmp_path / "secret")
    with pytest.raises(UsageError, match="format has to be given"):
        await open_image(top, untrusted=True)
    top["driver"] = "qcow2"
    async with await open_image(top, untrusted=True) as node:
        assert await node.pread(0, 4) == b"base"
    below = {"driver": "raw", "file.filename": str(tmp_path / "secret")}
    with pytest.raises(ImageError, match="outside of"):
        await open_image(top | {"backing": below}, untrusted=True)
