"""NBD URIs, as somebody pastes them ("The NBD Uniform Resource Indicator (URI) format").

Allowed: `UsageError`, which refuses in one line. What is parsed obeys the specification, prints as
a URI of RFC 3986's characters, and that parses to the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pynbd.errors import UsageError
from pynbd.protocol.uri import NbdUri, Transport, is_uri

ALLOWED = (UsageError,)
MAX_LEN = 512
DICTIONARY = (
    *(b"nbd:", b"nbds:", b"nbd+unix:", b"nbds+unix:", b"nbd+vsock:", b"//", b"%00", b"%25"),
    *(b"socket=", b"tls-type=", b"tls-hostname=", b"tls-verify-peer=", b"tls-certificates="),
    *(b"tls-psk-file=", b"x509", b"[::1]", b":10809", b"%C3%A9", b"%FF"),
)
_RFC_3986 = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*")


def seeds() -> Iterable[bytes]:
    """The specification's examples, and one with all parameters."""
    yield b"nbd://example.com"
    yield b"nbd://example.com//disk"
    yield b"nbd://user@[fe80::1%25eth0]:10810/hello%20world"
    yield b"nbd+unix:///disk?socket=/tmp/sock"
    yield b"nbds+unix:///?socket=%00abstract%FF"
    yield b"nbds+vsock://3:10810/x"
    yield b"nbds://h/%C3%A9?tls-type=x509&tls-hostname=a.b&tls-verify-peer=0"
    yield from (b"nbd://h:65536/", b"nbd+vsock://4294967296:0/", b"nbd+vsock://:4294967295")
    yield b"NBDS://h/?tls-certificates=/etc/pki&tls-psk-file=k&tls-verify-peer=1"


def one_input(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    uri = NbdUri.parse(text)
    assert is_uri(text)
    assert _RFC_3986.fullmatch(text)
    assert 0 <= uri.port < 1 << (32 if uri.transport is Transport.VSOCK else 16)
    assert bool(uri.socket) == (uri.transport is Transport.UNIX) == (not uri.host)
    assert len(uri.export.encode()) <= 4096
    assert "\0" not in uri.user + uri.host + uri.export + uri.socket[1:]
    printed = str(uri)
    assert _RFC_3986.fullmatch(printed)
    try:
        again = NbdUri.parse(printed)
    except UsageError as error:
        raise AssertionError("what is printed is refused") from error
    assert (again, str(again)) == (uri, printed)
