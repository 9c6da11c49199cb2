"""What the trace makes of the bytes that pass in both directions, whatever they are ("Newstyle
negotiation" and "Transmission" of the NBD specification).

An input is a list of pieces: a byte of which bit 0 is the direction and bit 1 whether they are
unseen (the data of a file), a byte that tells how many bytes, and these.

Allowed: nothing, as the trace must not end the connection it listens to; and it never has to give
up for a defect of its own. What it tells is one line, a JSON value, bounded, and the same however
the bytes were parted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from pynbd.protocol.trace import Tracer
from pynbd.protocol.traced import Direction, Traced
from tests.conformance.client import (
    OPTION_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Mode,
    Option,
    Rep,
    filter_payload,
    opening,
    request,
)
from tests.fuzz.speaking import chunk, error_payload, option_reply, simple_reply, status
from tests.fuzz.taking import Taking

ALLOWED = ()
MAX_LEN = 8192
DICTIONARY = (
    *(b"IHAVEOPT", b"NBDMAGIC", OPTION_REPLY_MAGIC.to_bytes(8, "big")),
    *(bytes.fromhex(magic) for magic in ("25609513", "21e41c71", "67446698", "668e33ef")),
    bytes.fromhex("6e8a278c"),
)
# A name of 4096 bytes that are no UTF-8, escaped for JSON as backslashes, and all the rest.
_LONGEST_TOLD = 64 << 10
_SERVER, _CLIENT, _UNSEEN = 0, 1, 2


def seeds() -> Iterable[bytes]:
    for mode in Mode:
        yield b"".join(_parted(_SERVER, _hello(mode), 250) + _parted(_CLIENT, _answer(mode), 160))
        yield b"".join(_parted(_SERVER, _hello(mode), 3) + _parted(_CLIENT, _answer(mode), 5))
    greeting = b"NBDMAGICIHAVEOPT\0\3"
    by_name = opening(Mode.SIMPLE)[:4] + b"IHAVEOPT" + bytes([0, 0, 0, 1, 0, 0, 0, 4]) + b"disk"
    yield b"".join(_parted(_SERVER, by_name, 250) + _parted(_CLIENT, greeting + bytes(10), 250))
    read = opening(Mode.SIMPLE)[:4] + request(Mode.SIMPLE, Cmd.READ, 0, 64 << 16)
    replies = simple_reply(1)
    pieces = _parted(_SERVER, read, 250) + _parted(_CLIENT, greeting + replies, 250)
    yield b"".join([*pieces, bytes([_CLIENT | _UNSEEN, 64])])


def _hello(mode: Mode) -> bytes:
    said = opening(mode, "disk", ["base:allocation"] if mode is not Mode.SIMPLE else [])
    said += request(mode, Cmd.READ, 0, 16, cookie=1)
    said += request(mode, Cmd.WRITE, 0, 8, cookie=2, payload=bytes(8), flags=CmdFlag.FUA)
    if mode is Mode.EXTENDED:
        payload = filter_payload(1 << 20, [0])
        flags = CmdFlag.PAYLOAD_LEN
        said += request(mode, Cmd.BLOCK_STATUS, 0, 12, cookie=3, payload=payload, flags=flags)
    return said + request(mode, Cmd.BLOCK_STATUS, 0, 512, cookie=4) + request(mode, Cmd.DISC)


def _answer(mode: Mode) -> bytes:
    said = b"NBDMAGICIHAVEOPT\0\3"
    if mode is Mode.SIMPLE:
        said += option_reply(Option.GO, Rep.INFO, bytes(10) + b"\0\3")
        said += option_reply(Option.GO, Rep.ACK)
        return said + simple_reply(1) + bytes(16) + simple_reply(2, error=28) + simple_reply(4)
    dialect = Option.EXTENDED_HEADERS if mode is Mode.EXTENDED else Option.STRUCTURED_REPLY
    said += option_reply(dialect, Rep.ACK)
    said += option_reply(Option.SET_META_CONTEXT, Rep.META_CONTEXT, b"\0\0\0\0base:allocation")
    said += option_reply(Option.SET_META_CONTEXT, Rep.ACK)
    said += option_reply(Option.GO, Rep.ERR_UNKNOWN, b"no\n\xff")
    said += chunk(mode, 0, Chunk.OFFSET_DATA, 1, bytes(8) + b"0123456789ab")
    said += chunk(mode, 1, Chunk.OFFSET_HOLE, 1, bytes(7) + b"\x0c\0\0\0\4")
    said += chunk(mode, 1, Chunk.NONE, 2)
    said += status(mode, 1, 3, 0, [(512, 0), (512, 3)] * 4)
    return said + chunk(mode, 1, Chunk.ERROR_OFFSET, 4, error_payload(5, "bad", at=7))


def _parted(direction: int, said: bytes, size: int) -> list[bytes]:
    pieces = (said[at : at + size] for at in range(0, len(said), size))
    return [bytes([direction, len(piece)]) + piece for piece in pieces]


def _pieces(data: bytes) -> Iterator[tuple[Direction, bytes | int]]:
    taking = Taking(data)
    while taking:
        head = taking.number(1)
        direction = Direction.TO_CLIENT if head & _CLIENT else Direction.TO_SERVER
        length = taking.number(1)
        yield direction, length << 16 if head & _UNSEEN else taking.bytes(length)


def _told(pieces: Iterable[tuple[Direction, bytes | int]]) -> list[Traced]:
    told: list[Traced] = []
    tracer = Tracer(told.append)
    for direction, piece in pieces:
        if isinstance(piece, int):
            tracer.skipped(direction, piece)
        else:
            tracer.passed(direction, piece)
    return told


def one_input(data: bytes) -> None:
    pieces = list(_pieces(data))
    told = _told(pieces)
    for one in told:
        line, record = str(one), json.dumps(one.record("a client"))
        assert len(line.splitlines()) == 1
        assert len(line) + len(record) < _LONGEST_TOLD
        reason = str(one.fields.get("reason", ""))
        assert not reason.endswith(")"), f"a defect of the trace: {reason}"
    singly = (
        (direction, piece[at : at + 1])
        for direction, piece in pieces
        if isinstance(piece, bytes)
        for at in range(len(piece))
    )
    if not any(isinstance(piece, int) for _, piece in pieces):
        assert list(map(str, _told(singly))) == list(map(str, told))
