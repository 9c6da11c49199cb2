"""How many connections a server has at a time, and where from.

1. Past the limit of clients, others wait in the backlog. Past the limit of one address, a
   connection from there is closed at once: to see where it comes from, it has to be accepted.
2. The last descriptors of the process are kept, for whatever else has to be opened, and so that a
   connection can be accepted and refused: who comes then waits in the backlog, too.
3. An IPv6 address stands for its network of 64 bits, all of which one machine may have.
"""

from __future__ import annotations

import resource
import socket
from collections import Counter
from ipaddress import IPv6Address
from typing import Any

# Descriptors that are kept, but never more than a quarter of all.
RESERVE = 64


def origin(sock: socket.socket, address: Any) -> str | None:
    """Where a connection comes from, as far as it is counted; None: it is not (unix sockets)."""
    if sock.family == socket.AF_INET:
        return str(address[0])
    if sock.family == socket.AF_INET6:
        whole = IPv6Address(address[0].partition("%")[0])
        if whole.ipv4_mapped:
            return str(whole.ipv4_mapped)
        return f"{IPv6Address(int(whole) >> 64 << 64)}/64"
    return None


class Places:
    """Those of one server: ``most`` at a time, and ``per_address``; 0 is any number."""

    def __init__(self, most: int, per_address: int) -> None:
        self._most = most
        self._per_address = per_address
        self._taken = 0
        self._by_origin: Counter[str] = Counter()
        self._room = 0  # how many there were when descriptors became scarce; 0: they are not

    @property
    def full(self) -> bool:
        """Whether the next one has to wait."""
        if self._taken < self._room:
            self._room = 0  # one has left
        return 0 < self._most <= self._taken or 0 < self._room <= self._taken

    def allows(self, where: str | None) -> bool:
        """Whether one more may come from there."""
        return not where or not 0 < self._per_address <= self._by_origin[where]

    def take(self, sock: socket.socket, where: str | None) -> bool:
        """Count one. False: it is one of the last for which there are descriptors."""
        self._taken += 1
        if where:
            self._by_origin[where] += 1
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most == resource.RLIM_INFINITY or sock.fileno() < most - min(RESERVE, most // 4):
            return True
        self._room = self._taken
        return False

    def leave(self, where: str | None) -> None:
        """One of them has ended."""
        self._taken -= 1
        if where:
            self._by_origin[where] -= 1
            if not self._by_origin[where]:
                del self._by_origin[where]
