"""``pynbd ls``: what it refuses, and what it prints of exports; real servers are in
interop/test_info_servers.py.
"""

from __future__ import annotations

import pytest

from pynbd.cli.export_info import export_info
from pynbd.cli.export_report import export_report, listing
from pynbd.protocol.handshake_client import RemoteExport
from pynbd.protocol.uri import NbdUri
from pynbd.protocol.values import TransmissionFlag as Flag
from tests.cli.looking import pynbd_here

NOBODY = "nbd+unix:///?socket=/nonexistent"
SERVER = NbdUri.parse("nbd://localhost")
EXPORTS = [
    export_info(export, SERVER)
    for export in (
        RemoteExport("", "", 1 << 20, Flag.HAS_FLAGS, (1, 4096, 1 << 25), ()),
        RemoteExport(
            "a disk",
            "with a \x1b[2J in it",
            10**12,
            Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.SEND_DF | Flag.ROTATIONAL,
            (512, 4096, 1 << 25),
            ("base:allocation",),
            constrained=True,
        ),
    )
]


def test_listing() -> None:
    assert listing(EXPORTS) == (
        "NAME    SIZE     FLAGS                      DESCRIPTION\n"
        '""      1 MiB    read-write\n'
        "a disk  931 GiB  read-only, df, rotational  with a ?[2J in it\n"
    )


def test_all_of_an_export() -> None:
    assert export_report(EXPORTS[1]) == (
        "Export a disk:\n"
        "  description: with a ?[2J in it\n"
        "  size:        931 GiB (1000000000000 bytes)\n"
        "  access:      read-only\n"
        "  can:         df, rotational\n"
        "  uri:         nbd://localhost/a%20disk\n"
        "  blocks:      512 B at least, 4 KiB preferred, 32 MiB at most\n"
        "  contexts:\n"
        "    base:allocation\n"
    )


@pytest.mark.parametrize(
    "size,shown",
    [
        (0, "0"),
        (1000, "1000"),
        (1 << 10, "1K"),
        ((8 << 20) + (32 << 10), "8224K"),
        (1 << 40, "1T"),
        ((1 << 63) - 512, str((1 << 63) - 512)),
        (1 << 62, "4E"),
    ],
)
def test_size_as_nbdkit_writes_it(size: int, shown: str) -> None:
    """In the largest unit that leaves nothing over: nbdkit's human sizes."""
    export = RemoteExport("", "", size, Flag.HAS_FLAGS, (1, 4096, 1 << 25), ())
    assert export_info(export, SERVER)["export-size-str"] == shown


@pytest.mark.parametrize(
    "args,status,said",
    [
        (["disk.qcow2"], 2, "URI: 'disk.qcow2' is not an NBD URI, such as nbd://localhost"),
        ([], 2, "missing argument 'URI'"),
        ([NOBODY], 1, f"{NOBODY}: No such file or directory"),
    ],
)
def test_refused(
    args: list[str],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pynbd_here(monkeypatch, capsys, "ls", *args) == (status, "", f"pynbd: {said}\n")
