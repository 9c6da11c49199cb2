"""Rows over TLS: what serves them, and that no two ciphers are ever compared."""

from pathlib import Path

import pytest

from interop import peers
from interop.bench import jobs, tls
from interop.bench.rows import ROWS
from interop.bench.servers import NBDKIT, PYNBD, QEMU, Way, serve

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    peers.require("qemu-nbd", "nbdkit", "nbdinfo", "fio")
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
@pytest.mark.parametrize("name", [PYNBD, QEMU[0], NBDKIT])
def test_fio_reads_over_tls(disk: Path, name: str, tcp: bool) -> None:
    with serve(name, disk, Way("raw", tcp=tcp, tls=True)) as server:
        assert server.uri.startswith("nbds")
        assert tls.negotiated(server.uri) == tls.CIPHER
        assert jobs.steady("read", "64k", 4, SIZE).measure(server, 0.1) > 0


def test_another_cipher_is_refused(disk: Path, tmp_path: Path) -> None:
    tls.prepare(tmp_path)
    kind, credentials, *rest = tls.options("qemu-nbd", tmp_path)
    other = [kind, f"{credentials},priority=NORMAL:-AES-256-GCM", *rest]
    with (
        peers.qemu_nbd(disk, "-f", "raw", *other) as uri,
        pytest.raises(AssertionError, match="uses TLS_CHACHA20_POLY1305_SHA256; rows over TLS"),
    ):
        tls.checked(uri)


def test_a_server_in_clear_is_refused(disk: Path) -> None:
    with (
        peers.qemu_nbd(disk, "-f", "raw") as uri,
        pytest.raises(AssertionError, match="no TLS"),
    ):
        tls.checked(uri)


@pytest.mark.parametrize("name", [PYNBD, QEMU[0], NBDKIT])
def test_who_comes_in_clear_is_refused(disk: Path, name: str) -> None:
    with serve(name, disk, Way("raw", tls=True)) as server:
        plain = peers.unix_uri(str(server.address))
        refused = peers.run("nbdinfo", "--size", plain, check=False)
    assert refused.returncode != 0
    assert refused.stdout == ""


def test_rows_over_tls_name_it() -> None:
    assert all(row.name.startswith("TLS") == row.way.tls for row in ROWS)
