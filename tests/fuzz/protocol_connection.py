"""Everything that a client can say to a server, from the first byte on, in any pieces (the NBD
specification, whole), through a real socket.

The first byte of an input says how the stream is parted; the rest is the stream.

Allowed: whatever the specification has for an answer, as `protocol_handshake` and
`protocol_transmission` judge it. Here it is the same bytes however the stream is parted, the server
hangs up after it, and the next client is served. What the page cache does not have is told in other
chunks, with the same right; it has it when it is asked for again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.conformance.client import (
    Cmd,
    CmdFlag,
    Mode,
    Option,
    client_flags,
    filter_payload,
    info_data,
    meta_data,
    opening,
    option,
    request,
)
from tests.fuzz import protocol_handshake, protocol_transmission
from tests.fuzz.stand import SIZE, stand

ALLOWED = ()
MAX_LEN = 4096
SMOKE = 250
DICTIONARY = (*protocol_handshake.DICTIONARY, *protocol_transmission.DICTIONARY)
_STEPS = (1, 3, 16, 19, 100, 1000)
_NAMES = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")


def seeds() -> Iterable[bytes]:
    for number, mode in enumerate(Mode):
        said = opening(mode, contexts=_NAMES if mode is not Mode.SIMPLE else ())
        said += request(mode, Cmd.READ, 65000, 1000) + request(mode, Cmd.READ, 0, 9000)
        said += request(mode, Cmd.BLOCK_STATUS, 0, SIZE) + request(mode, Cmd.CACHE, 0, 512)
        if mode is Mode.EXTENDED:
            payload = filter_payload(SIZE, [1])
            flags = CmdFlag.PAYLOAD_LEN
            said += request(mode, Cmd.BLOCK_STATUS, 0, 12, payload=payload, flags=flags)
        yield bytes([number]) + said + request(mode, Cmd.WRITE, 0, 4, payload=b"data")
        yield bytes([number + 3]) + said + request(mode, Cmd.DISC) + b"more"
    said = client_flags(3) + option(Option.LIST) + option(Option.STARTTLS)
    said += option(Option.LIST_META_CONTEXT, meta_data("", []))
    yield b"\0" + said + option(Option.INFO, info_data("", [0, 3])) + option(Option.ABORT)
    yield b"\4" + client_flags(0) + option(Option.EXPORT_NAME) + request(Mode.SIMPLE, Cmd.DISC)
    yield b"\1" + client_flags(3) + option(Option.PEEK_EXPORT, bytes(2000)) + b"IHAVEOPT\0\0"


def one_input(data: bytes) -> None:
    step, stream = _STEPS[data[0] % len(_STEPS) if data else 0], data[1:]
    parted, whole = stand().meet(stream, step), stand().meet(stream, 0)
    if not _alike(parted, whole):
        parted, whole = stand().meet(stream, step), stand().meet(stream, 0)
    assert _alike(parted, whole)
    assert parted.startswith(b"NBDMAGICIHAVEOPT\0\3")
    assert not stand().troubles, stand().troubles


def _alike(one: bytes, other: bytes) -> bool:
    """Replies may overtake each other."""
    return Counter(one) == Counter(other)
