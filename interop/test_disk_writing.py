"""A disk in Python that is written to, that of docs/library.md, with real clients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe
from interop.documented import programs

SIZE = 1 << 30
M = 1 << 20


@pytest.fixture
def uri(tmp_path: Path, pynbd_serve: PynbdServe) -> str:
    file = tmp_path / "blocks.py"
    file.write_text(programs()["blocks.py"])
    return pynbd_serve(f"--python={file}:Blocks")


def data_of(uri: str) -> list[tuple[int, int]]:
    """(offset, length) of the data that qemu-img sees; all else is a hole of zeroes."""
    said = peers.run("qemu-img", "map", "-f", "raw", "--output=json", uri).stdout
    rows = json.loads(said)
    for row in rows:
        assert row["zero"] != row["data"]
    return [(row["start"], row["length"]) for row in rows if row["data"]]


def test_what_it_can(uri: str) -> None:
    peers.require("nbdinfo")
    (export,) = json.loads(peers.run("nbdinfo", "--json", uri).stdout)["exports"]
    assert export["export-size"] == SIZE
    assert not export["is_read_only"]
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "multi_conn"):
        assert export[f"can_{can}"]
    assert not export["can_cache"]


def test_qemu_io(uri: str) -> None:
    peers.require("qemu-io", "qemu-img")
    samples.qemu_io(uri, "write -P 5 4k 64k", "write -P 6 -f 100M 12k", "flush", driver="raw")
    assert data_of(uri) == [(4096, 65536), (100 * M, 12288)]
    samples.qemu_io(
        uri,
        "write -z 6k 4k",  # half a block, a half that stays
        "discard 32k 8k",
        "read -P 5 4k 2k",
        "read -P 0 6k 4k",
        "read -P 5 10k 22k",
        "read -P 0 32k 8k",
        "read -P 5 40k 28k",
        driver="raw",
    )
    assert data_of(uri) == [(4096, 28672), (40960, 28672), (100 * M, 12288)]


def test_nbdcopy_there_and_back(uri: str, tmp_path: Path) -> None:
    peers.require("nbdcopy")
    content = samples.sparse_file(tmp_path / "a.raw", 4 * M)
    peers.run("nbdcopy", tmp_path / "a.raw", uri)
    peers.run("nbdcopy", uri, tmp_path / "b.raw")
    assert (tmp_path / "b.raw").stat().st_size == SIZE
    with (tmp_path / "b.raw").open("rb") as copy:
        assert copy.read(5 * M) == content + bytes(M)
    assert samples.allocated(tmp_path / "b.raw") <= samples.allocated(tmp_path / "a.raw")


def test_zeroes_of_all_at_once(uri: str) -> None:
    peers.require("nbdsh")
    script = """
h.pwrite(b"x" * 100000, 12345)
h.zero(h.get_size(), 0, nbd.CMD_FLAG_FAST_ZERO)
print(h.pread(200000, 0).count(0))
"""
    assert peers.nbdsh(script, uri) == "200000\n"


def test_the_longest_requests(uri: str) -> None:
    peers.require("nbdsh")
    script = """
data = bytes((at // 4096) % 251 for at in range(0, 1 << 25, 4096))
data = b"".join(bytes([byte]) * 4096 for byte in data)
h.pwrite(data, 4095)
print(h.pread(len(data), 4095) == data)
"""
    assert peers.nbdsh(script, uri) == "True\n"


def test_fio_verify(uri: str) -> None:
    peers.require("fio")
    verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
    job = ["--rw=randrw", "--bsrange=512-256k", "--bs_unaligned", "--iodepth=16", "--size=16M"]
    done = peers.fio(uri, *verify, *job)
    assert done["error"] == 0
    assert done["write"]["total_ios"] > 50
