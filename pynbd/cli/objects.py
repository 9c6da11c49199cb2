"""``--object``: QEMU's objects of TLS, as its tools take them: credentials, secrets, authorisation.

``qapi/crypto.json``, ``qapi/authz.json`` and ``qapi/qom.json`` of QEMU name the properties. An
object is ``TYPE,id=ID,PROPERTY=VALUE,...``, where ``rules.0.match`` is in the first of a list, or
the same in JSON: ``{"qom-type": TYPE, "id": ID, ...}``.

1. What QEMU has and pynbd has not is refused in a line that says so, never ignored: TLS without
   certificates or keys, secrets that are encrypted, PAM, priorities other than GnuTLS's default.
2. ``sanity-check`` is taken, without effect: certificates are always checked.
3. No file is read here, but that of a secret; credentials are read by who uses them.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pynbd.cli.authorization import Authorizer, ListFile, Policy, Rule
from pynbd.cli.object_properties import Properties, object_of_json
from pynbd.errors import UnsupportedFeature, UsageError

_PRIORITIES = ("NORMAL", "@SYSTEM")
X509, PSK = "tls-creds-x509", "tls-creds-psk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Of ``tls-creds-x509`` or ``tls-creds-psk``: ``kind`` is which. ``endpoint`` is "server" or
    "client", ``username`` whose key a client has.
    """

    kind: str
    id: str
    endpoint: str
    directory: str
    verify_peer: bool = True
    username: str = "qemu"
    password: str | None = field(default=None, repr=False)

    @property
    def psk_file(self) -> str:
        """The keys of ``tls-creds-psk``."""
        return os.path.join(self.directory, "keys.psk")


class Objects:
    """All that ``--object`` was given for. Raises `UsageError`, `UnsupportedFeature`, `OSError`."""

    def __init__(self, texts: Iterable[str]) -> None:
        read = [Properties.parse(text) for text in texts]
        self.credentials: dict[str, Credentials] = {}
        self._authorizers: dict[str, Authorizer] = {}
        self._secrets: dict[str, bytes] = {}
        makers: Mapping[str, Callable[[Properties], None]] = {
            "secret": self._add_secret,  # first: the others name them
            X509: self._add_x509,
            PSK: self._add_psk,
            "authz-simple": self._add_simple,
            "authz-list": self._add_list,
            "authz-list-file": self._add_list_file,
        }
        ids: set[str] = set()
        for properties in read:
            if properties.kind in _REFUSED:
                raise UnsupportedFeature(f"{properties.place}: {_REFUSED[properties.kind]}")
            if properties.kind not in makers:
                raise UsageError(
                    f"{properties.place}: there is no such object; there are {', '.join(makers)}"
                )
            if properties.id in ids:
                raise UsageError(f"{properties.place}: there is another object of that id")
            ids.add(properties.id)
        for kind, make in makers.items():
            for properties in read:
                if properties.kind == kind:
                    make(properties)

    def credentials_of(self, name: str, endpoint: str) -> Credentials:
        """What ``--tls-creds`` names, which has to be for that endpoint."""
        credentials = self.credentials.get(name)
        if credentials is None:
            raise UsageError(f"--tls-creds: {_no_object(name, self.credentials, 'tls-creds-*')}")
        if credentials.endpoint != endpoint:
            raise UsageError(
                f"--tls-creds: {name!r} is for a {credentials.endpoint}; endpoint={endpoint} is"
                " expected"
            )
        return credentials

    def authorizer_of(self, name: str) -> Authorizer:
        """What ``--tls-authz`` names: whether who has a certificate with that DN may come in."""
        try:
            return self._authorizers[name]
        except KeyError:
            what = _no_object(name, self._authorizers, "authz-*")
            raise UsageError(f"--tls-authz: {what}") from None

    def _add_secret(self, properties: Properties) -> None:
        for name in ("keyid", "iv"):
            if properties.take(name) is not None:
                raise UnsupportedFeature(
                    f"{properties.place}: {name}: a secret that is encrypted is not supported"
                )
        data, file = properties.text("data"), properties.text("file")
        is_base64 = properties.choice("format", ("raw", "base64"), "raw") == "base64"
        properties.end("data", "file", "format")
        if (data is None) is (file is None):
            raise UsageError(f"{properties.place}: either data or file is expected")
        secret = Path(file).read_bytes() if file is not None else (data or "").encode()
        if is_base64:
            try:
                secret = base64.b64decode(b"".join(secret.split()), validate=True)
            except binascii.Error:
                raise UsageError(f"{properties.place}: it is not in base64") from None
        self._secrets[properties.id] = secret

    def _add_x509(self, properties: Properties) -> None:
        endpoint, directory = self._begin_credentials(properties)
        verify_peer = properties.flag("verify-peer", True)
        properties.flag("sanity-check", True)
        password_id = properties.text("passwordid")
        properties.end(*_OF_CREDENTIALS, "passwordid", "sanity-check")
        password = None
        if password_id is not None:
            if password_id not in self._secrets:
                what = _no_object(password_id, self._secrets, "secret")
                raise UsageError(f"{properties.place}: passwordid: {what}")
            if endpoint == "client":
                raise UnsupportedFeature(
                    f"{properties.place}: passwordid: a client's key has no password here"
                )
            password = _as_text(self._secrets[password_id], f"{properties.place}: passwordid")
        self.credentials[properties.id] = Credentials(
            kind=X509,
            id=properties.id,
            endpoint=endpoint,
            directory=directory,
            verify_peer=verify_peer,
            password=password,
        )

    def _add_psk(self, properties: Properties) -> None:
        endpoint, directory = self._begin_credentials(properties)
        properties.flag("verify-peer", True)  # of all credentials; a key has nothing to verify
        username = properties.text("username")
        properties.end(*_OF_CREDENTIALS, "username")
        if username is not None and endpoint == "server":
            raise UsageError(f"{properties.place}: username: it is for endpoint=client")
        self.credentials[properties.id] = Credentials(
            kind=PSK,
            id=properties.id,
            endpoint=endpoint,
            directory=directory,
            username=username or "qemu",
        )

    def _begin_credentials(self, properties: Properties) -> tuple[str, str]:
        """Endpoint and directory."""
        endpoint = properties.choice("endpoint", ("client", "server"), "client")
        directory = properties.text("dir")
        if not directory:
            raise UsageError(f"{properties.place}: dir: the directory of its files is expected")
        priority = properties.text("priority")
        if priority is not None and priority not in _PRIORITIES:
            raise UnsupportedFeature(
                f"{properties.place}: priority: {priority!r}: GnuTLS's strings cannot be"
                f" translated; there are {' and '.join(_PRIORITIES)}"
            )
        return endpoint, os.path.abspath(directory)

    def _add_simple(self, properties: Properties) -> None:
        identity = properties.needed("identity")
        properties.end("identity")
        self._authorizers[properties.id] = identity.__eq__

    def _add_list(self, properties: Properties) -> None:
        self._authorizers[properties.id] = _policy(properties).allows

    def _add_list_file(self, properties: Properties) -> None:
        filename = properties.needed("filename")
        refresh = properties.flag("refresh", True)
        properties.end("filename", "refresh")

        def read(text: str) -> Policy:
            place = f"{properties.place}: {filename}"
            return _policy(Properties("authz-list", "", object_of_json(text, place), place))

        self._authorizers[properties.id] = ListFile(os.path.abspath(filename), read, refresh).allows


