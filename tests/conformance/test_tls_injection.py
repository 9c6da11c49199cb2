"""Rows T9 and T10: what came in clear has no effect once there is TLS, however it was parted.

Each trial has a seed of its own, which is said when it fails::

    TRIAL="unix 17" pytest tests/conformance/test_tls_injection.py -k injected
"""

from __future__ import annotations

import os
import random
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from tests.conformance.client import (
    OPTION_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Errno,
    Flag,
    Mode,
    Option,
    Rep,
    client_flags,
    info_data,
    meta_data,
    option,
)
from tests.conformance.rows import row
from tests.conformance.server import pattern
from tests.conformance.tls import TLS_1_2, TLS_1_3, TlsServer, TlsServers, trusting

TRIALS = 200
STARTTLS = option(Option.STARTTLS)
ACK = OPTION_REPLY_MAGIC.to_bytes(8) + b"".join(
    number.to_bytes(4) for number in (Option.STARTTLS, Rep.ACK, 0)
)
ALERT = b"\x15\3"
INJECTED = [
    option(Option.STRUCTURED_REPLY),
    option(Option.EXTENDED_HEADERS),
    option(Option.LIST),
    option(Option.ABORT),
    option(Option.GO, info_data("")),
    option(Option.EXPORT_NAME, b"disk"),
    option(Option.INFO, info_data("disk", [1, 3])),
    option(Option.SET_META_CONTEXT, meta_data("", ["base:allocation"])),
    option(Option.STRUCTURED_REPLY) + option(Option.GO, info_data("")),
    STARTTLS,
    option(99, bytes(100)),
    option(99, b"", length=4),  # what follows would be the option's data
    b"\0\0\0\0\0",
    b"GET / HTTP/1.1\r\n\r\n",
]


def repeated(what: str, transport: str, trial: Callable[[random.Random], None]) -> None:
    """Trial after trial, each with numbers of its own."""
    chosen = os.environ.get("TRIAL")
    for number in range(TRIALS):
        name = f"{transport} {number}"
        if chosen not in (None, name):
            continue
        try:
            trial(random.Random(f"{what} {name}"))
        except BaseException as error:
            error.add_note(f"again: TRIAL={name!r}")
            raise


def client_hello(context: ssl.SSLContext) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("there is no server")


def contexts(tls: TlsServers) -> list[ssl.SSLContext]:
    return [trusting(tls.pki.anonymous, version) for version in (TLS_1_2, TLS_1_3)]


@row("T9")
def test_injected(tls: TlsServers, transport: str) -> None:
    """The handshake does not succeed, and nothing that was injected is answered: not in clear, nor
    to anybody else. The next client comes in between.
    """
    servers = [tls.with_(), tls.with_("--optional")]
    speaking = contexts(tls)

    def trial(rng: random.Random) -> None:
        server = rng.choice(servers)
        injected = rng.choice(INJECTED)
        if rng.random() < 0.2:
            injected = injected[: rng.randint(1, 5)]
        elif rng.random() < 0.2:
            injected += rng.choice(INJECTED)
        if rng.random() < 0.6:
            injected += client_hello(rng.choice(speaking))
        with server.meet(transport) as peer:
            peer.greet()
            match rng.choice(("same segment", "later", "after the ACK")):
                case "same segment":
                    peer.send_in_pieces(STARTTLS + injected, rng)
                case "later":
                    peer.send(STARTTLS)
                    peer.send_in_pieces(injected, rng)
                case _:
                    peer.send(STARTTLS)
                    assert peer.read(20) == ACK
                    peer.send_in_pieces(injected, rng)
            said = _rest(peer.sock)
        said = said.removeprefix(ACK)
        assert said[:2] in (b"", ALERT), said
        assert len(said) in (0, 7), said
        _look_in(server, transport, rng.choice(speaking))

    repeated("injection", transport, trial)


def _rest(sock: socket.socket) -> bytes:
    """All that the server says to a client that says no more."""
    said = b""
    with suppress(OSError):  # it has hung up already
        sock.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):  # it closed with bytes of ours unread
        while part := sock.recv(4096):
            said += part
    return said


def _look_in(server: TlsServer, transport: str, context: ssl.SSLContext) -> None:
    """A polite client is served: simple replies, no contexts, the default export."""
    with server.secured(transport, context) as peer:
        assert not peer.info(Option.GO).flags & Flag.SEND_DF
        assert peer.pread(0, 16) == pattern(0, 16)


@row("T10")
def test_reset(tls: TlsServers, transport: str) -> None:
    """All that was negotiated in clear is forgotten; it can be negotiated again."""
    server = tls.with_("--optional")
    speaking = contexts(tls)
    names = ["base:allocation", "qemu:allocation-depth"]

    def trial(rng: random.Random) -> None:
        before = [
            option(rng.choice((Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS))),
            option(Option.SET_META_CONTEXT, meta_data(rng.choice(("", "disk")), names)),
            option(rng.choice((Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS))),
            option(Option.INFO, info_data("disk", [1])),
            option(Option.LIST),
        ]
        if rng.random() < 0.5:
            before = rng.sample(before, rng.randint(1, 5))
        with server.meet(transport) as peer:
            assert peer.read_greeting() == 3
            peer.send_in_pieces(client_flags(3) + b"".join(before) + STARTTLS, rng)
            for each in before:
                peer.read_option_replies(int.from_bytes(each[8:12]))
            assert peer.read(20) == ACK
            peer.shake_hands(rng.choice(speaking))
            mode = rng.choice((Mode.SIMPLE, *Mode))
            again = mode is not Mode.SIMPLE and rng.random() < 0.5
            peer.headers(mode)
            ids = peer.meta(Option.SET_META_CONTEXT, "disk", names[:1]) if again else {}
            flags = peer.info(Option.GO, "disk").flags
            assert bool(flags & Flag.SEND_DF) == (mode is not Mode.SIMPLE)
            assert bool(flags & Flag.BLOCK_STATUS_PAYLOAD) == (again and mode is Mode.EXTENDED)
            assert peer.pread(0, 512) == pattern(0, 512)
            if mode is Mode.SIMPLE:
                assert peer.ask(Cmd.READ, 0, 512, flags=CmdFlag.DF).error == Errno.EINVAL
            status = peer.ask(Cmd.BLOCK_STATUS, 0, 512)
            assert status.error == (0 if again else Errno.EINVAL)
            assert set(status.status) == set(ids.values())
            peer.disconnect()

    repeated("reset", transport, trial)
