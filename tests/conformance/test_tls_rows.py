"""Rows T: TLS ("TLS support" of the NBD specification), on unix sockets and TCP."""

from __future__ import annotations

import random
import re
import shutil
import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conformance.client import (
    Cmd,
    Disconnected,
    Mode,
    Option,
    Rep,
    info_data,
    meta_data,
    option,
)
from tests.conformance.rows import row
from tests.conformance.server import pattern
from tests.conformance.tls import (
    TlsPeer,
    TlsServer,
    TlsServers,
    each_version,
    needs_psk,
    trusting,
    with_psk,
)
from tests.conformance.tls_server import CAROL

MODES = pytest.mark.parametrize("mode", [["--no-tls"], ["--optional"], []], ids=str)
OPTIONS = [
    (Option.LIST, b""),
    (Option.STRUCTURED_REPLY, b""),
    (Option.EXTENDED_HEADERS, b""),
    (Option.INFO, info_data("")),
    (Option.GO, info_data("")),
    (Option.LIST_META_CONTEXT, meta_data("")),
    (Option.SET_META_CONTEXT, meta_data("", ["base:allocation"])),
    (Option.PEEK_EXPORT, b""),
    (0, b"data"),
    (99, bytes(100_000)),
]
ALERT = re.compile(rb"\x15\x03[\x01-\x03]\x00\x02\x02(.)", re.DOTALL)
"""A record with a fatal alert, in clear; its description."""


@row("T1")
def test_a_server_without_tls(tls: TlsServers, transport: str) -> None:
    with tls.with_("--no-tls").meet(transport) as peer:
        peer.greet()
        assert peer.refused(Option.STARTTLS)[0] == Rep.ERR_POLICY
        assert peer.refused(Option.STARTTLS, b"data")[0] == Rep.ERR_INVALID
        for export in ("nosuch", "tls", "nobody"):
            assert peer.refused(Option.INFO, info_data(export))[0] == Rep.ERR_UNKNOWN
        peer.info(Option.GO)
        assert peer.pread(0, 16) == pattern(0, 16)


@row("T2")
def test_options_in_clear_where_tls_is_required(tls: TlsServers, transport: str) -> None:
    server = tls.with_()
    with server.meet(transport) as peer:
        peer.greet()
        for code, data in OPTIONS:
            assert peer.refused(code, data)[0] == Rep.ERR_TLS_REQD
        peer.start_tls(trusting(tls.pki.anonymous))
        peer.info(Option.GO)
        assert peer.pread(0, 16) == pattern(0, 16)


@row("T3")
@MODES
def test_abort_in_clear(tls: TlsServers, transport: str, mode: list[str]) -> None:
    with tls.with_(*mode).meet(transport) as peer:
        peer.greet()
        assert peer.acknowledged(Option.ABORT) == []
        peer.expect_disconnect()


@row("T4")
@pytest.mark.parametrize("name", [b"", b"disk", b"nosuch"])
def test_export_name_in_clear(tls: TlsServers, transport: str, name: bytes) -> None:
    with tls.with_().meet(transport) as peer:
        peer.greet()
        peer.send(option(Option.EXPORT_NAME, name))
        peer.expect_disconnect()


@row("T5")
@pytest.mark.parametrize("mode", [[], ["--optional"]], ids=str)
def test_starttls_with_data(tls: TlsServers, transport: str, mode: list[str]) -> None:
    with tls.with_(*mode).meet(transport) as peer:
        peer.greet()
        for size in (1, 100_000):
            assert peer.refused(Option.STARTTLS, bytes(size))[0] == Rep.ERR_INVALID
        peer.start_tls(trusting(tls.pki.anonymous))
        assert peer.refused(Option.STARTTLS, b"x")[0] == Rep.ERR_INVALID
        peer.info(Option.GO)


