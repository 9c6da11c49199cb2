"""The files of TLS credentials: read, looked through, and lent to OpenSSL.

They have the names that QEMU, nbdkit and libnbd share, in one directory: ``ca-cert.pem``,
``ca-crl.pem``, ``server-cert.pem``, ``server-key.pem``, ``client-cert.pem``, ``client-key.pem``;
``keys.psk`` has lines ``user:key``, as GnuTLS's psktool writes them.

1. A file is read once. What was looked at is what is used, whatever becomes of the file.
2. Trouble is a `TlsError` of one line that begins with the name of the file. Nothing secret is ever
   in one.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pynbd.errors import TlsError

MIN_PSK: Final = 16
"""Bytes of the shortest pre-shared key that is taken: 128 bits (RFC 9257, section 6)."""
MAX_PSK: Final = 512
"""Bytes of the longest one: OpenSSL's PSK_MAX_PSK_LEN."""
MAX_PSK_USER: Final = 128
"""Bytes of the longest name of a user (RFC 4279, section 5.3: implementations take so many)."""

_MAX_ERROR = 300  # characters
_CRL = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_PSK_LINE = re.compile(r"(?P<user>[^:]+):(?P<key>(?:[0-9A-Fa-f]{2})+)")
_PSK_HEX_USER = re.compile(r"#((?:[0-9A-Fa-f]{2})+)")


def wrong(path: Path, what: str) -> TlsError:
    """``what`` is the matter with the file ``path``, whose name may be anything."""
    name = "".join(sign if sign.isprintable() else "?" for sign in str(path))
    room = _MAX_ERROR - len(what) - len(": ")
    return TlsError(f"{name if len(name) <= room else '...' + name[3 - room :]}: {what}")


def certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a file. Raises `TlsError`, also where there is none."""
    data = _read(path)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise wrong(path, "is no certificate in PEM, or a malformed one") from None


def authorities(path: Path) -> bytes:
    """The certificates (PEM) that are trusted. Raises `TlsError`, also where all are out of date.

    One that is self-signed, or not of an authority, is trusted as itself: as by GnuTLS.
    """
    found = certificates(path)
    if all(_out_of_date(one) for one in found):
        raise wrong(path, f"the certificate {_out_of_date(found[0])}")
    return _pem(found)


def revoked(path: Path) -> tuple[bytes, int]:
    """The lists of revoked certificates (PEM), and how many lists. Raises `TlsError`, also for one
    that is out of date: with it, OpenSSL accepts nobody.
    """
    lists = _CRL.findall(_read(path))
    if not lists:
        raise wrong(path, "is no list of revoked certificates in PEM")
    for one in lists:
        try:
            until = x509.load_pem_x509_crl(one).next_update_utc
        except ValueError:
            raise wrong(path, "is no list of revoked certificates in PEM") from None
        if until and until < datetime.now(UTC):
            raise wrong(path, f"the list was to be renewed by {_date(until)}")
    return b"\n".join([*lists, b""]), len(lists)


def certificate_and_key(folder: Path, end: str, password: str | None) -> bytes:
    """The certificate of an end ("server", "client"), those between it and the root, and its key
    (PEM, not encrypted). Raises `TlsError`, also where the certificate is out of date.
    """
    path, key_path = folder / f"{end}-cert.pem", folder / f"{end}-key.pem"
    chain = certificates(path)
    if fault := _out_of_date(chain[0]):
        raise wrong(path, f"the certificate {fault}")
    key = _private_key(key_path, password)
    try:
        belongs = chain[0].public_key() == key.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise wrong(path, "the public key is of a kind that is not known") from None
    if not belongs:
        raise wrong(key_path, f"is not the key of the certificate in {path.name}")
    return _pem(chain) + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pre_shared_keys(path: Path) -> dict[str, bytes]:
    """The users of a ``keys.psk``, or of the one in a directory, and their keys, in its order.

    A line is ``user:key`` or ``#user:key``; keys, and the second kind of user, are in hexadecimal.
    Empty lines, and those that begin with ``#`` and are nothing else, are comments. Raises
    `TlsError`, which names the line: a key of less than `MIN_PSK` or more than `MAX_PSK` bytes, a
    name of more than `MAX_PSK_USER` bytes, a user who is there twice; no user at all.
    """
    path = psk_path(path)
    keys: dict[str, bytes] = {}
    for number, raw in enumerate(_read(path).split(b"\n"), 1):
        try:
            entry = _psk_entry(raw)
        except ValueError as error:
            raise wrong(path, f"line {number}: {error}") from None
        if entry is None:
            continue
        user, key = entry
        if user in keys:
            raise wrong(path, f"line {number}: there is a key of this user before")
        keys[user] = key
    if not keys:
        raise wrong(path, "has no line user:key, with the key in hexadecimal")
    return keys


def psk_path(path: Path) -> Path:
    """``keys.psk`` in a directory, or the file itself."""
    return path / "keys.psk" if path.is_dir() else path


@contextmanager
def lent(data: bytes) -> Iterator[str]:
    """The name of a file that is only in memory: OpenSSL's functions in Python take no less."""
    descriptor = os.memfd_create("pynbd-tls")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def reason(error: ssl.SSLError) -> str:
    """What OpenSSL has against a file, in its words."""
    return f"OpenSSL does not take it: {(error.reason or 'unknown').replace('_', ' ').lower()}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise wrong(path, f"cannot be read: {text}") from None


def _pem(found: Sequence[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in found)


def _out_of_date(certificate: x509.Certificate) -> str:
    """What is wrong with the dates of a certificate, or nothing."""
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        return f"expired on {_date(certificate.not_valid_after_utc)}"
    if certificate.not_valid_before_utc > now:
        return f"is not valid before {_date(certificate.not_valid_before_utc)}"
    return ""


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _private_key(path: Path, password: str | None) -> PrivateKeyTypes:
    data = _read(path)
    try:
        try:
            return load_pem_private_key(data, None)
        except TypeError:  # it is encrypted
            if password is None:
                raise wrong(path, "the key is encrypted, and no password was given") from None
            secret = password.encode()
        try:
            return load_pem_private_key(data, secret)
        except ValueError:
            raise wrong(path, "the password does not open the key") from None
    except (ValueError, UnsupportedAlgorithm):
        raise wrong(path, "is no private key in PEM, or of a kind that is not known") from None


def _psk_entry(raw: bytes) -> tuple[str, bytes] | None:
    """The user and key of a line, None for a comment. Raises ValueError, without any of it."""
    try:
        line = raw.decode().rstrip(" \r")
    except UnicodeDecodeError:
        raise ValueError("is not in UTF-8") from None
    if not line:
        return None
    found = _PSK_LINE.fullmatch(line)
    hex_user = found and _PSK_HEX_USER.fullmatch(found["user"])
    if line.startswith("#") and not hex_user:
        return None
    if not found:
        raise ValueError("is not user:key, with the key in hexadecimal")
    try:
        user = bytes.fromhex(hex_user[1]).decode() if hex_user else found["user"]
    except UnicodeDecodeError:
        raise ValueError("the name of the user is not in UTF-8") from None
    if len(user.encode()) > MAX_PSK_USER or "\0" in user:
        raise ValueError(f"the name of the user has more than {MAX_PSK_USER} bytes, or a zero")
    key = bytes.fromhex(found["key"])
    if not MIN_PSK <= len(key) <= MAX_PSK:
        raise ValueError(f"the key has {len(key)} bytes; {MIN_PSK} to {MAX_PSK} are allowed")
    return user, key
