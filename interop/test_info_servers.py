"""pynbd info and ls of real servers, next to nbdinfo --json --list of the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from interop import peers, samples
from interop.conftest import serving
from pynbd.cli.info import info
from pynbd.cli.ls import ls


def said_by(command: click.Command, *args: str) -> str:
    said = CliRunner().invoke(command, args, catch_exceptions=False)
    assert (said.exit_code, said.stderr) == (0, "")
    return said.stdout


def pynbd_read_only(folder: Path) -> AbstractContextManager[str]:
    return serving(samples.chain(folder), "-r", "-x", "disk é", "-D", "for a test")


def pynbd_writable(folder: Path) -> AbstractContextManager[str]:
    samples.sparse_file(folder / "disk.raw", 1_000_001)
    return serving(folder / "disk.raw", "-f", "raw")


def qemu_nbd(folder: Path) -> AbstractContextManager[str]:
    options = ["-r", "-f", "qcow2", "-A", "-B", "b0", "-D", "a chain"]
    return peers.qemu_nbd(samples.chain(folder), *options, export="sda")


def qemu_nbd_writable(folder: Path) -> AbstractContextManager[str]:
    samples.sparse_file(folder / "disk.raw", 1 << 20)
    return peers.qemu_nbd(folder / "disk.raw", "-f", "raw")


def nbdkit(_folder: Path) -> AbstractContextManager[str]:
    return peers.nbdkit("memory", "10M")


def nbdkit_simple(_folder: Path) -> AbstractContextManager[str]:
    return peers.nbdkit("--no-sr", "memory", "0")


def nbdkit_block_size(_folder: Path) -> AbstractContextManager[str]:
    policy = ["blocksize-minimum=512", "blocksize-preferred=64K", "blocksize-maximum=1M"]
    return peers.nbdkit("--filter=blocksize-policy", "memory", "1G", *policy)


def nbdkit_several(folder: Path) -> AbstractContextManager[str]:
    for name in ("a", "b", "c d"):
        samples.sparse_file(folder / name, 1 << 16)
    return peers.nbdkit("file", f"dir={folder}")


SERVERS = [
    pynbd_read_only,
    pynbd_writable,
    qemu_nbd,
    qemu_nbd_writable,
    nbdkit,
    nbdkit_simple,
    nbdkit_block_size,
    nbdkit_several,
]


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.__name__)
def test_as_nbdinfo(server: Callable[[Path], AbstractContextManager[str]], tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdkit")
    with server(tmp_path) as uri:
        expected: Any = json.loads(peers.run("nbdinfo", "--json", "--list", uri).stdout)
        assert json.loads(said_by(info, "--json", uri)) == expected
        assert json.loads(said_by(ls, "--json", uri)) == expected["exports"]
        text = said_by(info, uri)
        long = said_by(ls, "--long", uri)
        lines = said_by(ls, uri).splitlines()[1:]
        for export, line in zip(expected["exports"], lines, strict=True):
            assert line.startswith(export["export-name"] or '""')
            assert ("read-only" in line) == export["is_read_only"]
            for key in ("export-size", "uri", *(["description"] * ("description" in export))):
                assert str(export[key]) in text
                assert str(export[key]) in long


def test_one_of_several(tmp_path: Path) -> None:
    """A URI that names an export asks for that one; ls lists all."""
    peers.require("nbdkit")
    with nbdkit_several(tmp_path) as uri:
        one = uri.replace(":///", ":///c%20d")
        assert [e["export-name"] for e in json.loads(said_by(info, "--json", one))["exports"]] == [
            "c d"
        ]
        assert len(json.loads(said_by(ls, "--json", one))) == 3


def test_a_server_that_ends_with_its_client_goes_on(tmp_path: Path) -> None:
    """To be looked at is no client: nothing is opened."""
    peers.require("qemu-nbd")
    image = tmp_path / "disk.raw"
    samples.sparse_file(image, 1 << 20)
    with peers.socket_path() as path:
        line = [*peers.command("qemu-nbd"), "-r", "-f", "raw", "-x", "sda", f"--socket={path}"]
        with peers.listening([*line, str(image)], path) as server:
            for export in ("", "sda"):
                uri = peers.unix_uri(path, export)
                assert "1 MiB" in said_by(info, uri)
                assert "1 MiB" in said_by(ls, uri)
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(0.2)
