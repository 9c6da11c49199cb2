"""What clients may take of a server, all in one place. docs/design.md, "Limits", says why so much.

Clients at a time are no limit of this kind: an export that admits one only is another export, and
says so (NBD_FLAG_CAN_MULTI_CONN).
"""

from __future__ import annotations

from dataclasses import dataclass

from pynbd.block.limits import check_numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server allows its clients; ``Limits()`` is what it allows if nothing is said.

    Times are seconds and may be fractions, sizes are bytes. 0 is no limit, except for what one
    connection may have under way (the last three): there it is 1 or more. Raises `UsageError`.
    """

    handshake_seconds: float = 10.0
    """For the whole negotiation, as in qemu-nbd: who idles there holds a place."""

    stall_seconds: float = 600.0
    """For a client to take something of replies that wait for it, or to bring a request that it has
    begun to its end, at a rate that is worth the name (`pynbd.server.stalls`). Between requests it
    may be silent for ever."""

    per_address: int = 1024
    """Connections from one IPv4 address or one IPv6 network of 64 bits. Unix sockets have none."""

    options: int = 4096
    """Of one negotiation."""

    option_bytes: int = 256 << 20
    """Of one negotiation: eight options of the longest kind."""

    all_bytes: int = 512 << 20
    """Of memory that requests and replies of all connections hold (`pynbd.server.shares`)."""

    requests: int = 256
    """Of one connection, under way at a time."""

    received_bytes: int = 128 << 20
    """Of one connection: what its requests under way hold in memory."""

    queued_bytes: int = 64 << 20
    """Of one connection: replies that it has not taken."""

    def __post_init__(self) -> None:
        check_numbers(self, at_least_one=("requests", "received_bytes", "queued_bytes"))
