"""TLS 1.2 and TLS 1.3, with the clients of libnbd and QEMU, and SSLKEYLOGFILE.

What OpenSSL writes into the server's file, in the format of NSS, has to be what GnuTLS writes into
the client's: then both tell the truth about that session, and about its version, which has labels
of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from interop import peers, tls_ends
from interop.certificates import Pki
from interop.tls_ends import LIBNBD, PYNBD, QEMU_IMG, Credentials

SIZE = 1 << 20
LABELS = {
    "1.2": {"CLIENT_RANDOM"},
    "1.3": {
        "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
        "SERVER_HANDSHAKE_TRAFFIC_SECRET",
        "CLIENT_TRAFFIC_SECRET_0",
        "SERVER_TRAFFIC_SECRET_0",
        "EXPORTER_SECRET",
    },
}
LINE = re.compile("[A-Z_0-9]+ [0-9a-f]{64} (?:[0-9a-f]{64}|[0-9a-f]{96})")


@pytest.mark.parametrize(
    "kind, client",
    [("a certificate", QEMU_IMG), ("an RSA key", LIBNBD), ("a pre-shared key", LIBNBD)],
)
def test_versions(kind: str, client: str, tmp_path: Path) -> None:
    peers.require(client)
    pki = Pki.make(tmp_path / "pki")
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE))
    if kind == "a pre-shared key":
        peers.require(peers.python313)
        theirs = ours = Credentials(psk=pki.psk)
    else:
        theirs = Credentials(certificates=pki.rsa if kind == "an RSA key" else pki.server)
        ours = Credentials(certificates=pki.client("alice"))
    said, heard = tmp_path / "server.keys", tmp_path / "client.keys"
    log = {"SSLKEYLOGFILE": str(said)}
    with tls_ends.serving(PYNBD, image, theirs, environment=log) as server:
        for version, labels in LABELS.items():
            only = tls_ends.only(version, tmp_path) | {"SSLKEYLOGFILE": str(heard)}
            outcome = tls_ends.ask(client, server.where, ours, "localhost", only)
            assert outcome.size == SIZE, outcome
            assert all(map(LINE.fullmatch, secrets(said)))
            assert {line.partition(" ")[0] for line in secrets(said)} == labels
            assert secrets(said) - secrets(heard) <= exporters(said)
            said.write_text("")
            heard.unlink()


def secrets(path: Path) -> set[str]:
    return {line for line in path.read_text().splitlines() if not line.startswith("#")}


def exporters(path: Path) -> set[str]:
    """Those that not every version of GnuTLS writes."""
    return {line for line in secrets(path) if line.startswith("EXPORTER_SECRET ")}


def test_older_versions_are_refused(tmp_path: Path) -> None:
    """TLS 1.1 (RFC 8996)."""
    peers.require(LIBNBD)
    pki = Pki.make(tmp_path / "pki")
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE))
    old = tmp_path / "old"
    old.write_text("[overrides]\ndisabled-version = tls1.2\ndisabled-version = tls1.3\n")
    theirs = Credentials(certificates=pki.server, verify=False)
    ours, only = Credentials(certificates=pki.anonymous), {"GNUTLS_SYSTEM_PRIORITY_FILE": str(old)}
    with tls_ends.serving(PYNBD, image, theirs) as server:
        watched = tls_ends.Watched(server)
        outcome = tls_ends.ask(LIBNBD, server.where, ours, "localhost", only)
        assert outcome.size is None
        assert "TLS: the handshake failed: unsupported protocol" in watched.said()
    with tls_ends.serving(tls_ends.QEMU, image, theirs) as server:
        assert tls_ends.ask(LIBNBD, server.where, ours, "localhost", only).size == SIZE