@row("T6", "T8")
@each_version
def test_starttls(tls: TlsServers, transport: str, version: ssl.TLSVersion) -> None:
    """Every option, known or not, is served as it is in clear elsewhere."""
    for server in (tls.with_(), tls.with_("--optional")):
        with server.secured(transport, trusting(tls.pki.anonymous, version)) as peer:
            assert peer.tls.version() == version.name.replace("v1_", "v1.")
            peer.send(option(99) + option(Option.INFO, info_data("nosuch")))
            assert peer.read_refusal(99)[0] == Rep.ERR_UNSUP
            assert peer.read_refusal(Option.INFO)[0] == Rep.ERR_UNKNOWN
            assert "disk" in peer.listing()
            peer.headers(Mode.EXTENDED)
            assert peer.meta(Option.LIST_META_CONTEXT, "disk")
            ids = peer.meta(Option.SET_META_CONTEXT, "disk", ["base:allocation"])
            peer.info(Option.GO, "disk")
            assert peer.pread(0, 4096) == pattern(0, 4096)
            assert set(peer.ask(Cmd.BLOCK_STATUS, 0, 4096).status) == set(ids.values())
            peer.disconnect()
        with (
            server.secured(transport)
            if server.polite
            else server.secured(transport, trusting(tls.pki.anonymous, version)) as peer
        ):
            peer.send(option(Option.EXPORT_NAME, b"nosuch"))
            peer.expect_disconnect()


@row("T7")
def test_starttls_in_tls(tls: TlsServers, transport: str) -> None:
    with tls.with_().secured(transport) as peer:
        for _ in range(2):
            assert peer.refused(Option.STARTTLS)[0] == Rep.ERR_INVALID
        peer.info(Option.GO)
        assert peer.pread(0, 16) == pattern(0, 16)


GARBAGE = [
    b"\0" * 100,
    b"GET / HTTP/1.1\r\n\r\n",
    b"IHAVEOPT",
    b"\x16\3\1\xff\xff" + b"\1" * 100,  # a record that is too long
    b"\x16\3\1\0\5\1\0\0\1\0" + bytes(40),  # a ClientHello that is none
    b"\x16\3\1\0\4\1\xff\xff\xff" + bytes(40),  # one of 16 MiB
    b"\x17\3\3\0\1x",  # application data
    b"\x15\3\1\0\2\2\x28",  # an alert
    b"\x80\x2e\1\0\2\0\x15\0\0\0\x10" + bytes(40),  # SSL 2.0
    b"\x16\3\0\0\x2d\1\0\0\x29\3\0" + bytes(39),  # SSL 3.0
]


@row("T11")
@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda data: data[:8].hex())
def test_garbage_instead_of_a_client_hello(tls: TlsServers, transport: str, garbage: bytes) -> None:
    """The others do not notice it."""
    server = tls.with_()
    with server.entered(transport) as other, server.meet(transport) as peer:
        peer.greet()
        assert peer.acknowledged(Option.STARTTLS) == []
        with server.telling(r"pynbd: .* disconnected: TLS: the handshake failed: .*"):
            peer.send_anyway(garbage)
            if len(garbage) < 20:
                peer.send_anyway(bytes(40))
            said = peer.read_to_end()
        assert said == b"" or ALERT.fullmatch(said), said
        assert other.pread(0, 16) == pattern(0, 16)


@row("T11")
def test_random_garbage(tls: TlsServers, transport: str) -> None:
    rng = random.Random("garbage " + transport)
    server = tls.with_()
    for _ in range(100):
        with server.meet(transport) as peer:
            peer.greet()
            peer.send(option(Option.STARTTLS))
            peer.send_in_pieces(rng.choice((b"", b"\x16\3\1")) + rng.randbytes(200), rng)
            with suppress(Disconnected):
                peer.finish()
            said = peer.read_to_end()
            assert said[20:] == b"" or ALERT.fullmatch(said[20:]), said


