"""A kernel device. There is none where this runs: the kernel's part is played."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from pathlib import Path

import pytest

from interop import peers
from pynbd.cli.qemu_nbd import kernel
from pynbd.cli.qemu_nbd.kernel import KernelDevice
from pynbd.errors import PynbdError

HEADER = Path("/usr/include/linux/nbd.h")
BLKROSET = 0x125D  # linux/fs.h: _IO(0x12, 93)
NAMES = {
    0xAB00: "SET_SOCK",
    0xAB01: "SET_BLKSIZE",
    0xAB03: "DO_IT",
    0xAB04: "CLEAR_SOCK",
    0xAB05: "CLEAR_QUE",
    0xAB07: "SET_SIZE_BLOCKS",
    0xAB08: "DISCONNECT",
    0xAB0A: "SET_FLAGS",
    BLKROSET: "BLKROSET",
}


def test_numbers() -> None:
    if not HEADER.exists():
        pytest.skip("no linux/nbd.h")
    found = re.findall(r"#define NBD_(\w+)\s+_IO\(\s*0xab,\s*(\d+)\s*\)", HEADER.read_text())
    there = {0xAB00 + int(number): name for name, number in found}
    assert {number: there[number] for number in NAMES if number != BLKROSET} == {
        number: name for number, name in NAMES.items() if number != BLKROSET
    }


def test_no_such_device() -> None:
    with pytest.raises(PynbdError, match=r"^/nonexistent/nbd0: cannot be opened: No such file"):
        KernelDevice("/nonexistent/nbd0")


def test_disconnect_something_else() -> None:
    with pytest.raises(PynbdError, match=r"^/dev/null: it is no NBD device: Inappropriate ioctl"):
        kernel.disconnect("/dev/null")


def test_attach_something_else() -> None:
    """It is refused after the negotiation, and nothing was attached."""
    peers.require("nbdkit")
    device = KernelDevice("/dev/null")
    with peers.nbdkit("memory", "1M") as uri, pytest.raises(PynbdError, match=r"^/dev/null: "):
        device.attach(uri.partition("socket=")[2], pytest.fail)
    device.close()


def test_attach_where_nobody_listens(tmp_path: Path) -> None:
    device = KernelDevice("/dev/null")
    with pytest.raises(PynbdError, match=r"^/dev/null: .*No such file"):
        device.attach(str(tmp_path / "none"), pytest.fail)
    device.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_attach(read_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is told all it needs, and what it gets is a socket in the transmission phase."""
    peers.require("nbdkit")
    calls: list[tuple[str, object]] = []
    content = b""

    def play(_fd: int, request: int, argument: object = 0) -> int:
        nonlocal content
        calls.append((NAMES[request], argument))
        if NAMES[request] == "DO_IT":
            # A READ of 512 bytes as the kernel sends it, and its simple reply; then NBD_CMD_DISC.
            with socket.socket(fileno=os.dup(int(str(dict(calls)["SET_SOCK"])))) as sock:
                sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 512, 512))
                reply = sock.recv(16 + 512, socket.MSG_WAITALL)
                assert reply[:16] == struct.pack(">IIQ", 0x67446698, 0, 7)
                content = reply[16:]
                sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 8, 0, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", play)
    device = KernelDevice("/dev/null")
    attached: list[str] = []
    options = [] if read_only else ["--filter=cow"]  # the plugin refuses writes
    with peers.nbdkit(*options, "pattern", "1M") as uri:
        device.attach(uri.partition("socket=")[2], lambda: attached.append(calls[-1][0]))
    device.close()
    # The pattern plugin: each 8 bytes are their offset.
    assert content == b"".join(at.to_bytes(8, "big") for at in range(512, 1024, 8))
    names = [name for name, _ in calls]
    assert names == [
        "SET_SOCK",
        "SET_BLKSIZE",
        "SET_SIZE_BLOCKS",
        "SET_FLAGS",
        *(["BLKROSET"] if read_only else []),
        "DO_IT",
        "CLEAR_QUE",
        "CLEAR_SOCK",
    ]
    told = dict(calls)
    assert (told["SET_BLKSIZE"], told["SET_SIZE_BLOCKS"]) == (512, 2048)
    assert int(str(told["SET_FLAGS"])) & 0b11 == (0b11 if read_only else 0b01)
    assert attached == [names[-4]]


def test_disconnect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, request, _: calls.append(NAMES[request]))
    kernel.disconnect("/dev/null")
    assert calls == ["CLEAR_QUE", "DISCONNECT", "CLEAR_SOCK"]
    assert capsys.readouterr().out == "/dev/null disconnected\n"
