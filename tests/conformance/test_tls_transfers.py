"""What goes through TLS in transmission: in any records, in any number, in any sizes."""

from __future__ import annotations

import os
import random
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conformance.client import (
    DEADLINE,
    Cmd,
    CmdFlag,
    Mode,
    Option,
    info_data,
    option,
    request,
)
from tests.conformance.server import pattern
from tests.conformance.tls import (
    TLS_1_2,
    TLS_1_3,
    TlsPeer,
    TlsServer,
    TlsServers,
    each_version,
    trusting,
)
from tests.tls.records import (
    ALERT,
    CLOSE_NOTIFY,
    HANDSHAKE,
    KEY_UPDATE,
    KEY_UPDATE_ASKED,
    LONGEST,
    Records,
)

MIB = 1 << 20
READ = request(Mode.SIMPLE, Cmd.READ, 0, 512)


def test_more_small_requests_than_are_received_at_once(tls: TlsServers, transport: str) -> None:
    """None of them waits in the tunnel, of which the socket tells nothing."""
    with tls.with_().entered(transport) as peer:
        count = 20_000
        peer.send(b"".join(request(Mode.SIMPLE, Cmd.READ, 0, 1, cookie=n) for n in range(count)))
        for _ in range(count):
            assert peer.reply(0, 1).data == pattern(0, 1)
        peer.disconnect()


@each_version
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
def test_32_mib(tls: TlsServers, transport: str, version: ssl.TLSVersion, mode: Mode) -> None:
    """The longest WRITE and READ, through socket buffers of a few KiB; the file is the same."""
    server = tls.with_()
    data = random.Random(mode.value).randbytes(32 * MIB)
    with server.meet(transport) as peer:
        # TCP with a window below the segments of a loopback waits for its timers, not for anybody.
        small = 8192 if transport == "unix" else 1 << 18
        for which in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            peer.sock.setsockopt(socket.SOL_SOCKET, which, small)
        peer.greet()
        peer.start_tls(trusting(tls.pki.anonymous, version))
        peer.headers(mode)
        peer.info(Option.GO, "tls")
        flags = CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else 0
        assert peer.ask(Cmd.WRITE, MIB, payload=data, flags=flags).error == 0
        assert peer.pread(MIB, len(data)) == data
        with (server.folder / "tls").open("rb") as file:
            file.seek(MIB)
            assert file.read(len(data)) == data
        peer.disconnect()


@each_version
def test_requests_in_the_record_of_go(
    tls: TlsServers, transport: str, version: ssl.TLSVersion
) -> None:
    """Nothing is lost, and nothing waits: whatever a record brings with the end of haggling."""
    rng = random.Random(7)
    server = tls.with_()
    go = option(Option.GO, info_data("disk"))
    for count in (1, 2, 100, 700):
        with server.secured(transport, trusting(tls.pki.anonymous, version)) as peer:
            reads = [(rng.randrange(4096), rng.randint(1, 512)) for _ in range(count)]
            asked = [
                request(Mode.SIMPLE, Cmd.READ, *read, cookie=n) for n, read in enumerate(reads)
            ]
            peer.send(option(Option.LIST) + go + b"".join(asked))
            peer.read_option_replies(Option.LIST)
            peer.read_option_replies(Option.GO)
            for _ in reads:
                head = peer.read(16)
                offset, length = reads[int.from_bytes(head[8:])]
                assert peer.read(length) == pattern(offset, length)
            peer.disconnect()


@contextmanager
def by_hand(
    server: TlsServer, transport: str, pki: Path, folder: Path
) -> Iterator[tuple[TlsPeer, Records]]:
    """A client in haggling whose records are written by hand."""
    context = trusting(pki, TLS_1_3)
    context.keylog_filename = str(folder / "keys")
    with server.secured(transport, context) as peer:
        yield peer, Records.of(peer.tls, folder / "keys")
    context.keylog_filename = None


def say(peer: TlsPeer, data: bytes) -> None:
    while data:
        select.select((), (peer.sock,), (), DEADLINE)  # it does not block, as it has a timeout
        data = data[os.write(peer.sock.fileno(), data) :]


def go(peer: TlsPeer, records: Records) -> None:
    say(peer, records(option(Option.GO, info_data("disk"))))
    peer.read_option_replies(Option.GO)