@row("T12")
@pytest.mark.parametrize("hello", [0, 1, 5, 100, None])
def test_a_client_that_stalls_in_the_handshake(
    tls: TlsServers, transport: str, hello: int | None
) -> None:
    """Nowhere has it more time than for the whole negotiation; None: in haggling, in TLS."""
    server = tls.with_("--handshake-limit", "0.3")
    with server.telling(r"pynbd: .* disconnected: no negotiation within 0\.3 s"):
        if hello is None:
            with server.secured(transport) as peer:
                assert peer.read_to_end() == b""
        else:
            with server.meet(transport) as peer:
                peer.greet()
                assert peer.acknowledged(Option.STARTTLS) == []
                peer.send(b"\x16\3\1\2\0\1\0\1\xfc\3\3".ljust(100, b"x")[:hello])
                assert peer.read_to_end() == b""


@row("T12")
def test_a_crowd_that_stalls_in_the_handshake(tls: TlsServers, transport: str) -> None:
    """A hundred cost no memory to speak of, and afterwards no descriptor."""
    server = tls.with_("--handshake-limit", "3", "--optional")
    server.check()
    before = server.descriptors()
    with server.flat_memory(10 << 20):
        crowd = []
        for number in range(100):
            crowd.append(server.meet(transport))
            crowd[-1].greet()
            assert crowd[-1].acknowledged(Option.STARTTLS) == []
            crowd[-1].send(b"\x16\3\1\2\0\1\0"[: number % 8])
        server.check()
        for peer in crowd:
            assert peer.read_to_end() == b""
            peer.sock.close()
    server.wait_for_descriptors(before)


REFUSED = ["anonymous", "other_client", "expired_client", "future_client", "revoked"]
REFUSED += ["misused_client"]


@row("T13", "T14")
@each_version
@pytest.mark.parametrize("who", REFUSED)
def test_a_client_whose_certificate_is_not_accepted(
    tls: TlsServers, transport: str, version: ssl.TLSVersion, who: str
) -> None:
    """A client in TLS 1.3 may believe that all went well, and learns it at its first read."""
    server = tls.with_("--verify-peer", certificates=tls.pki.server_with_crl)
    context = trusting(getattr(tls.pki, who), version)
    with (
        server.telling(r"pynbd: .* disconnected: TLS: .*"),
        server.meet(transport) as peer,
    ):
        peer.greet()
        assert peer.acknowledged(Option.STARTTLS) == []
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _list(peer, context)


@row("T13", "T14")
@each_version
@pytest.mark.parametrize("who", ["alice", "client_with_chain"])
def test_a_client_whose_certificate_is_accepted(
    tls: TlsServers, transport: str, version: ssl.TLSVersion, who: str
) -> None:
    server = tls.with_("--verify-peer", certificates=tls.pki.server_with_crl)
    if who == "client_with_chain":  # its list of the revoked is not there
        server = tls.with_("--verify-peer")
    folder = tls.pki.client("alice") if who == "alice" else tls.pki.client_with_chain
    with server.secured(transport, trusting(folder, version)) as peer:
        peer.info(Option.GO)
        assert peer.pread(0, 16) == pattern(0, 16)


def _list(peer: TlsPeer, context: ssl.SSLContext) -> None:
    peer.shake_hands(context, polite=False)
    peer.tls.sendall(option(Option.LIST))
    peer.tls.recv(1)


@row("T14")
@pytest.mark.parametrize("who", ["distrustful"])
def test_a_client_that_does_not_trust_the_server(tls: TlsServers, transport: str, who: str) -> None:
    with tls.with_().meet(transport) as peer:
        peer.greet()
        assert peer.acknowledged(Option.STARTTLS) == []
        with pytest.raises(ssl.SSLCertVerificationError):
            peer.shake_hands(trusting(getattr(tls.pki, who)))


