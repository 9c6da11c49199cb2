"""What pynbd-qemu-nbd opens, and what it says of it. What clients see of it is compared with
qemu-nbd in ``interop/test_qemu_nbd_side_by_side.py``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from interop import peers
from pynbd.cli.qemu_nbd import serving
from pynbd.cli.qemu_nbd.command import qemu_nbd
from pynbd.cli.qemu_nbd.options import QemuNbdOptions
from pynbd.errors import PynbdError

M = 1 << 20
GUARDED = "no write may make it look like another format (-f raw lifts that)"


@pytest.fixture
def raw(tmp_path: Path) -> str:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(M))
    return str(path)


@pytest.fixture
def qcow2(tmp_path: Path) -> str:
    peers.require("qemu-img")
    path = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    return str(path)


async def opened(*args: str) -> bool:
    """Whether it is writable."""
    options = QemuNbdOptions(**qemu_nbd.make_context("test", list(args)).params)
    node = await serving._open(options)
    try:
        assert node.size == M
        return not node.read_only
    finally:
        await node.close()


def warnings(records: Sequence[logging.LogRecord]) -> list[str]:
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


async def test_a_guessed_raw_image(raw: str, caplog: pytest.LogCaptureFixture) -> None:
    assert await opened(raw)
    assert warnings(caplog.records) == [
        f"{raw}: its format was not given, and guessed to be raw: {GUARDED}"
    ]


@pytest.mark.parametrize(
    "args, writable",
    [
        ("-f raw {raw}", True),
        ("-r {raw}", False),
        ("file:{raw} -f raw", True),
        ("--image-opts driver=raw,file.filename={raw}", True),
        ('json:{{"driver":"raw","file":{{"driver":"file","filename":"{raw}"}}}}', True),
    ],
)
async def test_raw(args: str, writable: bool, raw: str, caplog: pytest.LogCaptureFixture) -> None:
    assert await opened(*args.format(raw=raw).split()) == writable
    assert warnings(caplog.records) == []


@pytest.mark.parametrize("args", ["", "-f qcow2", "--discard=unmap", "--detect-zeroes=on"])
async def test_qcow2(args: str, qcow2: str, caplog: pytest.LogCaptureFixture) -> None:
    assert await opened(*args.split(), qcow2)
    assert warnings(caplog.records) == []


@pytest.mark.parametrize("option", ["--discard=unmap", "--detect-zeroes=on", "-s"])
async def test_qcow2_for_reading(option: str, qcow2: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not await opened("-r", option, qcow2)
    assert warnings(caplog.records) == []


def test_a_label_where_there_is_no_selinux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SOCKET_LABEL", "/nonexistent/sockcreate")
    with (
        pytest.raises(PynbdError, match=r"^--selinux-label: 'x': No such file or directory$"),
        serving._socket_label("x"),
    ):
        pytest.fail("a socket without its label")


def test_a_label_is_given_and_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute = tmp_path / "sockcreate"
    attribute.touch()
    written: list[bytes] = []
    monkeypatch.setattr(serving, "_SOCKET_LABEL", str(attribute))
    monkeypatch.setattr(os, "write", lambda _fd, data: written.append(data))
    with serving._socket_label("system_u:object_r:svirt_t:s0"):
        assert written == [b"system_u:object_r:svirt_t:s0\0"]
    assert written[1:] == [b""]
