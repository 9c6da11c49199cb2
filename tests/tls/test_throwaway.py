"""Throw-away credentials work, and are nobody else's."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pynbd.errors import UsageError
from pynbd.tls import credentials, throwaway
from pynbd.tls.credentials import ServerCredentials, client_context
from pynbd.tls.names import CertificateNames
from tests.tls.handshakes import shake


@pytest.mark.parametrize(
    "hostname", ["localhost", "127.0.0.1", "::1", "nbd.example.com", "192.0.2.7", "fe80::1"]
)
def test_certificates(tmp_path: Path, hostname: str) -> None:
    throwaway.make(tmp_path, hosts=["nbd.example.com", "192.0.2.7", "fe80::1%lo"], psk=False)
    server = ServerCredentials(certificates=tmp_path, verify_peer=True)
    ends = shake(client_context(certificates=str(tmp_path)), server.context(print), hostname)
    der = ends.server.getpeercert(binary_form=True)
    assert der
    assert CertificateNames.of(der).names == (throwaway.USER,)
    assert not (tmp_path / "keys.psk").exists()


@pytest.mark.skipif(not credentials.HAS_PSK, reason="PSK needs Python 3.13")
def test_psk(tmp_path: Path) -> None:
    throwaway.make(tmp_path, hosts=[], psk=True)
    users: list[str] = []
    server = ServerCredentials(psk_file=tmp_path)
    client = client_context(psk_file=str(tmp_path), psk_user=throwaway.USER)
    shake(client, server.context(users.append), None)
    assert users == [throwaway.USER]


def test_files_are_private_and_secrets_differ(tmp_path: Path) -> None:
    secrets = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir(mode=0o700)
        throwaway.make(folder, hosts=[], psk=True)
        assert {path.name for path in folder.iterdir()} == {
            "ca-cert.pem",
            "server-cert.pem",
            "server-key.pem",
            "client-cert.pem",
            "client-key.pem",
            "keys.psk",
        }
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        secrets |= {path.read_bytes() for path in folder.iterdir()}
    assert len(secrets) == 12


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "server-key.pem").write_text("mine")
    with pytest.raises(FileExistsError):
        throwaway.make(tmp_path, hosts=[], psk=True)
    assert (tmp_path / "server-key.pem").read_text() == "mine"


@pytest.mark.parametrize("host", ["", "a..b", "x" * 64])
def test_host_that_cannot_be_one(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a host"):
        throwaway.make(tmp_path, hosts=[host], psk=False)
    assert not list(tmp_path.iterdir())


def test_host_in_another_script(tmp_path: Path) -> None:
    throwaway.make(tmp_path, hosts=["bücher.example"], psk=False)
    server = ServerCredentials(certificates=tmp_path)
    client = client_context(certificates=str(tmp_path))
    shake(client, server.context(print), "xn--bcher-kva.example")
