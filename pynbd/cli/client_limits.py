"""The options of `pynbd serve` that limit what clients may take; each is a field of `Limits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pynbd.cli.limit_options import LimitOption, with_limits
from pynbd.cli.numbers import seconds, size_in_bytes, some_bytes, whole_number
from pynbd.server.limits import Limits

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS: Sequence[LimitOption] = (
    (
        "handshake_seconds",
        "--handshake-limit",
        "SECONDS",
        seconds,
        "Time for the negotiation; 0 is no limit.",
    ),
    (
        "stall_seconds",
        "--stall-limit",
        "SECONDS",
        seconds,
        (
            "Time to take replies that wait, or to end a request that has begun; between requests a"
            " client may idle. 0 is no limit."
        ),
    ),
    (
        "per_address",
        "--max-per-address",
        "NUM",
        whole_number(0),
        "Connections from one IPv4 address, or one IPv6 network of 64 bits; 0 is any number.",
    ),
    (
        "options",
        "--max-options",
        "NUM",
        whole_number(0),
        "Options of one negotiation; 0 is any number.",
    ),
    (
        "option_bytes",
        "--max-option-bytes",
        "SIZE",
        size_in_bytes,
        "Bytes of the options of one negotiation; 0 is any number.",
    ),
    (
        "all_bytes",
        "--max-memory",
        "SIZE",
        size_in_bytes,
        "Memory for requests and replies of all clients; past it they take turns. 0 is no limit.",
    ),
    (
        "requests",
        "--max-requests",
        "NUM",
        whole_number(1),
        "Requests of one connection that are under way at a time; more wait.",
    ),
    (
        "received_bytes",
        "--max-received",
        "SIZE",
        some_bytes,
        "Of --max-memory, what requests of one connection may hold; past it none is received.",
    ),
    (
        "queued_bytes",
        "--max-queued",
        "SIZE",
        some_bytes,
        "Bytes of replies that wait for one connection before it is served no more.",
    ),
)


def limit_options(command: F) -> F:
    """The options; their values come as the keyword arguments that `limits_of` takes away."""
    return with_limits(command, _OPTIONS, Limits())


def limits_of(options: dict[str, Any]) -> Limits:
    """The limits in ``options``, which has the rest left."""
    return Limits(**{field: options.pop(field) for field, *_ in _OPTIONS})
