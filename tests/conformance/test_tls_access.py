"""Who may do what: every export of `tls_server.RULES` with every kind of client, in the protocol.

`EXPECTED` is written from the rules by hand: W writes, R reads, a dot is that there is no such
export.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.conformance.client import (
    Cmd,
    CmdFlag,
    Disconnected,
    Errno,
    Flag,
    Info,
    Mode,
    Option,
    info_data,
    meta_data,
    option,
)
from tests.conformance.server import pattern
from tests.conformance.tls import HAS_PSK, TlsPeer, TlsServers, trusting, with_psk
from tests.conformance.tls_server import DATA, RULES, SIZE


@dataclass(frozen=True)
class Client:
    """``context``: how it does TLS, None is in clear."""

    transport: str
    context: Callable[[TlsServers], ssl.SSLContext] | None
    options: Callable[[TlsServers], list[str]]


def plain(_: TlsServers) -> list[str]:
    return ["--optional"]


def verifying(_: TlsServers) -> list[str]:
    return ["--optional", "--verify-peer"]


def with_keys(tls: TlsServers) -> list[str]:
    return ["--certificates", str(tls.pki.server), "--optional", "--psk", str(tls.pki.psk)]


def cert(name: str) -> Callable[[TlsServers], ssl.SSLContext]:
    return lambda tls: trusting(tls.pki.client(name))


CLIENTS = {
    "local": Client("unix", None, plain),
    "far": Client("tcp", None, verifying),
    "local, TLS": Client("unix", lambda tls: trusting(tls.pki.anonymous), plain),
    "far, TLS": Client("tcp", lambda tls: trusting(tls.pki.anonymous), plain),
    # A certificate that nobody asks for proves nothing.
    "alice, not verified": Client("tcp", cert("alice"), plain),
    "alice": Client("unix", cert("alice"), verifying),
    "alice, far": Client("tcp", cert("alice"), verifying),
    "bob": Client("unix", cert("bob"), verifying),
    "carol": Client("tcp", cert("carol"), verifying),
}
if HAS_PSK:
    CLIENTS |= {
        "alice, PSK": Client("unix", lambda _: with_psk("alice"), with_keys),
        "bob, PSK": Client("tcp", lambda _: with_psk("bob"), with_keys),
        "qemu, PSK": Client("unix", lambda _: with_psk("qemu"), with_keys),
    }
EXPECTED = {
    #                    local  far  +TLS  +TLS  alice?  alice  far  bob  carol  PSK: alice bob qemu
    "disk": "W W W W W W W W W W W W",
    "nobody": ". . . . . . . . . . . .",
    "readers": "R R R R R R R R R R R R",
    "read-only-file": "R R R R R R R R R R R R",
    "tls": ". . W W W W W W W W W W",
    "clear": "W W . . . . . . . . . .",
    "tls-writes": "R R W W W W W W W W W W",
    "uid": "W . W . . W . W . W . W",
    "other-uid": ". . . . . . . . . . . .",
    "gid": "R . R . . R . R . R . R",
    "network": ". W . W W . W . W . W .",
    "elsewhere": ". . . . . . . . . . . .",
    "alice": ". . . . . W W . . . . .",
    "alice-reads": ". . . . . R R W . . . .",
    "carol": ". . . . . . . . W . . .",
    "example": ". . . . . R R R R . . .",
    "psk": ". . . . . . . . . W R .",
    "alice-far": ". . . . . R W . . . . .",
}
each_client = pytest.mark.parametrize("who", CLIENTS)


def right(who: str, export: str) -> str:
    return EXPECTED[export].split()[list(CLIENTS).index(who)]


def come(tls: TlsServers, who: str) -> TlsPeer:
    """In haggling, through TLS if that is what the client does."""
    client = CLIENTS[who]
    server = tls.with_(*client.options(tls))
    context = client.context(tls) if client.context else None
    return server.secured(client.transport, context, clear=context is None)


def test_the_table_is_complete() -> None:
    assert list(EXPECTED) == list(RULES)
    assert {len(row.split()) for row in EXPECTED.values()} == {12}


@each_client
def test_listing(tls: TlsServers, who: str) -> None:
    with come(tls, who) as peer:
        assert list(peer.listing()) == [name for name in RULES if right(who, name) != "."]


@each_client
def test_negotiating(tls: TlsServers, who: str) -> None:
    """INFO, GO, EXPORT_NAME, contexts: all or nothing."""
    for export in RULES:
        try:
            _negotiate(tls, who, export)
        except BaseException as error:
            error.add_note(f"export {export!r}")
            raise


def _negotiate(tls: TlsServers, who: str, export: str) -> None:
    mine = right(who, export)
    with come(tls, who) as peer:
        peer.headers(Mode.STRUCTURED)
        if mine == ".":
            unknown = "x" * len(export)
            for code, make in (
                (Option.INFO, lambda name: info_data(name, [Info.NAME])),
                (Option.GO, info_data),
                (Option.LIST_META_CONTEXT, meta_data),
                (Option.SET_META_CONTEXT, lambda name: meta_data(name, ["base:allocation"])),
            ):
                answers = [peer.option(code, make(name)) for name in (export, unknown)]
                assert str(answers[0]).replace(export, unknown) == str(answers[1])
                assert len(answers[0]) == 1
            peer.send(option(Option.EXPORT_NAME, export.encode()))
            peer.expect_disconnect()
            return
        for code in (Option.INFO, Option.GO):
            if code == Option.GO:
                assert peer.meta(Option.LIST_META_CONTEXT, export)
                assert peer.meta(Option.SET_META_CONTEXT, export, ["base:allocation"])
            told = peer.info(code, export)
            assert told.size == SIZE
            _check_flags(told.flags, mine)
    with come(tls, who) as peer:
        peer.send(option(Option.EXPORT_NAME, export.encode()))
        _check_flags(int.from_bytes(peer.read(10)[8:]), mine)


def _check_flags(flags: int, mine: str) -> None:
    writing = Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO
    assert bool(flags & Flag.READ_ONLY) == (mine == "R")
    assert flags & writing == (writing if mine == "W" else 0)


@each_client
def test_requests(tls: TlsServers, who: str) -> None:
    """Who reads, reads what others write; who may only read, gets EPERM, and nothing is changed."""
    for mode in Mode:
        for export in RULES:
            mine = right(who, export)
            if mine == ".":
                continue
            with come(tls, who) as peer:
                peer.headers(mode)
                peer.info(Option.GO, export)
                flags = CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else 0
                expected = 0 if mine == "W" else Errno.EPERM
                at = DATA + 4096
                for length in (512, 100_000, 300_000):
                    data = bytes([length & 0xFF or 1]) * length
                    before = peer.pread(at, length)
                    reply = peer.ask(Cmd.WRITE, at, payload=data, flags=flags)
                    assert reply.error == expected
                    assert peer.pread(at, length) == (data if mine == "W" else before)
                for command in (Cmd.WRITE_ZEROES, Cmd.TRIM):
                    assert peer.ask(command, at, 300_000).error == expected
                assert peer.ask(Cmd.WRITE, at, payload=b"", flags=flags).error == expected
                assert peer.ask(Cmd.FLUSH).error == 0
                assert peer.pread(0, DATA) == pattern(0, DATA)
                peer.disconnect()


@each_client
def test_a_right_for_one_export_is_none_for_another(tls: TlsServers, who: str) -> None:
    """Whatever came before GO: INFO and contexts of one that is there, and one that is not."""
    with come(tls, who) as peer:
        hidden = [name for name in RULES if right(who, name) == "."]
        peer.headers(Mode.EXTENDED)
        for name in hidden:
            peer.info(Option.INFO, "disk")
            assert peer.meta(Option.SET_META_CONTEXT, "disk", ["base:allocation"])
            peer.refused(Option.GO, info_data(name))
            peer.refused(Option.INFO, info_data(name))
        peer.info(Option.INFO, "disk")
        assert peer.meta(Option.SET_META_CONTEXT, "disk", ["base:allocation"])
        assert peer.info(Option.GO, "readers").flags & Flag.READ_ONLY
        assert peer.ask(Cmd.BLOCK_STATUS, 0, 512).error == Errno.EINVAL
        reply = peer.ask(Cmd.WRITE, 0, payload=b"x" * 512, flags=CmdFlag.PAYLOAD_LEN)
        assert reply.error == Errno.EPERM
        assert peer.pread(0, 512) == pattern(0, 512)


@each_client
def test_what_was_seen_in_clear_is_not_kept(tls: TlsServers, who: str) -> None:
    """STARTTLS between what selects an export and GO: `clear` is gone, and who wrote only reads."""
    client = CLIENTS[who]
    server = tls.with_(*client.options(tls))
    if client.context is None:
        return
    with server.secured(client.transport, clear=True) as peer:
        peer.headers(Mode.EXTENDED)
        peer.info(Option.INFO, "clear")
        assert peer.meta(Option.SET_META_CONTEXT, "clear", ["base:allocation"])
        assert peer.info(Option.INFO, "tls-writes").flags & Flag.READ_ONLY
        peer.start_tls(client.context(tls))
        assert peer.info(Option.INFO, "tls-writes").flags & Flag.READ_ONLY == 0
        for code in (Option.INFO, Option.GO):
            peer.refused(code, info_data("clear"))
        peer.send(option(Option.EXPORT_NAME, b"clear"))
        peer.expect_disconnect()


@pytest.mark.parametrize("export", ["tls", "nobody", "alice", "elsewhere"])
def test_export_name_of_what_is_not_there(tls: TlsServers, transport: str, export: str) -> None:
    """In clear it is the end, as it is for a name that nobody has."""
    server = tls.with_("--optional")
    for name in (export, "x" * len(export)):
        with server.secured(transport, clear=True) as peer:
            peer.send(option(Option.EXPORT_NAME, name.encode()))
            with pytest.raises(Disconnected):
                peer.read(1)
