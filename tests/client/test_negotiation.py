"""What a client says of a negotiation over TLS that ends too early: the URI, and the reason.

The servers are played with the standard library's own TLS.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from interop.certificates import Pki
from pynbd import TlsError, UsageError, connect
from pynbd.client.negotiation import server_name
from pynbd.protocol.uri import NbdUri
from pynbd.tls.credentials import HAS_PSK
from tests.client.playing import (
    ACK,
    ERR_UNSUP,
    EXTENDED_HEADERS,
    STARTTLS,
    Play,
    playing,
    receive,
    reply,
    until_closed,
)

Talk = Callable[[ssl.SSLSocket], object]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


def shaking_hands(folder: Path, talk: Talk, *, verify: bool = False) -> Play:
    """The part of a server that takes STARTTLS, and then does ``talk`` through TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca-cert.pem")
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE

    def play(sock: socket.socket) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        receive(sock, 4 + 16)
        sock.sendall(reply(STARTTLS, ACK))
        with suppress(ssl.SSLError), context.wrap_socket(sock, server_side=True) as secure:
            talk(secure)

    return play


def secured(uri: str, **parameters: object) -> str:
    """The same with TLS; ``_`` in a name is ``-``."""
    query = [f"&{name.replace('_', '-')}={value}" for name, value in parameters.items()]
    return uri.replace("nbd+", "nbds+") + "".join(query)


async def test_a_server_that_wants_a_certificate(pki: Pki) -> None:
    """In TLS 1.3 it says so when the client has done its part of the handshake."""
    play = shaking_hands(pki.server, until_closed, verify=True)
    text = "TLS: the handshake failed: the peer says 'certificate required'"
    with playing(play) as uri:
        where = secured(uri, tls_certificates=pki.anonymous)
        with pytest.raises(TlsError) as caught:
            async with connect(where):
                pass
    assert str(caught.value) == f"{where}: {text}"


async def test_a_client_that_was_told_nothing(pki: Pki) -> None:
    """The system does not know the authority; where to say whom to trust is told."""
    with playing(shaking_hands(pki.server, until_closed)) as uri:
        where = secured(uri, tls_hostname="localhost")
        with pytest.raises(TlsError) as caught:
            async with connect(where):
                pass
    assert str(caught.value).startswith(f"{where}: TLS: the certificate was not accepted: ")
    assert str(caught.value).endswith(
        " (tls-certificates=DIR in the URI says whom to trust, and what to show)"
    )


async def test_a_server_that_goes_after_the_handshake(pki: Pki) -> None:
    """As those do that look at certificates when it is over."""
    with playing(shaking_hands(pki.server, lambda _: None)) as uri:
        where = secured(uri, tls_certificates=pki.anonymous)
        with pytest.raises(TlsError, match="the server did not go on; it may want another cert"):
            async with connect(where):
                pass


async def test_a_server_that_goes_during_the_handshake(pki: Pki) -> None:
    def play(sock: socket.socket) -> None:
        sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
        receive(sock, 4 + 16)
        sock.sendall(reply(STARTTLS, ACK))
        sock.recv(1 << 16)

    with playing(play) as uri:
        where = secured(uri, tls_certificates=pki.anonymous)
        with pytest.raises(TlsError, match="the server did not go on; it may want another cert"):
            async with connect(where):
                pass


async def test_a_server_that_goes_later(pki: Pki) -> None:
    """It has spoken through TLS, so that is not the reason."""

    def talk(secure: ssl.SSLSocket) -> None:
        receive(secure, 16)
        secure.sendall(reply(EXTENDED_HEADERS, ERR_UNSUP))

    with playing(shaking_hands(pki.server, talk)) as uri:
        where = secured(uri, tls_certificates=pki.anonymous)
        with pytest.raises(ConnectionError):
            async with connect(where):
                pass


@pytest.mark.skipif(not HAS_PSK, reason="pre-shared keys need Python 3.13")
async def test_a_server_that_shows_a_certificate_where_a_key_is_wanted(pki: Pki) -> None:
    with playing(shaking_hands(pki.server, until_closed)) as uri:
        where = secured(uri.replace("///", "//alice@/"), tls_psk_file=pki.psk)
        with pytest.raises(TlsError, match=r"\(it may have no such key for this user, or use cert"):
            async with connect(where):
                pass


@pytest.mark.parametrize("query", ["tls-type=psk", "tls-type=anon"])
async def test_parameters_that_make_no_sense(query: str) -> None:
    uri = f"nbds://localhost/?{query}"
    with pytest.raises(UsageError) as caught:
        async with connect(uri):
            pass
    assert str(caught.value).startswith(f"{uri}: tls-type")


@pytest.mark.parametrize("name", [".example", "a..b", "a" * 64, "%FF"])
async def test_names_that_no_server_can_have(name: str) -> None:
    uri = f"nbds+unix:///?socket=/none&tls-hostname={name}"
    with pytest.raises(UsageError, match=r"tls-hostname: '.*': no host can have this name"):
        async with connect(uri):
            pass


@pytest.mark.parametrize(
    "uri, name",
    [
        ("nbds://example/", "example"),
        ("nbds://[fe80::1%25eth0]/", "fe80::1"),  # a zone is of the client's host
        ("nbds://example/?tls-hostname=other", "other"),
        ("nbds+vsock://2/", None),
        ("nbds+unix:///?socket=s", None),
        ("nbds+unix:///?socket=s&tls-hostname=other", "other"),
    ],
)
def test_whom_a_certificate_has_to_be_for(uri: str, name: str | None) -> None:
    assert server_name(NbdUri.parse(uri)) == name
