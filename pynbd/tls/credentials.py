"""TLS credentials: from certificates (RFC 5280) and pre-shared keys (RFC 4279, RFC 8446 4.2.11) to
SSL contexts, for servers and clients.

1. TLS 1.2 at least. Nothing anonymous, nothing unencrypted; no renegotiation; no tickets. Sessions
   of TLS 1.3 are never resumed; of TLS 1.2 OpenSSL remembers those of the last few clients that
   came without a pre-shared key.
2. All files are read, and all that can be wrong with them is found, when credentials are made
   (`pynbd.tls.files`).
3. A certificate is trusted if it, or one above it, is in ``ca-cert.pem``: a root is not needed. If
   ``ca-crl.pem`` is there, it must have a list of whoever issued the peer's certificate; if it has
   several lists, of every authority between the certificate and the trusted one, and of that.
4. Whoever has a pre-shared key is who he says; a client that wants that of its server takes no
   certificate instead.
"""

from __future__ import annotations

import getpass
import os
import platform
import secrets
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, Final

from pynbd.errors import TlsError, UsageError
from pynbd.tls import files

HAS_PSK: Final[bool] = getattr(ssl, "HAS_PSK", False)
"""Whether this Python can use pre-shared keys: from 3.13 on."""

# No SHA1, no CBC for certificates. OpenSSL has no ECDHE-PSK with GCM, and GnuTLS no CCM.
_LEVEL: Final = "@SECLEVEL=2"
_CERTIFICATES: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20"
_PSK: Final = "kECDHEPSK+CHACHA20:kDHEPSK+AESGCM:kDHEPSK+CHACHA20:kECDHEPSK+AES"
_PSK_ALONE: Final = "kPSK+AESGCM:kPSK+CHACHA20"  # without forward secrecy: last
_NEVER: Final = "!aNULL:!eNULL:!aDSS:!SHA1"

_UNKNOWN_KEY: Final = 32  # bytes

MAX_SESSIONS: Final = 64
"""How many of TLS 1.2 are remembered at most, but for those whose clients come at the same time."""


