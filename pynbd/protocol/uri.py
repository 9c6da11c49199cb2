"""NBD URIs: parse and print.

The specification "The NBD Uniform Resource Indicator (URI) format", on RFC 3986; the scheme
suffix ``+vsock``, the parameters ``tls-certificates`` and ``tls-psk-file``, and words for 0 and 1
are libnbd's.

1. The export name is the path less its first ``/``, percent-decoded.
2. A Unix domain socket has a path, in the parameter ``socket``, and no host.
3. What the client would not understand is refused, never ignored.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self
from urllib.parse import quote, unquote

from pynbd.errors import UsageError
from pynbd.protocol.values import DEFAULT_PORT, MAX_STRING

VMADDR_CID_HOST: Final = "2"
"""The host of a virtual machine, as seen from inside: the default of ``nbd+vsock``."""

_PARTS: Final = re.compile(
    r"(?P<scheme>[^:/?#]*):(?://(?P<authority>[^/?#]*))?(?P<path>[^?#]*)"
    r"(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?",
    re.DOTALL,
)
_AUTHORITY: Final = re.compile(
    r"(?:(?P<user>[^@]*)@)?(?P<host>\[[^][]*\]|[^][:@]*)(?::(?P<port>[0-9]{0,10}))?"
)
_FOREIGN: Final = re.compile(r"[^A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]|%(?![0-9A-Fa-f]{2})")
_SUB_DELIMS: Final = "!$&'()*+,;="


class Transport(StrEnum):
    """How the server is reached; the value is the suffix of the scheme."""

    TCP = ""
    UNIX = "+unix"
    VSOCK = "+vsock"


_SCHEMES: Final = {
    f"nbd{secure}{transport}": (transport, bool(secure))
    for transport in Transport
    for secure in ("", "s")
}
_URI: Final = re.compile(r"nbds?(\+[a-z]+)?:", re.IGNORECASE)
_CHOICES: Final = {"tls-type": ("anon", "x509", "psk"), "tls-verify-peer": ("0", "1")}
_BOOLEANS: Final = dict.fromkeys(("1", "true", "t", "yes", "y", "on"), "1")
_BOOLEANS.update(dict.fromkeys(("0", "false", "f", "no", "n", "off"), "0"))


def is_uri(name: str) -> bool:
    """Whether what may also name a file is meant to be an NBD URI; such a file is ``./nbd:...``."""
    return _URI.match(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class NbdUri:
    """Where an export is found. `parse` reads a URI, ``str()`` prints it.

    ``tls`` is whether the connection must be encrypted. ``host`` is a name, an address without
    brackets, or the context id of ``+vsock``; a Unix domain socket has none, but a path in
    ``socket`` (one in the abstract namespace begins with NUL). ``port`` is 1 to 65535, for
    ``+vsock`` 0 to 2**32 - 1. What the URI does not give is empty, or None.
    """

    transport: Transport = Transport.TCP
    tls: bool = False
    user: str = ""
    host: str = ""
    port: int = DEFAULT_PORT
    export: str = ""
    socket: str = ""
    tls_type: str = ""
    tls_hostname: str = ""
    tls_verify_peer: bool | None = None
    tls_certificates: str = ""
    tls_psk_file: str = ""

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Return what a URI says. UsageError names the part that is wrong and what is allowed."""
        if foreign := _FOREIGN.search(uri):
            raise _wrong(uri, f"{foreign[0]!r} must be percent-encoded, {_quote(foreign[0], '')}")
        parts = _PARTS.fullmatch(uri)
        scheme = parts["scheme"].lower() if parts else ""
        if parts is None or scheme not in _SCHEMES:
            raise _wrong(uri, f"the scheme is one of {', '.join(_SCHEMES)}")
        transport, tls = _SCHEMES[scheme]
        if parts["fragment"] is not None:
            raise _wrong(uri, "there is no fragment; a '#' is written %23")
        if parts["path"] and not parts["path"].startswith("/"):
            raise _wrong(uri, f"{scheme}: is followed by //")
        user, host, port = _parse_authority(uri, transport, parts["authority"] or "")
        query = _parse_query(uri, parts["query"] or "")
        if ("socket" in query) != (transport is Transport.UNIX):
            raise _wrong(uri, "socket=PATH is needed by nbd+unix and nbds+unix, and only by them")
        if not tls and (secure := [name for name in query if name.startswith("tls-")]):
            raise _wrong(uri, f"{secure[0]} is for nbds{transport}: {scheme}: is in clear")
        verify_peer = query.get("tls-verify-peer")
        return cls(
            transport=transport,
            tls=tls,
            user=user,
            host=host,
            port=port,
            export=_parse_export(uri, parts["path"][1:]),
            socket=query.get("socket", ""),
            tls_type=query.get("tls-type", ""),
            tls_hostname=query.get("tls-hostname", ""),
            tls_verify_peer=None if verify_peer is None else verify_peer == "1",
            tls_certificates=query.get("tls-certificates", ""),
            tls_psk_file=query.get("tls-psk-file", ""),
        )

    def __str__(self) -> str:
        authority = _quote(self.user, _SUB_DELIMS) + "@" if self.user else ""
        if self.transport is not Transport.UNIX:
            # An address of IPv6 is the only host with colons.
            host = _quote(self.host, ":" + _SUB_DELIMS)
            authority += f"[{host}]" if ":" in host else host
            authority += f":{self.port}" if self.port != DEFAULT_PORT else ""
        query = "&".join(
            f"{name}={_quote(value, '/:,=')}" for name, value in self._query().items() if value
        )
        scheme = f"nbd{'s' if self.tls else ''}{self.transport}"
        return f"{scheme}://{authority}/{_quote(self.export, '/')}{'?' if query else ''}{query}"

    def _query(self) -> dict[str, str]:
        verify_peer = "" if self.tls_verify_peer is None else str(int(self.tls_verify_peer))
        return {
            "socket": self.socket,
            "tls-type": self.tls_type,
            "tls-hostname": self.tls_hostname,
            "tls-verify-peer": verify_peer,
            "tls-certificates": self.tls_certificates,
            "tls-psk-file": self.tls_psk_file,
        }


