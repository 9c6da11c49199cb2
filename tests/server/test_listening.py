"""Listening: addresses, ports, unix sockets and the files that they leave behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pynbd.errors import PynbdError, UsageError
from pynbd.protocol.uri import NbdUri
from pynbd.server import listening
from pynbd.server.listening import Listening, SocketFile, listen_tcp, listen_unix
from tests.server.session import open_files


def test_a_free_port() -> None:
    sockets = listen_tcp("localhost", 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    assert sockets[0].getsockname()[1] > 0
    for sock in sockets:
        sock.close()


def test_a_taken_port() -> None:
    before = open_files()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="in use") as caught:
            listen_tcp("127.0.0.1", taken.getsockname()[1])
        assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError):  # noqa: PT011
        listen_tcp("name.invalid", 0)
    assert open_files() == before


def test_addresses_that_are_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with two lines for localhost in /etc/hosts."""
    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: lookup(*a, **k) * 2)
    sockets = listen_tcp("localhost", 0)
    assert len(sockets) == len({sock.family for sock in sockets})
    for sock in sockets:
        sock.close()


def test_a_free_port_that_is_taken_at_the_other_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is looked for. The machine lends us a second address of its loopback net."""
    lookup = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *a, **k: lookup("127.0.0.1", *a[1:], **k) + lookup("127.0.0.2", *a[1:], **k),
    )
    listen_at = listening._listen_at
    taken: list[socket.socket] = []

    def taking(family: int, address: tuple[Any, ...]) -> socket.socket:
        sock = listen_at(family, address)
        if len(taken) < 3 and address[0] == "127.0.0.1":
            taken.append(socket.create_server(("127.0.0.2", sock.getsockname()[1])))
        return sock

    monkeypatch.setattr(listening, "_listen_at", taking)
    before = open_files()
    sockets = listen_tcp("localhost", 0)
    assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1", "127.0.0.2"]
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    assert len(taken) == 3
    for sock in sockets + taken:
        sock.close()
    assert open_files() == before


@pytest.fixture
def short(tmp_path: Path) -> Iterator[str]:
    """A path that fits into the address of a unix socket."""
    folder = os.open(tmp_path, os.O_PATH)
    yield f"/proc/self/fd/{folder}/socket"
    os.close(folder)


def test_a_stale_socket_is_replaced(short: str) -> None:
    listen_unix(short).close()
    listener = listen_unix(short)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(short)
    listener.close()


def test_a_live_socket_is_not_replaced(short: str) -> None:
    listener = listen_unix(short)
    before = open_files()
    with pytest.raises(OSError, match="in use"):
        listen_unix(short)
    assert open_files() == before
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(short)
    listener.close()


def test_a_live_socket_whose_backlog_is_full(short: str) -> None:
    """It is told at once."""
    with ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(short)
        listener.listen(0)
        while True:
            client = open_sockets.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(short) == errno.EAGAIN:
                break
        with pytest.raises(OSError, match="in use"):
            listen_unix(short)
        assert stat.S_ISSOCK(os.stat(short).st_mode)


def test_a_socket_file_is_removed_once(short: str) -> None:
    """Not the one that another server has put in its place."""
    with listen_unix(short):
        file = SocketFile(short)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(f"{short}2")
        os.rename(f"{short}2", short)
        file.remove()
        assert stat.S_ISSOCK(os.stat(short).st_mode)
        SocketFile(short).remove()
    assert not os.path.exists(short)
    file.remove()


def test_a_file_is_not_replaced(short: str) -> None:
    with open(short, "x") as file:
        file.write("precious")
    with pytest.raises(OSError, match="not a socket"):
        listen_unix(short)
    with open(short) as file:
        assert file.read() == "precious"


# Where clients find it ---------------------------------------------------------------------------


def test_a_private_socket_goes_with_its_folder() -> None:
    private = Listening.private()
    path = Path(private.where.socket)
    assert NbdUri.parse(str(private.where)).socket == str(path)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    private.close()
    assert not path.parent.exists()


def test_a_unix_socket_is_told_by_its_whole_path(
    short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(os.path.dirname(short))
    unix = Listening.unix("socket")
    assert os.path.isabs(unix.where.socket)
    assert os.path.samefile(unix.where.socket, short)
    monkeypatch.chdir("/")
    unix.close()
    assert not os.path.lexists(short)


def test_tcp_tells_the_port_that_it_got() -> None:
    tcp = Listening.tcp("127.0.0.1", 0)
    assert tcp.where == NbdUri(host="127.0.0.1", port=tcp.sockets[0].getsockname()[1])
    with pytest.raises(PynbdError, match=rf"127.0.0.1, port {tcp.where.port}: .*in use"):
        Listening.tcp("127.0.0.1", tcp.where.port)
    tcp.close()


def test_given_sockets_tell_where_they_are(short: str) -> None:
    with listen_unix(short) as sock:
        assert Listening.given([sock]).where.socket == short
    with socket.create_server(("127.0.0.1", 0)) as sock:
        where = Listening.given([sock]).where
        assert (where.host, where.port) == sock.getsockname()
    assert os.path.exists(short)


@pytest.mark.parametrize("path", ["", "x" * 108])
def test_a_path_that_no_socket_can_have(path: str) -> None:
    with pytest.raises(UsageError, match="1 to 107"):
        Listening.unix(path)


@pytest.mark.parametrize("path", ["a\0b", "\0abstract"])
def test_a_path_with_a_nul(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would take what is before it."""
    monkeypatch.chdir(tmp_path)
    before = open_files()
    with pytest.raises(UsageError, match="socket: the path has a NUL"):
        Listening.unix(path)
    assert open_files() == before
    assert not list(tmp_path.iterdir())


def test_nowhere_to_put_a_private_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(PynbdError, match="cannot listen on a private socket: No such file"):
        Listening.private()


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_there_is_not(port: int) -> None:
    with pytest.raises(UsageError, match=f"the port {port} is not a number from 0 to 65535"):
        Listening.tcp("127.0.0.1", port)
