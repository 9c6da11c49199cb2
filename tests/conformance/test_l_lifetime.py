"""L: how a server begins, how many it serves, and how it ends."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pynbd.server.listening import listen_tcp
from tests.conformance.asking import each_mode, is_refusal, still_serves
from tests.conformance.client import (
    Cmd,
    Errno,
    Mode,
    Option,
    Peer,
    client_flags,
    info_data,
    opening,
    option,
)
from tests.conformance.local import Held, held_node, holding, serving
from tests.conformance.rows import row
from tests.conformance.running import ROOT
from tests.conformance.server import pattern

SIZE = 1 << 20
START = 30.0
GRACE = 2.0
"""Seconds that requests under way have when the server ends."""


class Serve:
    """``pynbd serve`` as a process. ``uri`` is its first line, None under socket activation."""

    def __init__(self, folder: Path, loop: str, *options: str, listener: int | None = None) -> None:
        image = folder / "disk.img"
        if not image.exists():
            image.write_bytes(pattern(0, SIZE))
        self.socket = folder / "socket"
        arguments = [sys.executable, "-m", "pynbd", "serve", "--loop", loop, "-f", "raw", *options]
        if listener is not None:
            # The shell becomes the server, which therefore has the process number of LISTEN_PID.
            become = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
            arguments = ["sh", "-c", become, "sh", *arguments]
        self.process = subprocess.Popen(
            [*arguments, os.fspath(image)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=listener,
        )
        assert self.process.stdout is not None
        self.uri = self.process.stdout.readline() if listener is None else None

    def enter(self, mode: Mode = Mode.SIMPLE) -> Peer:
        peer = Peer(self.socket)
        peer.negotiate(mode)
        return peer

    def ended(self, *, within: float = 1.0) -> bool:
        """Whether it ends, with status 0 and nothing said."""
        try:
            output, errors = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            return False
        assert (self.process.returncode, output, errors) == (0, "", "")
        return True

    def end(self) -> None:
        """End it in good order, if it has not been seen to end."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            if not self.ended(within=GRACE + 1):
                self.process.kill()
                self.process.communicate()
                raise AssertionError("SIGTERM did not end it")


StartServe = Callable[..., Serve]


@pytest.fixture
def serve(tmp_path: Path, loop: str) -> Iterator[StartServe]:
    """Starts ``pynbd serve``, on a unix socket unless told otherwise."""
    started: list[Serve] = []

    def start(*options: str, listener: int | None = None, unix: bool = True) -> Serve:
        where = ("-k", str(tmp_path / "socket")) if unix and listener is None else ()
        started.append(Serve(tmp_path, loop, *where, *options, listener=listener))
        return started[-1]

    with ExitStack() as cleanup:
        cleanup.callback(lambda: [cleanup.callback(one.end) for one in started])
        yield start


@pytest.fixture
def held(tmp_path: Path, loop: str) -> Iterator[Held]:
    with holding(loop, tmp_path, SIZE) as held:
        yield held


# The end --------------------------------------------------------------------------------------


@row("L1", "L2")
@each_mode
def test_requests_under_way_are_answered(held: Held, mode: Mode) -> None:
    """What is under way is waited for, what comes now is refused, and then the server closes."""
    local, file = held.local, held.file
    with held.enter(mode) as peer, held.enter(mode) as idle:
        file.released.clear()
        under_way = peer.request(Cmd.FLUSH)
        assert file.entered.acquire(timeout=2)
        local.call(local.server.stop)
        idle.expect_disconnect()
        for command in (Cmd.READ, Cmd.FLUSH, Cmd.TRIM, 99):
            cookie = peer.request(command, 0, 512)
            late = peer.reply()
            assert late.cookie == cookie
            is_refusal(mode, late, Errno.ESHUTDOWN, 0)
        flags = 0x20 if mode is Mode.EXTENDED else 0
        cookie = peer.request(Cmd.WRITE, 0, flags=flags, payload=bytes(512))
        late = peer.reply()
        assert (late.cookie, late.error) == (cookie, Errno.ESHUTDOWN)
        file.released.set()
        reply = peer.reply()
        assert (reply.cookie, reply.error) == (under_way, 0)
        peer.expect_disconnect()
    assert "write" not in file.events


@row("L1")
def test_requests_that_take_too_long_are_dropped(held: Held) -> None:
    local, file = held.local, held.file
    with held.enter(Mode.STRUCTURED) as peer:
        file.released.clear()
        peer.request(Cmd.FLUSH)
        assert file.entered.acquire(timeout=2)
        began = time.monotonic()
        local.call(local.server.stop)
        peer.sock.settimeout(GRACE + 2)
        peer.expect_disconnect()
        assert time.monotonic() - began >= GRACE * 0.9
        file.released.set()


@row("L1")
@pytest.mark.parametrize(
    "number, mode",
    [
        (signal.SIGTERM, Mode.SIMPLE),
        (signal.SIGINT, Mode.STRUCTURED),
        (signal.SIGQUIT, Mode.EXTENDED),
    ],
)
def test_signal(serve: StartServe, number: signal.Signals, mode: Mode) -> None:
    """All that was asked for before it is answered, at the pace of the client."""
    server = serve()
    reply_size = {Mode.SIMPLE: 16, Mode.STRUCTURED: 20 + 8, Mode.EXTENDED: 32 + 8}[mode] + SIZE
    with server.enter(mode) as peer:
        for _ in range(8):
            peer.request(Cmd.READ, 0, SIZE)
        peer.wait_taken()
        peer.read(100)
        server.process.send_signal(number)
        assert len(peer.read_to_end()) >= 8 * reply_size - 100
        assert server.ended()
    assert not server.socket.exists()


