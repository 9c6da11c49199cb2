"""TLS with pre-shared keys (RFC 4279; RFC 8446, 4.2.11): who has a key is served, nobody else; and
nobody learns whether it was the user or the key that was wrong (row T15).

The same clients and the same cases with pynbd, its drop-in, qemu-nbd and nbdkit as the server.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from interop import peers, tls_ends
from interop.certificates import Pki
from interop.tls_ends import DROP_IN, NBDKIT, PYNBD, QEMU, Credentials

SIZE = 1 << 20
HINT = r" \(it may have no such key for this user, or use certificates\)$"
FAILED = "a local client disconnected: TLS: the handshake failed: "


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    peers.require("qemu-nbd", "nbdkit", "nbdinfo", "qemu-img", peers.python313)
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize(
    "program, version",
    [(PYNBD, "1.2"), (PYNBD, "1.3"), (DROP_IN, "1.3"), (QEMU, "1.2"), (NBDKIT, "1.3")],
)
def test_keys(program: str, version: str, pki: Pki, image: Path, tmp_path: Path) -> None:
    good, wrong = Credentials(psk=pki.psk), Credentials(psk=pki.wrong_psk)
    cases = {
        "alice": good,
        "bob": replace(good, user="bob"),
        "a wrong key": wrong,
        "an unknown user": replace(wrong, user="stranger"),
        "a certificate": Credentials(certificates=pki.client("alice")),
    }
    said: dict[str, list[str]] = {what: [] for what in cases}
    environment = tls_ends.only(version, tmp_path)
    with tls_ends.serving(program, image, good, environment=environment) as server:
        watched = tls_ends.Watched(server) if program in (PYNBD, DROP_IN) else None
        for what, credentials in cases.items():
            for client in tls_ends.KEY_CLIENTS:
                outcome = tls_ends.ask(client, server.where, credentials)
                served = credentials.psk == pki.psk
                assert outcome.size == (SIZE if served else None), (what, client, outcome)
                if client == PYNBD and not served:
                    hint = HINT if credentials.psk else ""
                    tls_ends.check_complaint(outcome.complaint, server.where.uri(credentials), hint)
                if watched:
                    said[what].append(watched.said().partition(": ")[2])
                    assert served == said[what][-1].endswith("has left")
        assert not watched or watched.said_all()
    assert said["a wrong key"] == said["an unknown user"]
    assert all(line.startswith(FAILED) for line in said["a wrong key"] + said["a certificate"])


def test_keys_where_certificates_are_wanted(pki: Pki, image: Path) -> None:
    """The server has no keys at all."""
    certificates = Credentials(certificates=pki.server, verify=False)
    for program in (PYNBD, QEMU, NBDKIT):
        with tls_ends.serving(program, image, certificates) as server:
            for client in tls_ends.KEY_CLIENTS:
                credentials = Credentials(psk=pki.psk)
                outcome = tls_ends.ask(client, server.where, credentials)
                assert outcome.size is None
                if client == PYNBD:
                    tls_ends.check_complaint(outcome.complaint, server.where.uri(credentials), HINT)