def test_records_of_one_byte_and_of_none(tls: TlsServers, transport: str, tmp_path: Path) -> None:
    """An option and a request split over records, with empty ones and key updates between."""
    with by_hand(tls.with_(), transport, tls.pki.anonymous, tmp_path) as (peer, records):
        for message, end in (
            (option(Option.GO, info_data("disk")), lambda: peer.read_option_replies(Option.GO)),
            (READ, lambda: peer.reply(0, 512)),
            (READ, lambda: peer.reply(0, 512)),
        ):
            for byte in message:
                say(peer, records(bytes([byte])) + records(b""))
            say(peer, records(KEY_UPDATE, HANDSHAKE))
            end()
        say(peer, b"".join(records(READ) + records(KEY_UPDATE_ASKED, HANDSHAKE) for _ in range(50)))
        for _ in range(50):
            assert peer.reply(0, 512).data == pattern(0, 512)
        say(peer, records(READ + READ[:5]) + records(READ[5:]) + records(CLOSE_NOTIFY, ALERT))
        for _ in range(2):
            assert peer.reply(0, 512).data == pattern(0, 512)
        peer.expect_disconnect()


def test_a_request_in_records_that_come_in_pieces(
    tls: TlsServers, transport: str, tmp_path: Path
) -> None:
    rng = random.Random(5)
    with by_hand(tls.with_(), transport, tls.pki.anonymous, tmp_path) as (peer, records):
        go(peer, records)
        data = b"".join(records(READ[at : at + 9]) for at in range(0, 28, 9)) * 1
        for byte in data:
            say(peer, bytes([byte]))
            peer.wait_taken()
        assert peer.reply(0, 512).data == pattern(0, 512)
        head = request(Mode.SIMPLE, Cmd.WRITE, 2 * MIB, MIB)
        payload = rng.randbytes(MIB)
        whole = head + payload
        at = 0
        while at < len(whole):
            size = rng.choice((1, 100, 5000, LONGEST))
            say(peer, records(whole[at : at + size]))
            at += size
        assert peer.reply().error == 0
        say(peer, records(request(Mode.SIMPLE, Cmd.READ, 2 * MIB, MIB)))
        assert peer.reply(0, MIB).data == payload


BAD = {
    "too long": lambda records: records(bytes(LONGEST + 1)),
    "tampered with": lambda records: records(READ)[:-1] + b"\0",
    "of no kind": lambda records: records(READ, 99),
    "a header that announces 64 KiB": lambda _: b"\x17\3\3\xff\xff" + bytes(100),
    "in clear": lambda _: b"\x17\3\3\0\x1c" + READ,
    "no record": lambda _: READ,
    "a ClientHello": lambda records: records(b"\1\0\0\4abcd", HANDSHAKE),
    "a finished": lambda records: records(b"\x14\0\0\x20" + bytes(32), HANDSHAKE),
    "half a key update": lambda records: records(KEY_UPDATE[:3], HANDSHAKE) + records(READ),
    "a key update of another size": lambda records: records(b"\x18\0\0\2\0\0", HANDSHAKE),
    "a fatal alert": lambda records: records(b"\2\x28", ALERT),
    "empty ones without end": lambda records: b"".join(records(b"") for _ in range(100)),
    "empty of the handshake": lambda records: records(b"", HANDSHAKE),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("phase", ["haggling", "transmission"])
def test_bad_records(
    tls: TlsServers, transport: str, tmp_path: Path, what: str, phase: str
) -> None:
    """The connection ends, with an alert or without; the others do not notice."""
    with by_hand(tls.with_(), transport, tls.pki.anonymous, tmp_path) as (peer, records):
        if phase == "transmission":
            go(peer, records)
        say(peer, BAD[what](records))
        with suppress(ssl.SSLError, ConnectionError):  # it may have gone before this is said
            if what == "empty ones without end":
                say(peer, records(option(Option.LIST) if phase == "haggling" else READ))
            while peer.tls.recv(1 << 16):
                pass


def test_renegotiation_is_refused(tls: TlsServers, transport: str) -> None:
    """TLS 1.2 alone has it: a second ClientHello is answered with an alert, or the end."""
    with tls.with_().secured(transport, trusting(tls.pki.anonymous, TLS_1_2)) as peer:
        peer.info(Option.GO)
        # In clear, which is what a record with the type of a handshake cannot be any more.
        say(peer, b"\x16\3\3\0\4\1\0\0\0")
        with suppress(ssl.SSLError, ConnectionError):
            while peer.tls.recv(1 << 16):
                pass