@row("T15")
@needs_psk
@each_version
@pytest.mark.parametrize("credentials", ["--psk", "both"])
def test_pre_shared_keys(
    tls: TlsServers, transport: str, version: ssl.TLSVersion, credentials: str
) -> None:
    server = _psk_server(tls, credentials)
    for user in ("alice", "bob"):
        with server.secured(transport, with_psk(user, version=version)) as peer:
            peer.info(Option.GO)
            assert peer.pread(0, 16) == pattern(0, 16)


@row("T15")
@needs_psk
@each_version
@pytest.mark.parametrize("credentials", ["--psk", "both"])
def test_who_has_no_key_learns_nothing(
    tls: TlsServers, transport: str, version: ssl.TLSVersion, credentials: str
) -> None:
    """A user who is not known, and one with another key: the same bytes."""
    server = _psk_server(tls, credentials)
    said = set()
    for user, key in (("alice", "dd" * 32), ("stranger", "dd" * 32), ("alice", "a1" * 16)):
        with server.meet(transport) as peer:
            peer.greet()
            assert peer.acknowledged(Option.STARTTLS) == []
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = with_psk(user, key, version).wrap_bio(incoming, outgoing)
            heard = b""
            with pytest.raises(ssl.SSLError) as caught:  # noqa: PT012
                while True:
                    try:
                        client.do_handshake()
                        client.read(1)
                    except ssl.SSLWantReadError:
                        if outgoing.pending:
                            peer.sock.sendall(outgoing.read())
                        heard = peer.sock.recv(1 << 16)
                        incoming.write(heard)
            said.add((caught.value.reason, heard[-7:]))
    assert len(said) == 1


def _psk_server(tls: TlsServers, credentials: str) -> TlsServer:
    certificates = ["--certificates", str(tls.pki.server)] if credentials == "both" else []
    return tls.with_(*certificates, "--psk", str(tls.pki.psk))


@row("T16")
@MODES
@pytest.mark.parametrize("flags", [0, 2])
def test_starttls_without_fixed_newstyle(
    tls: TlsServers, transport: str, mode: list[str], flags: int
) -> None:
    with tls.with_(*mode).meet(transport) as peer:
        peer.greet(flags)
        peer.send(option(Option.STARTTLS))
        peer.expect_disconnect()


@row("T17")
def test_exports_that_are_there_through_tls_only(tls: TlsServers, transport: str) -> None:
    server = tls.with_("--optional")
    with server.meet(transport) as peer:
        peer.greet()
        assert "disk" in peer.listing()
        assert "tls" not in peer.listing()
        peer.headers(Mode.STRUCTURED)
        for name in ("tls", "nobody", "nosuch"):
            for code in (Option.INFO, Option.GO):
                kind, text = peer.refused(code, info_data(name))
                assert (kind, name in text) == (Rep.ERR_TLS_REQD, False)
            for code in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
                assert peer.refused(code, meta_data(name))[0] == Rep.ERR_UNKNOWN
        peer.start_tls(trusting(tls.pki.anonymous))
        assert "tls" in peer.listing()
        for name in ("clear", "nobody", "nosuch"):
            assert peer.refused(Option.INFO, info_data(name))[0] == Rep.ERR_UNKNOWN
        peer.info(Option.GO, "tls")
        assert peer.pread(0, 16) == pattern(0, 16)
    with server.meet(transport) as peer:
        peer.greet()
        peer.info(Option.GO, "clear")
        assert peer.pread(0, 16) == pattern(0, 16)


@row("T18")
@each_version
@pytest.mark.parametrize("end", ["DISC", "ABORT", "close_notify", "unknown magic"])
def test_the_server_says_goodbye(
    tls: TlsServers, transport: str, version: ssl.TLSVersion, end: str
) -> None:
    """With close_notify: without one the peer would see a stream that was cut off."""
    with tls.with_().meet(transport) as peer:
        peer.greet()
        assert peer.acknowledged(Option.STARTTLS) == []
        peer.shake_hands(trusting(tls.pki.anonymous, version), polite=False)
        if end == "ABORT":
            assert peer.acknowledged(Option.ABORT) == []
        else:
            peer.info(Option.GO)
            cookie = peer.request(Cmd.READ, 0, 100_000)
            if end == "DISC":
                peer.request(Cmd.DISC)
            elif end == "unknown magic":
                peer.send(bytes(28))
            else:
                reply = peer.reply(0, 100_000)
                peer.tls.unwrap()  # raises where the server does not say it, too
                assert (reply.cookie, len(reply.data)) == (cookie, 100_000)
                return
            assert peer.reply(0, 100_000).cookie == cookie
        assert peer.tls.recv(1) == b""