@row("L1")
def test_second_signal(serve: StartServe) -> None:
    """Nobody is waited for any more; signals that come within a second are one."""
    server = serve()
    with server.enter() as peer:
        for _ in range(8):
            peer.request(Cmd.READ, 0, SIZE)
        peer.wait_taken()
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert not server.ended(within=1.1)  # the client has not taken its replies
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(within=0.5)


@row("L3")
def test_end_while_clients_negotiate(serve: StartServe) -> None:
    """Nobody who has not come to transmission is waited for."""
    server = serve()
    begun = option(Option.GO, info_data(""))[:-3]
    with ExitStack() as clients:
        silent = [clients.enter_context(Peer(server.socket)) for _ in range(8)]
        half_way = [clients.enter_context(Peer(server.socket)) for _ in range(8)]
        for peer in half_way:
            peer.send(client_flags() + begun)
        for peer in silent + half_way:
            peer.read_greeting()
        server.process.send_signal(signal.SIGTERM)
        for peer in silent + half_way:
            peer.expect_disconnect()
        assert server.ended()


@row("L7")
def test_export_is_there_until_the_server_ends(held: Held) -> None:
    """Then its clients are dropped, and no new ones are accepted."""
    with held.enter(Mode.STRUCTURED) as one, held.enter(Mode.EXTENDED) as other:
        still_serves(one)
        still_serves(other)
        held.local.call(held.local.server.stop)
        one.expect_disconnect()
        other.expect_disconnect()
    with socket.socket(socket.AF_UNIX) as late:
        assert late.connect_ex(held.local.socket) == errno.ECONNREFUSED


# How many -------------------------------------------------------------------------------------


@row("L4")
@pytest.mark.parametrize("limit", [1, 3])
def test_more_clients_than_places(serve: StartServe, limit: int) -> None:
    """They wait, unanswered, and are served as soon as somebody leaves."""
    server = serve("-e", str(limit))
    with ExitStack() as clients:
        served = [clients.enter_context(server.enter()) for _ in range(limit)]
        waiting = [clients.enter_context(Peer(server.socket)) for _ in range(2)]
        for peer in waiting:
            peer.expect_silence()
        for peer in served:
            still_serves(peer)
        served[0].disconnect()
        waiting[0].negotiate()
        still_serves(waiting[0])
        waiting[1].expect_silence()
        waiting[0].sock.close()
        waiting[1].negotiate()
        still_serves(waiting[1])


@row("L4")
def test_client_that_negotiates_takes_a_place(serve: StartServe) -> None:
    """Until the handshake limit ends it."""
    server = serve("-e", "1", "--handshake-limit", "0.3")
    with Peer(server.socket) as idle, Peer(server.socket) as next_one:
        idle.read_greeting()
        idle.expect_disconnect()
        next_one.negotiate()
        still_serves(next_one)


@row("L5")
def test_served_by_hand_it_stays(serve: StartServe) -> None:
    server = serve()
    for _ in range(3):
        with server.enter() as peer:
            still_serves(peer)
            peer.disconnect()
    assert not server.ended(within=0.2)


# Socket activation ----------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.listen()
        yield sock


@row("L6")
@each_mode
def test_socket_activation(serve: StartServe, listener: socket.socket, mode: Mode) -> None:
    server = serve(listener=listener.fileno())
    with server.enter(mode) as peer:
        still_serves(peer)
        peer.disconnect()
    assert server.ended()  # with nothing printed, as that would be in the way of somebody's output


@row("L5")
def test_activated_it_ends_with_the_last_client(serve: StartServe, listener: socket.socket) -> None:
    server = serve(listener=listener.fileno())
    with server.enter() as one, server.enter() as other:
        one.disconnect()
        assert not server.ended(within=0.2)
        still_serves(other)
    assert server.ended()


@row("L5")
def test_a_probe_of_the_port_is_no_client(serve: StartServe, listener: socket.socket) -> None:
    server = serve(listener=listener.fileno())
    for _ in range(3):
        with Peer(server.socket) as probe:
            probe.read_greeting()
    with Peer(server.socket) as curious:
        curious.greet()
        assert curious.listing() == {"": ""}
        assert curious.option(Option.ABORT)
        curious.expect_disconnect()
    assert not server.ended(within=0.2)
    with server.enter() as peer:
        still_serves(peer)
    assert server.ended()


# TCP ------------------------------------------------------------------------------------------


@row("L8")
def test_tcp_nodelay(tmp_path: Path, loop: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(pattern(0, SIZE))
    (listener,) = listen_tcp("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with (
        serving(loop, listener, {"": held_node(image, [])}),
        socket.create_connection(("127.0.0.1", port), timeout=2) as sock,
    ):
        assert sock.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\x00\x03"
        with _other_end(sock) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        sock.sendall(opening(Mode.SIMPLE))
        assert sock.recv(20 + 14, socket.MSG_WAITALL)


def _other_end(sock: socket.socket) -> socket.socket:
    """The socket that the server in this process has accepted."""
    for name in os.listdir("/proc/self/fd"):
        # It may be closed meanwhile, not a socket, or not connected.
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as found:
            if found.getpeername() == sock.getsockname():
                return found.dup()
    raise AssertionError("there is no such socket in this process")


@row("L8")
def test_first_line_is_where_it_listens(serve: StartServe) -> None:
    """On localhost, on the free port that it has taken."""
    server = serve("-p", "0", unix=False)
    assert server.uri is not None
    match = re.fullmatch(r"nbd://localhost:(\d+)/?\n", server.uri)
    assert match, server.uri
    with socket.create_connection(("localhost", int(match[1])), timeout=2) as sock:
        assert sock.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\x00\x03"
