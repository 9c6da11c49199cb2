"""Hundreds of connections in one process, each with one read in flight.

As little of the protocol as that takes, from its sections "Newstyle negotiation"
(``NBD_OPT_EXPORT_NAME``, no zeroes after it) and "Simple reply message".
"""

from __future__ import annotations

import random
import selectors
import socket
import struct
import time
from contextlib import ExitStack

from interop.bench.servers import Address, connected

GREETING = 18
FIXED_NEWSTYLE_NO_ZEROES = 3
OPTION_MAGIC = b"IHAVEOPT"
EXPORT_NAME = 1
EXPORT_ANSWER = 10  # size and transmission flags
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC = 0x25609513
READ = 0
LENGTH = 4096
REPLY = 16 + LENGTH


def negotiated(address: Address) -> socket.socket:
    connection = connected(address)
    connection.settimeout(20)
    receive(connection, GREETING)
    connection.sendall(struct.pack(">I", FIXED_NEWSTYLE_NO_ZEROES))
    connection.sendall(OPTION_MAGIC + struct.pack(">II", EXPORT_NAME, 0))
    receive(connection, EXPORT_ANSWER)
    return connection


def receive(connection: socket.socket, length: int) -> None:
    while length:
        received = len(connection.recv(length))
        assert received, f"the end, {length} bytes too early"
        length -= received


def keep_busy(address: Address, connections: int, size: int, seconds: float) -> float:
    """Replies in a second over all of the connections."""
    chance = random.Random(0)

    def ask(connection: socket.socket) -> None:
        offset = chance.randrange(size // LENGTH) * LENGTH
        connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, READ, 0, offset, LENGTH))

    with ExitStack() as stack, selectors.DefaultSelector() as ready:
        for _ in range(connections):
            connection = stack.enter_context(negotiated(address))
            ready.register(connection, selectors.EVENT_READ, connection)
        for key in ready.get_map().values():
            ask(key.data)
        replies = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for key, _ in ready.select(20):
                receive(key.data, REPLY)
                ask(key.data)
                replies += 1
        return replies / (time.perf_counter() - start)
