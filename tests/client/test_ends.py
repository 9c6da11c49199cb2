"""The ends of a job: what is opened, made, refused, and what is left of it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from pynbd.block.engine import HostFile
from pynbd.client.copy import copy
from pynbd.client.ends import Reading, Writing, open_disk, open_target
from pynbd.errors import (
    DiskError,
    ImageError,
    ImageLocked,
    ReadError,
    UnsupportedFeature,
    UsageError,
)
from tests.block.devices import loop_device
from tests.block.test_engine import largest_file
from tests.client.playing import negotiate, playing, until_closed

M = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"\x11" * M)
    return path


def copied(source: Path, target: Path | str, how: Writing | None = None) -> None:
    async def work() -> None:
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(target), disk, how or Writing()) as place,
        ):
            await copy(disk, place)

    asyncio.run(work())


def failing(source: Path, target: Path | str, how: BaseException) -> None:
    async def work() -> None:
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(target), disk, Writing()) as place,
        ):
            await place.write(0, memoryview(b"begun"))
            raise how

    asyncio.run(work())


def test_a_new_file(source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    mask = os.umask(0o027)
    try:
        copied(source, new)
    finally:
        os.umask(mask)
    assert new.read_bytes() == source.read_bytes()
    assert new.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("size", [0, 5, 3 * M])
def test_a_file_gets_the_size_of_the_source(size: int, source: Path, tmp_path: Path) -> None:
    """Its name and owner stay."""
    old = tmp_path / "old"
    old.write_bytes(b"\xee" * size)
    number = old.stat().st_ino
    copied(source, old)
    assert old.read_bytes() == source.read_bytes()
    assert old.stat().st_ino == number


def test_a_file_that_cannot_have_the_size_keeps_what_it_has(source: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")
    with largest_file(M - 1), pytest.raises(ImageError, match="it cannot have 1048576 bytes: File"):
        copied(source, old)
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("how", [ReadError("bad"), asyncio.CancelledError(), KeyError("defect")])
def test_what_fails_leaves_no_new_file(how: BaseException, source: Path, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_bytes(b"old")
    with pytest.raises(type(how)) as raised:
        failing(source, new, how)
    assert raised.value is how
    assert not new.exists()
    with pytest.raises(type(how)) as raised:
        failing(source, old, how)
    if isinstance(how, DiskError):
        assert str(raised.value) == f"bad; {old} is incomplete now"
    assert old.stat().st_size == M


def test_a_locked_file(source: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")

    async def while_it_is_read() -> None:
        async with open_disk(str(old), Reading()):
            await asyncio.to_thread(copied, source, old)

    with pytest.raises(ImageLocked, match=r"old: another process uses it$"):
        asyncio.run(while_it_is_read())
    assert old.read_bytes() == b"old"


def test_other_formats(source: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"QFI\xfb\0\0\0\3".ljust(600, b"\0"))
    with pytest.raises(UnsupportedFeature, match=r"looks like qcow2; -O raw or -O qcow2 makes"):
        copied(source, old)
    assert old.stat().st_size == 600
    copied(source, old, Writing(format="raw"))
    assert old.read_bytes() == source.read_bytes()


def test_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for name in source, tmp_path / "link", tmp_path / "." / "source":
        with pytest.raises(UsageError, match="is the source"):
            copied(source, name)
    assert source.read_bytes() == b"\x11" * M


def test_a_part_needs_the_whole(source: Path, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_bytes(bytes(M - 1))

    async def opened(name: Path) -> None:
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(name), disk, Writing(), whole=False),
        ):
            pass

    for name, reason in (new, "does not exist"), (old, f"{M - 1} bytes, and the source has"):
        with pytest.raises(ImageError, match=reason):
            asyncio.run(opened(name))
    assert not new.exists()
    assert old.read_bytes() == bytes(M - 1)


@pytest.mark.parametrize("size", [M - 4096, M, M + 4096])
def test_a_block_device(
    size: int, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xee" * size)
    with loop_device(disk) as device:
        if size < M:
            with pytest.raises(ImageError, match=f"{size} bytes, and the source has {M}"):
                copied(source, device)
            return
        copied(source, device)
        assert Path(device).read_bytes() == source.read_bytes() + b"\xee" * (size - M)
        node = tmp_path / "node"
        status = os.stat(device)
        os.mknod(node, status.st_mode, status.st_rdev)
        with pytest.raises(UsageError, match="is the source"):
            copied(Path(device), node)
    left = [record.getMessage() for record in caplog.records]
    assert left == [f"{device}: it is larger; its last 4096 bytes are left as they are"] * (
        size > M
    )


def test_a_link_that_leads_nowhere(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(ImageError, match="it is a symbolic link that leads nowhere"):
        copied(source, link)
    assert link.is_symlink()


def test_another_file_of_that_name_stays(source: Path, tmp_path: Path) -> None:
    """It has come while the copy was under way."""
    new, other = tmp_path / "new", tmp_path / "other"
    other.write_bytes(b"other")

    async def work() -> None:
        async with (
            open_disk(str(source), Reading()) as disk,
            open_target(str(new), disk, Writing()),
        ):
            other.rename(new)
            raise ReadError("bad")

    with pytest.raises(ReadError):
        asyncio.run(work())
    assert new.read_bytes() == b"other"


def test_an_export_whose_end_cannot_be_written(tmp_path: Path) -> None:
    """Its size is no multiple of its block size; it is refused before anything is written."""
    said: list[bytes] = []

    def play(sock: socket.socket) -> None:
        negotiate(sock, size=8193, block_size=(4096, 4096, M))
        said.append(until_closed(sock))

    source = tmp_path / "odd"
    source.write_bytes(b"x" * 8193)
    with (
        playing(play) as uri,
        pytest.raises(ImageError, match="blocks of 4096 bytes: its last 1 cannot be written"),
    ):
        copied(source, uri)
    assert [len(words) for words in said] == [28]  # NBD_CMD_DISC


def test_a_loop_device_is_the_file_behind_it(source: Path, tmp_path: Path) -> None:
    with loop_device(source) as device:
        for one, other in (source, device), (Path(device), source):
            with pytest.raises(UsageError, match=f"DST: {other} is the source"):
                copied(one, other)
    assert source.read_bytes() == b"\x11" * M


def test_nothing_stays_open(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[HostFile] = []
    init = HostFile.__init__

    def watched(self: HostFile, *args: object, **options: object) -> None:
        init(self, *args, **options)  # type: ignore[arg-type]
        opened.append(self)

    monkeypatch.setattr(HostFile, "__init__", watched)
    copied(source, tmp_path / "new")
    with pytest.raises(KeyError):
        failing(source, tmp_path / "new", KeyError())
    assert len(opened) == 4
    assert all(file.fd < 0 for file in opened)
