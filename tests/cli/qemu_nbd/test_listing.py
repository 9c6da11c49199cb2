"""``--list``, of exports as a server may tell of them. What qemu-nbd prints of the same servers is
compared in ``interop/test_qemu_nbd_lists.py``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pynbd.cli.objects import Objects
from pynbd.cli.qemu_nbd import listing
from pynbd.cli.qemu_nbd.command import qemu_nbd
from pynbd.cli.qemu_nbd.options import QemuNbdOptions
from pynbd.errors import PynbdError
from pynbd.protocol.handshake_client import RemoteExport
from pynbd.protocol.uri import NbdUri
from pynbd.protocol.values import TransmissionFlag

PLAIN = RemoteExport(
    name="disk",
    description="",
    size=1 << 20,
    flags=TransmissionFlag(0x8D),
    block_size=(512, 4096, 1 << 20),
    contexts=("base:allocation",),
)


def printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *exports: RemoteExport
) -> str:
    async def listed(_where: NbdUri) -> list[RemoteExport]:
        return list(exports)

    monkeypatch.setattr(listing, "list_exports", listed)
    listing.print_exports(options("-k", "/s"), Objects(()))
    return capfd.readouterr().out


def options(*args: str) -> QemuNbdOptions:
    return QemuNbdOptions(**qemu_nbd.make_context("test", ["-L", *args]).params)


def test_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A server that states little."""
    assert printed(monkeypatch, capfd, PLAIN) == (
        "exports available: 1\n"
        " export: 'disk'\n"
        "  size:  1048576\n"
        "  flags: 0x8d ( flush fua df )\n"
        "  transaction size: 32-bit\n"
    )


def test_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One that states everything, and tries to write on the terminal."""
    export = replace(
        PLAIN,
        description="a\x1b[31mb",
        flags=TransmissionFlag(0x1FFF),
        constrained=True,
        extended=True,
    )
    assert printed(monkeypatch, capfd, export, PLAIN).startswith(
        "exports available: 2\n"
        " export: 'disk'\n"
        "  description: a?[31mb\n"
        "  size:  1048576\n"
        "  flags: 0x1fff ( readonly flush fua rotational trim zeroes df multi resize cache"
        " fast-zero block-status-payload )\n"
        "  min block: 512\n"
        "  opt block: 4096\n"
        "  max block: 1048576\n"
        "  transaction size: 64-bit\n"
        "  available meta contexts: 1\n"
        "   base:allocation\n"
        " export: 'disk'\n"
    )


def test_without_flags(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    export = replace(PLAIN, flags=TransmissionFlag(0))
    assert "size: " not in printed(monkeypatch, capfd, export).replace("transaction size", "")


def test_none(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert printed(monkeypatch, capfd) == "exports available: 0\n"


def test_nobody_is_there() -> None:
    with pytest.raises(PynbdError, match=r"^nbd\+unix:///\?socket=/nonexistent: No such file"):
        listing.print_exports(options("-k", "/nonexistent"), Objects(()))
