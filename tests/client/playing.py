"""A server that a test plays itself, on a socket of its own, in a thread.

It follows the specification only as far as the test wants. Nothing here knows pynbd.
"""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = range(8, 12)
ACK, SERVER, REP_INFO, META_CONTEXT = range(1, 5)
ERR_UNSUP = 0x80000001
HAS_FLAGS, READ_ONLY, FLUSH, FUA = 1, 2, 4, 8
TRIM, ZEROES, MULTI_CONN, CACHE, FAST_ZERO, PAYLOAD = 32, 64, 1 << 8, 1 << 10, 1 << 11, 1 << 12
REQUEST, EXTENDED_REQUEST = struct.Struct(">IHHQQI"), struct.Struct(">IHHQQQ")

Play = Callable[[socket.socket], None]


@contextmanager
def playing(play: Play) -> Iterator[str]:
    """The URI of a server that does ``play`` with its one client, and then closes."""

    def run() -> None:
        sock, _ = listener.accept()
        with sock, suppress(ConnectionError):
            sock.settimeout(20)
            play(sock)

    with (
        tempfile.TemporaryDirectory(prefix="pynbd-played-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.settimeout(20)
        listener.bind(f"{folder}/s")
        listener.listen()
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"nbd+unix:///x?socket={folder}/s"
        finally:
            thread.join(20)
            assert not thread.is_alive()


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data


def until_closed(sock: socket.socket) -> bytes:
    """All that the client still says."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def negotiate(
    sock: socket.socket,
    *,
    grants: tuple[int, ...] = (),
    size: int = 1 << 20,
    flags: int = HAS_FLAGS,
    block_size: tuple[int, int, int] | None = None,
    contexts: tuple[bytes, ...] = (),
) -> None:
    """Answer options until GO; ``grants``: the options that succeed beside it."""
    sock.sendall(b"NBDMAGICIHAVEOPT\0\3")
    receive(sock, 4)
    option = 0
    while option != GO:
        option, length = struct.unpack(">8xII", receive(sock, 16))
        receive(sock, length)
        said = b""
        if option == GO:
            said = reply(GO, REP_INFO, struct.pack(">HQH", 0, size, flags))
            if block_size:
                said += reply(GO, REP_INFO, struct.pack(">HIII", 3, *block_size))
        elif option == SET_META:
            for id_, name in enumerate(contexts):
                said += reply(SET_META, META_CONTEXT, struct.pack(">I", id_) + name)
        elif option not in grants:
            sock.sendall(reply(option, ERR_UNSUP))
            continue
        sock.sendall(said + reply(option, ACK))