class ServerCredentials:
    """What a server shows its clients, and what it wants to see.

    ``certificates`` is a directory with ``server-cert.pem`` (those between it and the root after
    it) and ``server-key.pem``, which ``key_password`` opens if it is encrypted. With
    ``verify_peer`` clients have to show certificates, which ``ca-cert.pem`` and ``ca-crl.pem`` (if
    it is there) of the same directory are asked about. ``psk_file`` is a file of users and keys, or
    a directory with ``keys.psk``. One of the two, or both: then a client has the choice, and one
    that has a key needs no certificate.

    Raises `TlsError`, which names the file and what is wrong with it; `UsageError` for neither, for
    ``verify_peer`` without ``certificates``, and for ``psk_file`` before Python 3.13.
    """

    def __init__(
        self,
        *,
        certificates: str | PathLike[str] | None = None,
        psk_file: str | PathLike[str] | None = None,
        verify_peer: bool = False,
        key_password: str | None = None,
    ) -> None:
        if certificates is None and psk_file is None:
            raise UsageError("TLS needs certificates, a file of pre-shared keys, or both")
        if verify_peer and certificates is None:
            raise UsageError(
                "a server that verifies the certificates of its clients needs certificates itself"
            )
        self.certificates = None if certificates is None else Path(certificates)
        self.psk_file = None if psk_file is None else Path(psk_file)
        self.verify_peer = verify_peer
        self._keylog = _keylog_file()
        self._shown = b""
        self._trust: _Trust | None = None
        if self.certificates:
            self._shown = files.certificate_and_key(self.certificates, "server", key_password)
            if verify_peer:
                self._trust = _Trust(self.certificates)
        self._keys = _psk_keys(self.psk_file) if self.psk_file else {}
        self.psk_users = tuple(self._keys)
        """The names of all users who have a pre-shared key."""
        self._shared = self._context()

    def context(self, on_psk_user: Callable[[str], None]) -> ssl.SSLContext:
        """The context for one connection. Without pre-shared keys it is the same as before, mostly.

        With them ``on_psk_user`` is told, during the handshake, the name of a user whose key was
        asked for: *before* anybody has shown that he has it. The last one told is who is there if
        the handshake succeeds *and* was made with a pre-shared key (`Tunnel.used_psk`); else it
        means nothing. A user who is not known gets a key that nobody has, so his handshake ends as
        that of one with the wrong key.
        """
        if not self._keys:
            if self._shared.session_stats()["number"] >= MAX_SESSIONS:
                # By itself OpenSSL would remember 20,000, with the certificates of their clients,
                # for two hours. Python cannot forbid that.
                with suppress(OSError):  # out of descriptors, say: then the next one
                    self._shared = self._context()
            return self._shared
        asked = _Asked(self._keys, on_psk_user)
        context = self._context_without_certificates()
        _psk(context).set_psk_server_callback(asked)
        if self._shown:
            # OpenSSL prefers ciphers that go with pre-shared keys in TLS 1.3 (those with SHA256)
            # only as long as it has no certificate. It gets that after it has read a ClientHello:
            # in TLS 1.3 it knows by then that there is no key. (A client that is asked for another
            # ClientHello, which takes exotic groups, fails then: the cipher would change.)

            def show(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
                if not asked:
                    try:
                        tls.context = self._context()
                    except OSError:  # out of descriptors, say
                        return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
                    _psk(tls.context).set_psk_server_callback(asked)
                return None

            context.sni_callback = show
        return context

    def _context(self) -> ssl.SSLContext:
        context = self._context_without_certificates()
        if self.certificates:
            _show(context, self._shown, self.certificates / "server-cert.pem")
        if self._trust:
            self._trust.teach(context)
        return context

    def _context_without_certificates(self) -> ssl.SSLContext:
        context = _new(ssl.PROTOCOL_TLS_SERVER, self._keylog)
        context.num_tickets = 0
        kinds = [_CERTIFICATES] if self._shown else []
        _set_ciphers(context, *kinds, *([_PSK, _PSK_ALONE] if self._keys else []))
        if self._trust:
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= self._trust.flags
        return context


def client_context(
    *,
    certificates: str = "",
    psk_file: str = "",
    psk_user: str = "",
    tls_type: str = "",
    verify_peer: bool | None = None,
) -> ssl.SSLContext:
    """The context of a client, as libnbd understands these parameters of an NBD URI.

    ``certificates``: a directory with ``ca-cert.pem``, which says whom to trust, ``ca-crl.pem``,
    and ``client-cert.pem`` with ``client-key.pem`` to be shown; the last three need not be there.
    If it is empty, libnbd's directories are looked into: ``/etc/pki/libnbd`` for root,
    ``~/.pki/libnbd`` and ``~/.config/pki/libnbd`` for others; if none has a ``ca-cert.pem``, the
    authorities are trusted that the system trusts. ``psk_file``: a file of users and keys, or a
    directory with ``keys.psk``; ``psk_user`` is the one to be (empty: the login name).
    ``tls_type``: "x509" or "psk"; empty: "psk" if there is a ``psk_file``. ``verify_peer``: False
    takes any certificate of the server.

    The context has ``check_hostname`` if the server's certificate is verified: who knows no name of
    the server (a unix socket) turns it off, and then any certificate that is trusted will do.

    Raises `TlsError`, which names the file and what is wrong with it, or the user; `UsageError` for
    other types, "psk" without ``psk_file``, and pre-shared keys before Python 3.13.
    """
    kind = tls_type or ("psk" if psk_file else "x509")
    if kind == "psk":
        if not psk_file:
            raise UsageError("tls-type=psk needs tls-psk-file, the file of the keys")
        return _psk_client(Path(psk_file), psk_user)
    if kind != "x509":
        raise UsageError(f"tls-type: {kind!r}: x509 or psk is expected")
    context = _new(ssl.PROTOCOL_TLS_CLIENT, _keylog_file())
    _set_ciphers(context, _CERTIFICATES)
    folder = Path(certificates) if certificates else _default_directory()
    if folder and not folder.is_dir():  # also where nothing of it would be looked at
        raise files.wrong(folder, "is no directory")
    if verify_peer is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif folder:
        _Trust(folder).teach(context)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if folder and any(os.path.lexists(folder / f"client-{what}.pem") for what in ("cert", "key")):
        shown = files.certificate_and_key(folder, "client", None)
        _show(context, shown, folder / "client-cert.pem")
    return context


class _Trust:
    """Whose certificates are accepted: ``ca-cert.pem`` and ``ca-crl.pem`` of a directory."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ca-cert.pem"
        self._pem, self.flags = files.authorities(self._path), ssl.VerifyFlags(0)
        # A link that leads nowhere is no reason to let everybody in.
        if os.path.lexists(folder / "ca-crl.pem"):
            lists, count = files.revoked(folder / "ca-crl.pem")
            self._pem += lists
            # With one list for each authority, theirs are looked up, too.
            self.flags = ssl.VERIFY_CRL_CHECK_CHAIN if count > 1 else ssl.VERIFY_CRL_CHECK_LEAF

    def teach(self, context: ssl.SSLContext) -> None:
        context.verify_flags |= self.flags
        with files.lent(self._pem) as name:
            try:
                context.load_verify_locations(name)
            except ssl.SSLError as error:
                raise files.wrong(self._path, files.reason(error)) from None


class _Asked:
    """The callback that OpenSSL asks for the key of a user; true when it was asked."""

    def __init__(self, keys: Mapping[str, bytes], on_user: Callable[[str], None]) -> None:
        self._keys, self._on_user = keys, on_user
        self._asked = False

    def __bool__(self) -> bool:
        return self._asked

    def __call__(self, user: str | None) -> bytes:
        self._asked = True
        key = self._keys.get(user or "")
        if user is None or key is None:
            return secrets.token_bytes(_UNKNOWN_KEY)
        self._on_user(user)
        return key


def _new(protocol: int, keylog: str | None) -> ssl.SSLContext:
    # Not create_default_context: what that sets depends on the version of Python.
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if keylog:
        context.keylog_filename = keylog
    return context


def _keylog_file() -> str | None:
    """The file that SSLKEYLOGFILE names, which only the standard library looks up."""
    try:
        found: str | None = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).keylog_filename
    except OSError as error:
        raise TlsError(f"SSLKEYLOGFILE: cannot be written: {error.strerror}") from None
    return found


def _set_ciphers(context: ssl.SSLContext, *kinds: str) -> None:
    context.set_ciphers(":".join([_LEVEL, *kinds, _NEVER]))


def _show(context: ssl.SSLContext, shown: bytes, path: Path) -> None:
    with files.lent(shown) as name:
        try:
            context.load_cert_chain(name)
        except ssl.SSLError as error:
            raise files.wrong(path, files.reason(error)) from None


def _psk(context: ssl.SSLContext) -> Any:
    """What pre-shared keys need is not in the types of the oldest Python."""
    return context


def _psk_keys(path: Path) -> dict[str, bytes]:
    if not HAS_PSK:
        raise UsageError(f"TLS-PSK needs Python 3.13 or later; this is {platform.python_version()}")
    return files.pre_shared_keys(path)


def _psk_client(path: Path, user: str) -> ssl.SSLContext:
    keys = _psk_keys(path)
    if not user:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            raise TlsError("the TLS user is not given, and there is no login name") from None
    if user not in keys:
        raise files.wrong(files.psk_path(path), f"has no key of the user {user[:80]!r}")
    context = _new(ssl.PROTOCOL_TLS_CLIENT, _keylog_file())
    _set_ciphers(context, _PSK, _PSK_ALONE)
    # Nothing is trusted, so that a server which shows a certificate instead is refused.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    proof = (user, keys[user])
    _psk(context).set_psk_client_callback(lambda hint: proof)
    return context


def _default_directory() -> Path | None:
    """The first of libnbd's directories that says whom to trust."""
    if os.geteuid() == 0:
        places = [Path("/etc/pki/libnbd")]
    else:
        try:
            home = Path.home()
        except RuntimeError:
            return None
        places = [home / ".pki/libnbd", home / ".config/pki/libnbd"]
    return next((place for place in places if os.access(place / "ca-cert.pem", os.R_OK)), None)
