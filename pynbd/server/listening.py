"""Where a server listens: TCP addresses, unix sockets, and the URI that leads there."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pynbd.errors import PynbdError, UsageError
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.protocol.values import DEFAULT_PORT

# Who comes while so many wait is turned away by a unix socket at once, and by TCP made to wait for
# seconds: a crowd that comes all at once, such as a thousand that connect again after a restart,
# has room. The kernel may give less (net.core.somaxconn).
BACKLOG = 1024
_NO_SUCH_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
# How often a free port is looked for that is free at every address.
_PORT_TRIES = 16
# Bytes of the path of a unix socket: sun_path with its final NUL has 108 (unix(7)).
MAX_SOCKET_PATH = 107

_Address = tuple[int, tuple[Any, ...]]


class Listening:
    """Listening sockets, all of which lead to the same server.

    ``where`` is the URI of its default export. Who makes one calls `close` in the end.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        where: NbdUri,
        remove: Callable[[], object] = lambda: None,
    ) -> None:
        self.sockets = sockets
        self.where = where
        self._remove = remove

    @classmethod
    def tcp(cls, host: str = "localhost", port: int = DEFAULT_PORT) -> Listening:
        """On every address of ``host``; port 0 takes a free one. Raises `PynbdError`."""
        if not 0 <= port <= 65535:
            raise UsageError(f"the port {port} is not a number from 0 to 65535")
        try:
            sockets = listen_tcp(host, port)
        except UnicodeError:
            raise UsageError(f"{host!r} is neither an address nor the name of a host") from None
        except OSError as error:
            raise _cannot(f"{host}, {f'port {port}' if port else 'any port'}", error) from None
        return cls(sockets, NbdUri(host=host, port=sockets[0].getsockname()[1]))

    @classmethod
    def unix(cls, path: str | os.PathLike[str]) -> Listening:
        """On a unix socket, whose file goes with it. Raises `PynbdError`."""
        path = os.fspath(path)
        check_socket_path("socket", path)
        try:
            sock = listen_unix(path)
        except OSError as error:
            raise _cannot(path, error) from None
        whole = os.path.abspath(path)  # which may be longer than the path of a socket
        where = NbdUri(transport=Transport.UNIX, socket=whole)
        return cls([sock], where, SocketFile(whole).remove)

    @classmethod
    def private(cls) -> Listening:
        """On a unix socket in a folder that nobody else may enter, and that goes with it."""
        try:
            folder = tempfile.mkdtemp(prefix="pynbd-")
        except OSError as error:
            raise _cannot("a private socket", error) from None
        try:
            listening = cls.unix(os.path.join(folder, "socket"))
        except BaseException:
            shutil.rmtree(folder)
            raise
        listening._remove = lambda: shutil.rmtree(folder, ignore_errors=True)
        return listening

    @classmethod
    def given(cls, sockets: Sequence[socket.socket]) -> Listening:
        """On sockets that somebody else has opened, and that stay when it ends."""
        address = sockets[0].getsockname()
        if sockets[0].family == socket.AF_UNIX:
            return cls(sockets, NbdUri(transport=Transport.UNIX, socket=os.fsdecode(address)))
        return cls(sockets, NbdUri(host=address[0], port=address[1]))

    def remove(self) -> None:
        """Remove the files that were made for it."""
        self._remove()

    def close(self) -> None:
        """Close the sockets and remove their files."""
        for sock in self.sockets:
            sock.close()
        self.remove()


def check_socket_path(what: str, path: str) -> None:
    """Raise `UsageError` for what cannot be the path of a unix socket; ``what`` begins the line."""
    length = len(os.fsencode(path))
    if not 0 < length <= MAX_SOCKET_PATH:
        raise UsageError(f"{what}: the path has {length} bytes; 1 to {MAX_SOCKET_PATH} are allowed")
    if "\0" in path:
        raise UsageError(f"{what}: the path has a NUL; names without a file are not made")


def _cannot(where: str, error: OSError) -> PynbdError:
    return PynbdError(f"cannot listen on {where}: {error.strerror}")


def listen_tcp(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of ``host``, all on one port; port 0 takes a free one.

    An address that this machine does not have (IPv6 switched off, say) is left out, if another is
    left. Raises `OSError`.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # An address may be there twice, by two lines of /etc/hosts.
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(0 if port else _PORT_TRIES - 1):
        try:
            return _listen_everywhere(addresses, 0)
        except OSError as error:
            # What is free at the first address may be taken at another.
            if error.errno != errno.EADDRINUSE:
                raise
    return _listen_everywhere(addresses, port)


def _listen_everywhere(addresses: Sequence[_Address], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, address in addresses:
            try:
                sock = _listen_at(family, (address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS:
                    raise
                absent = error
            else:
                sockets.append(sock)
                port = sock.getsockname()[1]
        if absent and not sockets:
            raise absent
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listen_at(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(path: str) -> socket.socket:
    """A listening unix socket. A socket that nobody listens on any more is replaced; whatever else
    is there stays. Raises `OSError`.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "it exists and is not a socket") from None
            if not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # one whose backlog is full lives: EAGAIN
        return probe.connect_ex(path) == errno.ECONNREFUSED


class SocketFile:
    """The file of a unix socket that was bound just now, for who has to remove it in the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = self._found()

    def remove(self) -> None:
        """Remove it, unless it has gone, or another server has put its own in its place."""
        with suppress(FileNotFoundError):
            if self._found() == self._identity:
                os.unlink(self._path)
        self._identity = None  # the next file may well get the number of this one

    def _found(self) -> tuple[int, int]:
        status = os.lstat(self._path)
        return status.st_dev, status.st_ino
