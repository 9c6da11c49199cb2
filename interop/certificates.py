"""Certificates and keys for tests: a tree of directories, each as a server or a client wants one.

`Pki.make` takes a fraction of a second; a session of tests makes one. Its directories have the
names that qemu, nbdkit and libnbd share: ca-cert.pem, ca-crl.pem, server-cert.pem, server-key.pem,
client-cert.pem, client-key.pem, keys.psk. All keys are ECDSA with P-256, but that of `Pki.rsa`.
Nothing here knows pynbd.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

HOSTS: Final = ("localhost", "127.0.0.1", "::1")
USERS: Final = {"alice": "a1" * 32, "bob": "b2" * 32, "qemu": "c3" * 32}
"""The users of `Pki.psk`, and their keys in hexadecimal."""
PASSWORD: Final = "correct horse battery staple"
"""What opens the keys of `Pki.encrypted`."""
REVOKED: Final = "mallory"

_OIDS: Final = {
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
    "EMAIL": NameOID.EMAIL_ADDRESS,
    "UID": NameOID.USER_ID,
    "DC": NameOID.DOMAIN_COMPONENT,
    "SERIAL": NameOID.SERIAL_NUMBER,
    "TITLE": NameOID.TITLE,
}
_PURPOSES: Final = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}
_DAY: Final = timedelta(days=1)
# Before and after now, of what is valid, over, and still to come.
VALID: Final = (-_DAY, 30 * _DAY)
EXPIRED: Final = (-2 * _DAY, -_DAY)
TO_COME: Final = (_DAY, 30 * _DAY)


def distinguished_name(parts: Sequence[tuple[str, str]]) -> x509.Name:
    """A name of one attribute after the other: ``[("C", "GB"), ("CN", "alice")]``."""
    return x509.Name([x509.NameAttribute(_OIDS[key], value) for key, value in parts])


def subject_of(name: str) -> x509.Name:
    """A name as those that certtool makes from a template."""
    return distinguished_name(
        [("C", "GB"), ("ST", "Essex"), ("L", "Colchester"), ("O", "Example"), ("CN", name)]
    )


@dataclass(frozen=True)
class Certificate:
    """A certificate, its key, and those between it and the root (not itself, not the root)."""

    certificate: x509.Certificate
    key: Key
    chain: tuple[x509.Certificate, ...] = ()

    def pem(self) -> bytes:
        return b"".join(
            one.public_bytes(serialization.Encoding.PEM) for one in (self.certificate, *self.chain)
        )

    def key_pem(self, password: str | None = None) -> bytes:
        encryption: serialization.KeySerializationEncryption = (
            serialization.BestAvailableEncryption(password.encode())
            if password
            else serialization.NoEncryption()
        )
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )

    def store(self, folder: Path, end: str, password: str | None = None) -> None:
        """Write ``END-cert.pem`` and ``END-key.pem``."""
        (folder / f"{end}-cert.pem").write_bytes(self.pem())
        (folder / f"{end}-key.pem").write_bytes(self.key_pem(password))


class Authority:
    """Who issues certificates: a root, or (``under`` another one) an intermediate."""

    def __init__(self, name: str, under: Authority | None = None) -> None:
        self._serial = 1000
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = distinguished_name([("O", "Example"), ("CN", name)])
        self._chain: tuple[x509.Certificate, ...] = ()
        issuer = under or self
        made = issuer._builder(self._name, self._key, VALID)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.certificate = made.add_extension(
            _usage(digital_signature=True, key_cert_sign=True, crl_sign=True), critical=True
        ).sign(issuer._key, hashes.SHA256())
        if under:
            self._chain = (self.certificate, *under._chain)

    def _builder(
        self, subject: x509.Name, key: Key, valid: tuple[timedelta, timedelta]
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        self._serial += 1
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder(self._name, subject, key.public_key(), self._serial)
            .not_valid_before(now + valid[0])
            .not_valid_after(now + valid[1])
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(ours, critical=False)
        )

    def issue(
        self,
        subject: str | x509.Name,
        purpose: str,
        *,
        hosts: Sequence[str] = (),
        names: Sequence[x509.GeneralName] = (),
        valid: tuple[timedelta, timedelta] = VALID,
        key: Key | None = None,
    ) -> Certificate:
        """A certificate for a "server", a "client", or "both".

        ``hosts`` (names and addresses) and ``names`` are its alternative names.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = subject_of(subject) if isinstance(subject, str) else subject
        made = self._builder(subject, key, valid)
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        made = made.add_extension(
            _usage(digital_signature=True, key_encipherment=True), critical=True
        )
        purposes = _PURPOSES.values() if purpose == "both" else [_PURPOSES[purpose]]
        made = made.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        alternative = [*map(_general_name, hosts), *names]
        if alternative:
            made = made.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        return Certificate(made.sign(self._key, hashes.SHA256()), key, self._chain)

    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def itself(self) -> Certificate:
        """Its own certificate, as one that can be revoked."""
        return Certificate(self.certificate, self._key)

    def crl(self, *revoked: Certificate, valid: tuple[timedelta, timedelta] = VALID) -> bytes:
        """A list of what was revoked, in PEM."""
        now = datetime.now(UTC)
        ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = x509.CertificateRevocationListBuilder(self._name, now + valid[0], now + valid[1])
        made = made.add_extension(x509.CRLNumber(1), False).add_extension(ours, False)
        for one in revoked:
            made = made.add_revoked_certificate(
                x509.RevokedCertificateBuilder(one.certificate.serial_number, now - _DAY).build()
            )
        return made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class Pki:
    """A tree of directories under ``folder``. What is called a directory below is a `Path`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = Authority("Example CA")
        self.other_ca = Authority("Another CA")
        self._revoked = self.ca.issue(REVOKED, "client")
        server = self.ca.issue("localhost", "server", hosts=HOSTS)

        # Servers. They have no ca-crl.pem, but the one that says so.
        self.server = self._store("server", server)
        """A good one, for `HOSTS`."""
        self.server_with_crl = self._store("server-crl", server)
        """The same, and ca-crl.pem, which names the certificate of `revoked`."""
        (self.server_with_crl / "ca-crl.pem").write_bytes(self.ca.crl(self._revoked))
        key = rsa.generate_private_key(65537, 2048)
        self.rsa = self._store(
            "server-rsa", self.ca.issue("localhost", "server", hosts=HOSTS, key=key)
        )
        """A good one with an RSA key."""
        self.server_with_chain = self._store(
            "server-chain",
            Authority("Intermediate CA", self.ca).issue("localhost", "server", hosts=HOSTS),
        )
        """A good one, issued by an intermediate CA, whose certificate is in server-cert.pem."""
        self.encrypted = self._store("server-encrypted", server, password=PASSWORD)
        """A good one whose key `PASSWORD` opens."""
        self.expired_server = self._store(
            "server-expired", self.ca.issue("localhost", "server", hosts=HOSTS, valid=EXPIRED)
        )
        self.future_server = self._store(
            "server-future", self.ca.issue("localhost", "server", hosts=HOSTS, valid=TO_COME)
        )
        """Not valid yet."""
        self.misnamed_server = self._store(
            "server-misnamed",
            self.ca.issue("nbd.example.com", "server", hosts=["nbd.example.com", "192.0.2.1"]),
        )
        """For another host than that of the tests."""
        self.other_server = self._store(
            "server-other", self.other_ca.issue("localhost", "server", hosts=HOSTS), self.other_ca
        )
        """A good one of another CA, which trusts that one only."""
        self.server_wrong_key = self._store("server-wrong-key", server)
        """Its key is that of another certificate."""
        shutil.copy(self.rsa / "server-key.pem", self.server_wrong_key)

        # Clients
        self.anonymous = self._store("client-anonymous", None)
        """Only ca-cert.pem: it knows the CA and has no certificate of its own."""
        self.revoked = self._store("client-revoked", self._revoked)
        """Named ``REVOKED``; only the list of `server_with_crl` knows of it."""
        self.expired_client = self._store(
            "client-expired", self.ca.issue("expired", "client", valid=EXPIRED)
        )
        self.future_client = self._store(
            "client-future", self.ca.issue("future", "client", valid=TO_COME)
        )
        """Not valid yet."""
        self.client_with_chain = self._store(
            "client-chain", Authority("Intermediate CA", self.ca).issue("chained", "client")
        )
        """Issued by an intermediate CA, whose certificate is in client-cert.pem."""
        self.misused_client = self._store("client-misused", self.ca.issue("misused", "server"))
        """Its extended key usage is that of a server."""
        self.other_client = self._store(
            "client-other", self.other_ca.issue("alice", "client"), self.ca
        )
        """Of another CA; it trusts the right one."""
        self.distrustful = self._store("client-distrustful", None, self.other_ca)
        """Only ca-cert.pem, that of another CA."""

        self.psk = self._folder("psk") / "keys.psk"
        """The file with the `USERS`."""
        self.psk.write_text("".join(f"{user}:{key}\n" for user, key in USERS.items()))
        self.wrong_psk = self._folder("psk-wrong") / "keys.psk"
        """The same users with other keys, and one more: ``stranger``."""
        self.wrong_psk.write_text("".join(f"{user}:{'dd' * 32}\n" for user in (*USERS, "stranger")))

    @classmethod
    def make(cls, folder: Path) -> Pki:
        """All of it, in ``folder``, which is made if it is not there."""
        return cls(folder)

    def client(
        self,
        name: str = "alice",
        *,
        subject: x509.Name | None = None,
        names: Sequence[x509.GeneralName] = (),
    ) -> Path:
        """The directory of a good client, made when it is asked for first.

        Its DN is that of ``subject``, or as certtool makes them, with ``name`` as common name.
        """
        folder = self.folder / f"client-of-{name}"
        if not folder.exists():
            certificate = self.ca.issue(subject or name, "client", names=names)
            self._store(folder.name, certificate)
        return folder

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, mode=0o700)
        return folder

    def _store(
        self,
        name: str,
        certificate: Certificate | None,
        trusted: Authority | None = None,
        password: str | None = None,
    ) -> Path:
        folder = self._folder(name)
        (folder / "ca-cert.pem").write_bytes((trusted or self.ca).pem())
        if certificate:
            certificate.store(folder, name.partition("-")[0], password)
        return folder


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(**allowed: bool) -> x509.KeyUsage:
    every = "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
    every += " key_cert_sign crl_sign encipher_only decipher_only"
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in every.split()})
