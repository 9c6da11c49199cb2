"""Credentials for trying things out: an authority whose key is forgotten at once, and what it has
issued (RFC 5280).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pynbd.errors import UsageError

DAYS: Final = 7
"""How long the certificates are valid."""
USER: Final = "pynbd"
"""The user in ``keys.psk``, and the common name of the client's certificate."""

_HOSTS = ("localhost", "127.0.0.1", "::1")
_PSK = 32  # bytes


def make(directory: Path, *, hosts: Sequence[str], psk: bool) -> None:
    """Write ``ca-cert.pem``, and certificate and key of a server and of a client, into a directory
    that exists and is private; with ``psk`` also ``keys.psk``.

    The server's certificate is for localhost, 127.0.0.1 and ::1, and for ``hosts``, which are names
    or addresses. All of it is valid for `DAYS` days, and readable for the owner alone. Raises
    `UsageError` for what cannot be the name of a host, `OSError`, also where one of the files is
    there already.
    """
    names = [_general_name(host) for host in dict.fromkeys((*_HOSTS, *hosts))]
    key, name = _new_key(), _name("pynbd throw-away CA")
    ca = _Issuer(name, key)
    root = ca.issue(name, key, x509.BasicConstraints(ca=True, path_length=0), [])
    _write(directory / "ca-cert.pem", root.public_bytes(Encoding.PEM))
    ends: dict[str, tuple[str, list[x509.ExtensionType]]] = {
        "server": (
            "localhost",
            [
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
                x509.SubjectAlternativeName(names),
            ],
        ),
        "client": (USER, [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])]),
    }
    for end, (subject, extensions) in ends.items():
        key = _new_key()
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        issued = ca.issue(_name(subject), key, constraints, extensions)
        _write(directory / f"{end}-cert.pem", issued.public_bytes(Encoding.PEM))
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write(directory / f"{end}-key.pem", secret)
    if psk:
        _write(directory / "keys.psk", f"{USER}:{secrets.token_hex(_PSK)}\n".encode())


class _Issuer:
    """Who signs certificates."""

    def __init__(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> None:
        self._name, self._key = name, key
        self._since = datetime.now(UTC)

    def issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        constraints: x509.BasicConstraints,
        extensions: Sequence[x509.ExtensionType],
    ) -> x509.Certificate:
        public, issuer = key.public_key(), self._key.public_key()
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=not constraints.ca,  # QEMU wants it, whatever the kind of key
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=constraints.ca,
            crl_sign=constraints.ca,
            encipher_only=False,
            decipher_only=False,
        )
        made = x509.CertificateBuilder(
            self._name,
            subject,
            public,
            x509.random_serial_number(),
            self._since - timedelta(hours=1),  # another host's clock may be behind
            self._since + timedelta(days=DAYS),
        )
        made = made.add_extension(constraints, critical=True).add_extension(usage, critical=True)
        for extension in (
            x509.SubjectKeyIdentifier.from_public_key(public),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer),
            *extensions,
        ):
            made = made.add_extension(extension, critical=False)
        return made.sign(self._key, SHA256())


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        name = host.encode("idna").decode()
    except ValueError:
        name = ""
    if not name:
        raise UsageError(f"{host!r} cannot be the name of a host in a certificate")
    return x509.DNSName(name)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
