"""TLS of a server: its mode, its credentials, and who may come in at all.

"TLS support" of the NBD specification. What a client may do with an export, once he is in, is a
matter of `pynbd.server.access`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pynbd.errors import TlsError, UsageError
from pynbd.protocol.handshake import TlsMode
from pynbd.protocol.wire import quote
from pynbd.server.stream import Stream
from pynbd.tls.credentials import ServerCredentials
from pynbd.tls.names import CertificateNames


class Tls:
    """How a server does TLS.

    ``certificates``: a folder with server-cert.pem and server-key.pem, ca-cert.pem if clients are
    asked for certificates (``verify_peer``), and ca-crl.pem if some of these were revoked.
    ``psk_file``: users and their pre-shared keys, ``user:hexadecimal`` lines, or the folder of a
    keys.psk. One of these two, or both. ``key_password``: of an encrypted server-key.pem.

    ``required``: nothing is served in clear; else that is the choice of the client, where access
    rules do not say otherwise. ``authorize``: whether a client may come in, by the distinguished
    name of its certificate ("" of none); one that may not is disconnected after the handshake.

    Raises `TlsError` for files that cannot be used, `UsageError` for arguments that make no sense.
    """

    def __init__(
        self,
        *,
        certificates: str | os.PathLike[str] | None = None,
        psk_file: str | os.PathLike[str] | None = None,
        verify_peer: bool = False,
        key_password: str | None = None,
        required: bool = True,
        authorize: Callable[[str], bool] | None = None,
    ) -> None:
        for name, value in (("verify_peer", verify_peer), ("required", required)):
            if not isinstance(value, bool):
                raise UsageError(f"{name}: True or False is expected, not {value!r:.80}")
        self.credentials = ServerCredentials(
            certificates=certificates,
            psk_file=psk_file,
            verify_peer=verify_peer,
            key_password=key_password,
        )
        self.required = required
        self._authorize = authorize

    @property
    def mode(self) -> TlsMode:
        return TlsMode.FORCEDTLS if self.required else TlsMode.SELECTIVETLS

    async def start(self, stream: Stream) -> tuple[CertificateNames | None, str | None]:
        """Shake hands on ``stream``. What that has proved of the client: its certificate, or the
        user whose key it has.

        Raises `TlsError` if it fails, or the client may not come in; `EOFError`, `OSError`.
        """
        users: list[str] = []
        tunnel = await stream.start_tls(self.credentials.context(users.append))
        der = tunnel.certificate
        certificate = CertificateNames.of(der) if der else None
        name = certificate.dn if certificate else ""
        if self._authorize and not self._authorize(name):
            raise TlsError(f"the client {quote(name)} may not come in")
        # Of several that a client has named, the key of the last one was tried.
        return certificate, users[-1] if users and tunnel.used_psk else None
