"""Who is served over TLS, and who is not: every client with every server, in the same cases.

What is expected follows from RFC 5280 (certificates, their names, purposes and revocation), RFC
6125 (whose certificate is wanted) and RFC 4279 and 8446 (pre-shared keys). All four servers and all
three clients are held to it; `DIFFERENT` is where some are not, with the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop import drop_in, peers, tls_ends
from interop.certificates import Pki
from interop.tls_ends import DROP_IN, NBDKIT, PYNBD, QEMU, Credentials

SIZE = 1 << 20

LEFT = "it has left; it may not trust this server"  # which is all that GnuTLS lets a server see


@dataclass(frozen=True, kw_only=True)
class Case:
    """A client with ``certificates``, the name of a directory in `Pki`, which wants the certificate
    of ``hostname``, unless it does not look. It is served, or one end refuses the other.

    ``logged``: what pynbd says as the server, ``told``: what it says as the client.
    """

    certificates: str = "anonymous"
    hostname: str = "localhost"
    looks: bool = True
    refused_by: str = ""
    logged: str = ""
    told: str = ""


SERVED = Case()
NO_CERTIFICATE = Case(
    refused_by="server",
    logged="the handshake failed: peer did not return a certificate",
    told="certificate required",
)


def refused(certificates: str, logged: str, told: str) -> Case:
    """A certificate that a server does not accept."""
    logged = f"the certificate was not accepted: {logged}"
    return Case(certificates=certificates, refused_by="server", logged=logged, told=told)


def suspected(
    told: str, logged: str, certificates: str = "anonymous", hostname: str = "localhost"
) -> Case:
    """A certificate of a server that a client does not accept."""
    return Case(
        certificates=certificates,
        hostname=hostname,
        refused_by="client",
        logged=f"the handshake failed: the peer says {logged!r}",
        told=f"TLS: the certificate was not accepted: {told}",
    )


MISNAMED = "Hostname mismatch, certificate is not valid for '{}'"
VERIFYING = " verify-peer"

# The directory of a server, whether it looks at the certificates of clients; and the clients.
TABLE = {
    "server": {
        "good": SERVED,
        "a certificate nobody wants": Case(certificates="alice"),
        "another CA": suspected("unable to get local issuer", "unknown ca", "distrustful"),
        "another CA, unseen": Case(certificates="distrustful", looks=False),
        "another host": suspected(
            MISNAMED.format("nbd.example.com"), "bad certificate", hostname="nbd.example.com"
        ),
    },
    "server" + VERIFYING: {
        "good": Case(certificates="alice"),
        "no certificate": NO_CERTIFICATE,
        "of another CA": refused("other_client", "unable to get local issuer", "unknown ca"),
        "expired": refused("expired_client", "certificate has expired", "certificate expired"),
        "not yet valid": refused("future_client", "certificate is not yet valid", ""),
        "of a server": refused(
            "misused_client", "unsuitable certificate purpose", "unsupported certificate"
        ),
        "of an intermediate CA": Case(certificates="client_with_chain"),
        "revoked, unknown to the server": Case(certificates="revoked"),
    },
    "server_with_crl" + VERIFYING: {
        "good": Case(certificates="alice"),
        "revoked": refused("revoked", "certificate revoked", "certificate revoked"),
        "of a CA without a list": refused(
            "client_with_chain", "unable to get certificate CRL", "unknown ca|bad certificate"
        ),
    },
    "other_server" + VERIFYING: {
        "no certificate": Case(
            certificates="distrustful",
            refused_by="server",
            logged=NO_CERTIFICATE.logged,
            told=NO_CERTIFICATE.told,
        ),
        "another CA": suspected(
            "(self-signed certificate in|unable to get local issuer)", "unknown ca", "other_client"
        ),
    },
    "misnamed_server": {
        "good": Case(hostname="nbd.example.com"),
        "another host": suspected(MISNAMED.format("localhost"), "bad certificate"),
        "another host, unseen": Case(looks=False),
    },
    "server_with_chain": {"good": SERVED},
    "rsa" + VERIFYING: {"good": Case(certificates="alice"), "no certificate": NO_CERTIFICATE},
    "expired_server": {
        "expired": suspected("certificate has expired", "certificate expired"),
        "expired, unseen": Case(looks=False),
    },
    "future_server": {"not yet valid": suspected("certificate is not yet valid", "bad cert")},
}

# What others do otherwise: which servers, in which case, for what reason.
DIFFERENT = {
    "of a server": (
        (QEMU, NBDKIT),
        "they look at the chain only, not at the extended key usage (RFC 5280, 4.2.1.12)",
    ),
    "of a CA without a list": (
        (QEMU, NBDKIT),
        "GnuTLS takes a certificate for valid if there is no list of whoever issued it",
    ),
}
# These pynbd does not show at all, and says so, as QEMU's client does (sanity-check=on).
OWN = {
    "expired_client": r"client-cert\.pem: the certificate expired on",
    "future_client": r"client-cert\.pem: the certificate is not valid before",
}
# These pynbd does not serve with, as qemu-nbd does not (`test_a_server_with_such_a_certificate`).
UNUSABLE = ("expired_server", "future_server")

# The servers, and whether on TCP; those that share the rest with pynbd only where most happens.
PROGRAMS = [(PYNBD, False), (QEMU, False), (NBDKIT, True)]
MOST = ("server", "server" + VERIFYING)
ROWS = [
    (offered, program, tcp)
    for offered in TABLE
    for program, tcp in PROGRAMS
    if (offered, program) not in [(name, PYNBD) for name in UNUSABLE]
]
ROWS += [(offered, program, True) for offered in MOST for program in (PYNBD, DROP_IN)]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    peers.require("qemu-nbd", "nbdkit", "nbdinfo", "qemu-img")
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk"
    path.write_bytes(bytes(SIZE))
    return path


def directory(pki: Pki, name: str) -> Path:
    found = pki.client(name) if name == "alice" else getattr(pki, name)
    assert isinstance(found, Path)
    return found


def credentials(pki: Pki, case: Case) -> Credentials:
    return Credentials(certificates=directory(pki, case.certificates), verify=case.looks)


def is_served(program: str, name: str, case: Case) -> bool:
    return not case.refused_by or program in DIFFERENT.get(name, ((), ""))[0]


@pytest.mark.parametrize("offered, program, tcp", ROWS)
def test_certificates(offered: str, program: str, tcp: bool, pki: Pki, image: Path) -> None:
    name, verify, _ = offered.partition(VERIFYING)
    theirs = Credentials(certificates=directory(pki, name), verify=bool(verify))
    with tls_ends.serving(program, image, theirs, tcp=tcp) as server:
        watched = tls_ends.Watched(server) if program in (PYNBD, DROP_IN) else None
        for what, case in TABLE[offered].items():
            for client in tls_ends.CLIENTS:
                place = f"{what}: {client}"
                ours = credentials(pki, case)
                outcome = tls_ends.ask(client, server.where, ours, case.hostname)
                own = OWN.get(case.certificates, "") if client == PYNBD else ""
                served = is_served(program, what, case) and not own
                assert outcome.size == (SIZE if served else None), (place, outcome.complaint)
                if client == PYNBD and not served:
                    uri = server.where.uri(ours, case.hostname)
                    tls_ends.check_complaint(outcome.complaint, uri, own or told(case, program))
                if watched and not own:
                    said = watched.said()
                    assert re.search(logged(case, client), said), (place, said)
        assert not watched or watched.said_all()


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_server_with_such_a_certificate(name: str, pki: Pki, image: Path) -> None:
    """It does not start, and says why in one line: not to its clients, but here."""
    folder = directory(pki, name)
    objects = ["--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={folder}"]
    for program in drop_in.PROGRAMS:
        done = drop_in.refused(program, *objects, "--tls-creds=tls0", image, folder=image.parent)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.count("\n") == 1
    reason = {"expired_server": "expired on", "future_server": "is not valid before"}[name]
    assert f"{folder}/server-cert.pem: the certificate {reason} " in done.stderr


def told(case: Case, program: str) -> str:
    """What pynbd's client says: a server that does not give its reason is not known to have it."""
    if case.refused_by == "server" and program not in (PYNBD, DROP_IN):
        return "TLS: the server did not go on; it may want another certificate|the peer says"
    return case.told


def logged(case: Case, client: str) -> str:
    if not case.refused_by:
        return " has left$"
    left = case.refused_by == "client" and client != PYNBD
    return f" disconnected: TLS: {LEFT if left else case.logged}"
