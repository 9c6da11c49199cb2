"""TLS by QEMU's options, ``--tls-creds`` and ``--tls-authz``: a server's, or what is in the URI of
a client.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pynbd.cli.objects import X509, Objects
from pynbd.errors import UsageError
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.server import tls as tls_of_servers

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls


def server_tls(objects: Objects, creds: str, authz: str | None, *, required: bool = True) -> Tls:
    """TLS of a server. Raises `UsageError`, `UnsupportedFeature`, and `TlsError` for its files.

    In QEMU who has no verified certificate passes every ``--tls-authz``; here that is refused.
    """
    credentials = objects.credentials_of(creds, "server")
    authorize = None if authz is None else objects.authorizer_of(authz)
    is_x509 = credentials.kind == X509
    if authorize and not (is_x509 and credentials.verify_peer):
        raise UsageError(
            "--tls-authz: it is for certificates of clients: tls-creds-x509 with verify-peer=on"
        )
    return tls_of_servers.Tls(
        certificates=credentials.directory if is_x509 else None,
        psk_file=None if is_x509 else credentials.psk_file,
        verify_peer=is_x509 and credentials.verify_peer,
        key_password=credentials.password,
        required=required,
        authorize=authorize,
    )


def client_uri(where: NbdUri, objects: Objects, creds: str, hostname: str | None) -> NbdUri:
    """``where``, with TLS. ``hostname``: what the certificate has to be for, if not the host."""
    credentials = objects.credentials_of(creds, "client")
    if credentials.kind != X509:
        return replace(
            where, tls=True, user=credentials.username, tls_psk_file=credentials.psk_file
        )
    if where.transport is Transport.UNIX and credentials.verify_peer and not hostname:
        raise UsageError(
            "--tls-hostname: the name in the server's certificate is expected, as a unix socket has"
            " none (or verify-peer=off)"
        )
    return replace(
        where,
        tls=True,
        tls_certificates=credentials.directory,
        tls_verify_peer=credentials.verify_peer,
        tls_hostname=hostname or "",
    )