@row("T19")
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize(
    "moment", ["handshake", "haggling", "transmission", "replies", "a request"]
)
def test_a_peer_that_goes_without_a_word(
    tls: TlsServers, transport: str, moment: str, reset: bool
) -> None:
    """No traceback (the fixture looks); who keeps a list of clients is told."""
    server = tls.with_()
    before = server.descriptors()
    peer = server.meet(transport)
    peer.greet()
    assert peer.acknowledged(Option.STARTTLS) == []
    if moment == "handshake":
        peer.send(b"\x16\3\1\2\0\1\0\1\xfc\3\3")
        peer.vanish(reset=reset)
        server.wait_for_descriptors(before)
        return
    peer.shake_hands(trusting(tls.pki.anonymous))
    if moment == "haggling":
        peer.send(option(Option.LIST) + option(Option.GO)[:10])
        peer.vanish(reset=reset)
        server.wait_for_descriptors(before)
        return
    with server.telling(r"pynbd: (a local client|127\.0\.0\.1:\d+) has left"):
        peer.info(Option.GO)
        if moment == "replies":
            for at in range(8):
                peer.request(Cmd.READ, at << 20, 8 << 20)
            peer.read(100)
        if moment == "a request":
            peer.send(bytes.fromhex("25609513 0000 0001") + bytes(17) + b"\1")
        peer.vanish(reset=reset)
    server.wait_for_descriptors(before)


@row("T20")
def test_the_files(tls: TlsServers, transport: str) -> None:
    """Row T20: ca-cert.pem is only asked for where clients are verified."""
    bare = Path(tls.pki.folder, "server-bare")
    bare.mkdir(exist_ok=True)
    for name in ("server-cert.pem", "server-key.pem"):
        shutil.copy(tls.pki.server / name, bare)
    for folder in (bare, tls.pki.server, tls.pki.server_with_chain, tls.pki.rsa):
        server = tls.with_("--optional", certificates=folder)
        with server.secured(transport, trusting(tls.pki.anonymous)) as peer:
            peer.info(Option.GO)
            assert peer.pread(0, 16) == pattern(0, 16)


@row("T20")
@needs_psk
@pytest.mark.parametrize("folder", [False, True])
def test_the_file_of_keys(tls: TlsServers, transport: str, folder: bool) -> None:
    path = tls.pki.psk.parent if folder else tls.pki.psk
    with tls.with_("--psk", str(path)).secured(transport, with_psk("bob")) as peer:
        peer.info(Option.GO)


@row("T21")
@each_version
def test_authorization_by_the_distinguished_name(
    tls: TlsServers, transport: str, version: ssl.TLSVersion
) -> None:
    """Who may not come in is disconnected after the handshake, without a word."""
    server = tls.with_("--verify-peer", "--authorize", CAROL)
    with server.secured(transport, trusting(tls.pki.client("carol"), version)) as peer:
        peer.info(Option.GO)
        assert peer.pread(0, 16) == pattern(0, 16)
    told = r"pynbd: .* disconnected: TLS: .*\bC=GB,ST=Essex,.*,CN=alice\b.*"
    with (
        server.telling(told),
        server.secured(transport, trusting(tls.pki.client("alice"), version)) as peer,
    ):
        peer.send_anyway(option(Option.LIST))
        assert peer.read_to_end() == b""