_REFUSED = {
    "tls-creds-anon": "TLS without certificates or keys is not supported: who listens on the way"
    " could be either end",
    "authz-pam": "PAM is not supported; there are authz-simple, authz-list and authz-list-file",
}
_OF_CREDENTIALS = ("endpoint", "dir", "verify-peer", "priority")


def _policy(properties: Properties) -> Policy:
    """Of ``authz-list``."""
    allowed = ("allow", "deny")
    policy = properties.choice("policy", allowed, "deny")
    written = properties.take("rules")
    properties.end("policy", "rules")
    if isinstance(written, dict):  # rules.0.match: what JSON has as a list
        written = [written.get(str(number)) for number in range(len(written))]
    elif written is None:
        written = []
    if not isinstance(written, list):
        raise UsageError(f"{properties.place}: rules: rules.0.match=..., or a list, is expected")
    rules = []
    for number, values in enumerate(written):
        place = f"{properties.place}: rules.{number}"
        if not isinstance(values, dict):
            raise UsageError(f"{place}: match and policy are expected, and all rules from 0 on")
        rule = Properties("", "", dict(values), place)
        match = rule.needed("match")
        allows = rule.choice("policy", allowed, None) == "allow"
        is_glob = rule.choice("format", ("exact", "glob"), "exact") == "glob"
        rule.end("match", "policy", "format")
        rules.append(Rule(match, allows, is_glob))
    return Policy(rules, policy == "allow")


def _as_text(secret: bytes, place: str) -> str:
    try:
        return secret.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{place}: a password in UTF-8 is expected") from None


def _no_object(name: str, there: Iterable[str], kind: str) -> str:
    what = f"there is {', '.join(there)}" if there else f"--object {kind},id={name},... gives one"
    return f"no object {name!r}; {what}"
