"""A client and a server of the tests with TLS; the client's TLS is the standard library's.

Like `tests.conformance.client`, what expects something imports nothing of pynbd.
"""

from __future__ import annotations

import os
import random
import re
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from interop.certificates import USERS, Pki
from tests.conformance.client import DEADLINE, Disconnected, Mode, Option, Peer
from tests.conformance.running import RunningServer
from tests.conformance.server import pattern

TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
HAS_PSK = getattr(ssl, "HAS_PSK", False)
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="pre-shared keys need Python 3.13")
each_version = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=lambda v: v.name)

_USUAL_LINES = re.compile(
    r"pynbd: (.* disconnected: .*|.* has come: export .*|.* has left"
    r"|.* asked for export .*, which (is not there|no rule lets it have))"
)
"""What a server says of its clients; a defect, a traceback, a warning are something else."""


def trusting(folder: Path, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A client that has the files of ``folder``, and speaks ``version``, or any."""
    context = ssl.create_default_context(cafile=folder / "ca-cert.pem")
    if (folder / "client-cert.pem").exists():
        context.load_cert_chain(folder / "client-cert.pem", folder / "client-key.pem")
    return only(context, version)


def with_psk(user: str, key: str = "", version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A client that has a pre-shared key (hexadecimal; that of the user, if none is given)."""
    context: Any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("PSK")
    proof = (user, bytes.fromhex(key or USERS[user]))
    context.set_psk_client_callback(lambda hint: proof)
    return only(context, version)


def only(context: ssl.SSLContext, version: ssl.TLSVersion | None) -> ssl.SSLContext:
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


class TlsPeer(Peer):
    """A client that can change to TLS."""

    def start_tls(self, context: ssl.SSLContext) -> None:
        """STARTTLS, which the server acknowledges, and the handshake."""
        assert self.acknowledged(Option.STARTTLS) == []
        self.shake_hands(context)

    def shake_hands(self, context: ssl.SSLContext, *, polite: bool = True) -> None:
        """``polite``: an end without close_notify counts as one, too."""
        self.sock = context.wrap_socket(
            self.sock, server_hostname="localhost", suppress_ragged_eofs=polite
        )
        self.mode = Mode.SIMPLE  # what was negotiated in clear is forgotten

    def send(self, data: bytes) -> None:
        try:
            super().send(data)
        except ssl.SSLEOFError as error:
            raise Disconnected from error

    def finish(self) -> None:
        """Say that nothing more will be sent; of TLS it is not the end, but that of its stream."""
        if not isinstance(self.sock, ssl.SSLSocket):
            super().finish()
            return
        with socket.socket(fileno=os.dup(self.sock.fileno())) as raw, suppress(OSError):
            raw.shutdown(socket.SHUT_WR)

    @property
    def tls(self) -> ssl.SSLSocket:
        assert isinstance(self.sock, ssl.SSLSocket)
        return self.sock

    def send_in_pieces(self, data: bytes, rng: random.Random) -> None:
        """All at once, bytewise, or in segments; each is taken before the next one is sent."""
        at = 0
        kind = rng.choice(("whole", "segments", "segments") * 3 + ("bytes",))
        while at < len(data):
            size = {"whole": len(data), "bytes": 1}.get(kind) or rng.randint(1, len(data))
            try:
                self.sock.sendall(data[at : at + size])
            except OSError:
                return  # it has hung up
            at += size
            if at < len(data):
                self._wait_taken_or_gone()

    def _wait_taken_or_gone(self) -> None:
        if self.sock.family == socket.AF_UNIX:
            self.wait_taken()
        else:
            os.sched_yield()  # TCP tells what was acknowledged, not what was taken

    def vanish(self, *, reset: bool) -> None:
        """Close the connection without close_notify."""
        raw = socket.socket(fileno=self.sock.detach())
        if reset:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()


class TlsServer(RunningServer):
    """``tests.conformance.tls_server``. ``polite``: what a good client of its has, None if it
    speaks in clear.
    """

    program = "tests.conformance.tls_server"
    expected_lines = _USUAL_LINES

    def __init__(
        self, folder: Path, loop: str, options: Sequence[str], polite: ssl.SSLContext | None
    ) -> None:
        super().__init__(folder, loop, options)
        self.polite = polite
        self.port = int((folder / "port").read_text())

    def meet(self, transport: str) -> TlsPeer:
        """A connection by ``unix`` or ``tcp``, on which nothing has been read or sent."""
        if transport == "unix":
            return TlsPeer(self.socket)
        peer = TlsPeer(("127.0.0.1", self.port))
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # segments as they are cut
        return peer

    def secured(
        self, transport: str, context: ssl.SSLContext | None = None, *, clear: bool = False
    ) -> TlsPeer:
        """A connection in TLS, between two options; or ``clear``."""
        peer = self.meet(transport)
        peer.greet()
        if not clear:
            context = context or self.polite
            assert context
            peer.start_tls(context)
        return peer

    def entered(
        self,
        transport: str,
        mode: Mode = Mode.SIMPLE,
        export: str = "",
        *,
        context: ssl.SSLContext | None = None,
    ) -> TlsPeer:
        """A connection in transmission, through TLS."""
        peer = self.secured(transport, context)
        peer.headers(mode)
        peer.info(Option.GO, export)
        return peer

    def check(self) -> None:
        assert self.process.poll() is None, (self.folder / "stderr").read_text()
        for transport in ("unix", "tcp"):
            with self.secured(transport, clear=self.polite is None) as peer:
                peer.info(Option.GO)
                assert peer.pread(4096, 32) == pattern(4096, 32)
                peer.disconnect()

    @contextmanager
    def telling(self, *lines: str) -> Iterator[None]:
        """What happens inside is told, in lines that match all of these."""
        log = self.folder / "stderr"
        before = len(log.read_text())
        yield
        deadline = time.monotonic() + DEADLINE
        while True:
            said = log.read_text()[before:].splitlines()
            missing = [line for line in lines if not any(re.fullmatch(line, s) for s in said)]
            if not missing:
                return
            assert time.monotonic() < deadline, (missing, said)
            time.sleep(0.001)


class TlsServers:
    """Servers that tests share: each is started when it is asked for first."""

    def __init__(self, folder: Path, loop: str, pki: Pki) -> None:
        self._folder = folder
        self._loop = loop
        self.pki = pki
        self._running: dict[tuple[str, ...], TlsServer] = {}
        self._met: list[TlsServer] = []

    def with_(self, *options: str, certificates: Path | None = None) -> TlsServer:
        """That with ``options``; its certificate is good, if not otherwise said."""
        if "--no-tls" not in options and "--psk" not in options:
            options = ("--certificates", str(certificates or self.pki.server), *options)
        found = self._running.get(options)
        if found is None:
            folder = self._folder / str(len(self._running))
            folder.mkdir()
            found = TlsServer(folder, self._loop, options, self._polite(options))
            self._running[options] = found
        self._met.append(found)
        return found

    def _polite(self, options: Sequence[str]) -> ssl.SSLContext | None:
        if "--no-tls" in options or "--optional" in options:
            return None
        if "--certificates" not in options:
            return with_psk("alice")
        return trusting(self.pki.client("alice" if "--authorize" not in options else "carol"))

    def check(self) -> None:
        """Those that were asked for since the last call serve, and have said nothing odd."""
        met, self._met = dict.fromkeys(self._met), []
        for server in met:
            server.check()
            assert server.unexpected_lines() == []

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()
