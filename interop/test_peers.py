"""The peers themselves: each starts, and those that start each other find each other."""

import json
import subprocess
from pathlib import Path

import pytest

import pynbd
from interop import peers


@pytest.mark.parametrize("name", peers.PEERS)
def test_starts(name: str) -> None:
    peers.require(name)
    peers.run(name, "--version")


def test_qemu_nbd_serves_libnbd(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-nbd", "nbdinfo", "nbdsh")
    image = tmp_path / "a.qcow2"
    peers.run("qemu-img", "create", "-f", "qcow2", image, "1M")
    with peers.qemu_nbd(image, "-r", "-f", "qcow2", export="a b") as uri:
        assert json.loads(peers.run("nbdinfo", "--json", uri).stdout)["exports"][0]["export-size"]
        assert peers.nbdsh("print(h.get_size())", uri) == "1048576\n"


def test_nbdkit_finds_plugins_and_filters() -> None:
    peers.require("nbdkit", "nbdsh", "nbdinfo")
    with peers.nbdkit("--filter=cow", "memory", "64K") as uri:
        assert peers.run("nbdinfo", "--size", uri).stdout == "65536\n"
        assert peers.nbdsh("h.pwrite(b'x' * 512, 0); print(h.pread(1, 511))", uri)


def test_nbdinfo_starts_a_server() -> None:
    """Socket activation: the server inherits a clean environment and descriptor 3."""
    peers.require("nbdkit", "nbdinfo")
    line = ["--size", "--", "[", *peers.command("nbdkit"), "memory", "64K", "]"]
    assert peers.run("nbdinfo", *line).stdout == "65536\n"


def test_fio_speaks_nbd() -> None:
    peers.require("nbdkit", "fio")
    with peers.nbdkit("memory", "1M") as uri:
        job = peers.fio(uri, "--rw=randread", "--size=1M")
        assert job["read"]["io_bytes"] == 1 << 20


def test_a_newer_python_has_what_pynbd_uses() -> None:
    peers.require(peers.python313)
    program = """
import backports.zstd, bitarray, click, construct, cryptography, deflate, numpy, rich, uvloop
import pynbd, pytest, ssl, sys, zstandard
assert sys.version_info >= (3, 13) and ssl.SSLContext.set_psk_server_callback
print(pynbd.__file__)
"""
    line = [*peers.python313(), "-c", program]
    found = subprocess.run(line, check=True, capture_output=True, text=True, timeout=60).stdout
    assert found.strip() == pynbd.__file__


def test_a_newer_python_serves_libnbd(tmp_path: Path) -> None:
    peers.require("nbdinfo", peers.python313)
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(65536))
    with peers.socket_path() as path:
        line = [*peers.python313(), "-m", "pynbd", "serve", "-f", "raw", "-k", str(path)]
        with peers.listening([*line, str(image)], path):
            assert peers.run("nbdinfo", "--size", peers.unix_uri(path)).stdout == "65536\n"