_PARAMETERS: Final = tuple(NbdUri()._query())


def _parse_authority(uri: str, transport: Transport, authority: str) -> tuple[str, str, int]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise _wrong(uri, "after // comes [USER@]HOST[:PORT], an IPv6 address in brackets")
    user = _decode(uri, "user", match["user"] or "")
    host = _decode(uri, "host", match["host"].strip("[]"))
    port = int(match["port"] or DEFAULT_PORT)
    if transport is Transport.UNIX:
        if host or match["port"]:
            raise _wrong(uri, f"nbd{transport} has no host, three slashes follow it")
        return user, "", DEFAULT_PORT
    if transport is Transport.VSOCK:
        if not re.fullmatch("[0-9]{0,10}", host) or max(int(host or 0), port) >= 2**32:
            raise _wrong(
                uri, "the host of a vsock is a context id, both it and its port below 2**32"
            )
        return user, host or VMADDR_CID_HOST, port
    if not 1 <= port <= 65535:
        raise _wrong(uri, "the port is 1 to 65535")
    return user, host or "localhost", port


def _parse_export(uri: str, path: str) -> str:
    export = _decode(uri, "export name", path)
    if len(export.encode()) > MAX_STRING:
        raise _wrong(uri, f"the export name has at most {MAX_STRING} bytes")
    return export


def _decode(uri: str, part: str, encoded: str) -> str:
    try:
        text = unquote(encoded, errors="strict")
    except UnicodeDecodeError:
        raise _wrong(uri, f"the {part} is UTF-8") from None
    if "\0" in text:
        raise _wrong(uri, f"the {part} has no NUL")
    return text


def _parse_query(uri: str, query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for parameter in filter(None, query.split("&")):
        written, _, raw = parameter.partition("=")
        name, value = unquote(written), unquote(raw, errors="surrogateescape")
        if name not in _PARAMETERS:
            raise _wrong(uri, f"unknown parameter {written}, there are {', '.join(_PARAMETERS)}")
        if name in parameters:
            raise _wrong(uri, f"the parameter {name} is given twice")
        if not value or "\0" in value[name == "socket" :]:
            raise _wrong(uri, f"the parameter {name} is neither empty nor has a NUL")
        if name == "tls-verify-peer":
            value = _BOOLEANS.get(value.lower(), value)
        if name in _CHOICES and value not in _CHOICES[name]:
            raise _wrong(uri, f"{name} is one of {', '.join(_CHOICES[name])}")
        parameters[name] = value
    return parameters


def _quote(text: str, safe: str) -> str:
    return quote(text, safe=safe, errors="surrogateescape")


def _wrong(uri: str, rule: str) -> UsageError:
    return UsageError(f"NBD URI {uri!r}: {rule}")
