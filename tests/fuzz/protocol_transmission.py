"""What a client says in transmission, in the three dialects ("Request message", "Request types",
"Command flags" of the NBD specification), to a real server.

An input: the dialect, the export, the metadata contexts, how the stream is parted, and the stream.
Its requests get cookies of our own, so that each reply is somebody's.

Allowed: a hard disconnect for a header with another magic number, and for a payload that is too
long; nothing is said after it. Until then every request that is complete has one reply, which is
held against the specification: its error is one that the request deserves, what it reads is there
once, its status covers what it may. Nobody else notices: another client of the export reads the
same as before, save what was written.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.conformance.client import (
    COMPACT_REQUEST_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    Cmd,
    CmdFlag,
    Errno,
    Mode,
    Reply,
    ReplyChunk,
    assemble,
    filter_payload,
    request,
)
from tests.fuzz.stand import EXPORTS, SIZE, stand
from tests.fuzz.taking import Taking

ALLOWED = ()
MAX_LEN = 1 << 16
SMOKE = 250
DICTIONARY = (
    *(struct.pack(">I", magic) for magic in (COMPACT_REQUEST_MAGIC, EXTENDED_REQUEST_MAGIC)),
    *(struct.pack(">HH", flag, command) for command in Cmd for flag in (0, *CmdFlag)),
    *(struct.pack(">I", number) for number in (SIZE, SIZE - 512, MAX_PAYLOAD, MAX_PAYLOAD + 1)),
)
_MODES = list(Mode)
_STEPS = (0, 1, 13, 28, 100, 4096)
_WRITES = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
_FLAGS = {
    Cmd.READ: CmdFlag.FUA | CmdFlag.DF,
    Cmd.WRITE: CmdFlag.FUA | CmdFlag.PAYLOAD_LEN,
    Cmd.FLUSH: CmdFlag.FUA,
    Cmd.TRIM: CmdFlag.FUA,
    Cmd.CACHE: CmdFlag.FUA,
    Cmd.WRITE_ZEROES: CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.FUA | CmdFlag.REQ_ONE | CmdFlag.PAYLOAD_LEN,
}


def seeds() -> Iterable[bytes]:
    for number, mode in enumerate(_MODES):
        for export in range(EXPORTS):
            for step in (0, 2):
                yield bytes([number, export, 7, step]) + b"".join(_requests(mode))
    ahead = request(Mode.SIMPLE, Cmd.WRITE, 0, MAX_PAYLOAD + 1)
    yield bytes([0, 0, 0, 0]) + request(Mode.SIMPLE, Cmd.READ, 0, 4096) + ahead
    yield bytes([2, 1, 3, 3]) + request(Mode.EXTENDED, Cmd.WRITE, 0, 200_000, flags=32) + bytes(99)


def _requests(mode: Mode) -> Iterator[bytes]:
    payload = CmdFlag.PAYLOAD_LEN if mode is Mode.EXTENDED else CmdFlag(0)
    yield request(mode, Cmd.READ, 100, 200)
    yield request(mode, Cmd.READ, 0, SIZE)
    yield request(mode, Cmd.WRITE, 70_000, 512, payload=b"w" * 512, flags=payload)
    yield request(mode, Cmd.WRITE, 4096, 64, payload=b"W" * 64, flags=payload | CmdFlag.FUA)
    yield request(mode, Cmd.WRITE_ZEROES, 131_072, 65536, flags=CmdFlag.NO_HOLE)
    yield request(mode, Cmd.WRITE_ZEROES, 1000, 2000, flags=CmdFlag.FAST_ZERO)
    yield request(mode, Cmd.TRIM, 0, 131_072)
    yield request(mode, Cmd.CACHE, 0, SIZE)
    yield request(mode, Cmd.BLOCK_STATUS, 512, SIZE - 512)
    yield request(mode, Cmd.BLOCK_STATUS, 0, SIZE, flags=CmdFlag.REQ_ONE)
    if mode is Mode.EXTENDED:
        filtered = filter_payload(SIZE, [0, 2])
        yield request(mode, Cmd.BLOCK_STATUS, 0, 16, payload=filtered, flags=CmdFlag.PAYLOAD_LEN)
    yield request(mode, Cmd.READ, SIZE - 1, 2, flags=CmdFlag.DF)
    yield request(mode, 99, 0, 1)
    yield request(mode, Cmd.FLUSH)
    yield request(mode, Cmd.DISC)


class _Request(NamedTuple):
    command: int
    flags: int
    offset: int
    length: int
    payload: bytes


def one_input(data: bytes) -> None:
    taking = Taking(data)
    mode, number = _MODES[taking.below(3)], taking.below(EXPORTS)
    export = stand().export(number)
    chosen = taking.number(1) if mode is not Mode.SIMPLE else 0
    names = [name for bit, name in enumerate(export.contexts) if chosen >> bit & 1]
    contexts = range(len(names))
    step = _STEPS[taking.below(len(_STEPS))]
    stream = bytearray(taking.rest())
    requests, hopeless = _parted(mode, stream)
    said, violation = stand().say(number, mode, names, bytes(stream), step)
    assert (violation is not None) == hopeless, violation
    content = stand().content(number)
    changing = not export.read_only and any(wanted.command in _WRITES for wanted in requests)
    replies = _replies(mode, said, requests)
    for cookie, wanted in enumerate(requests):
        reply = replies.pop(cookie)
        deserved = _deserved(mode, wanted, contexts, read_only=export.read_only)
        assert reply.error in deserved, f"{wanted[:4]}: {reply.error} and not {deserved}"
        if wanted.command == Cmd.READ and not reply.error and not changing:
            assert reply.data == content[wanted.offset :][: wanted.length]
        if wanted.command == Cmd.BLOCK_STATUS and not reply.error:
            _judge_status(mode, wanted, contexts, reply)
    assert not replies
    if changing:
        seen, expected = stand().seen(number), bytearray(content)
        for wanted in requests:
            if wanted.command in _WRITES:
                changed = slice(wanted.offset, wanted.offset + wanted.length)
                expected[changed] = seen[changed]
        assert seen == expected
        stand().undo(number)
    assert content.startswith(stand().seen(number, 4096))
    assert not stand().troubles, stand().troubles


def _parted(mode: Mode, stream: bytearray) -> tuple[list[_Request], bool]:
    """The requests that are complete, whose cookies become 0, 1, ... in the stream; and whether
    what follows them has to end the session.
    """
    requests: list[_Request] = []
    extended = mode is Mode.EXTENDED
    layout, magic = (">IHHQQI", COMPACT_REQUEST_MAGIC)
    if extended:
        layout, magic = (">IHHQQQ", EXTENDED_REQUEST_MAGIC)
    head, at = struct.calcsize(layout), 0
    while at + head <= len(stream):
        told, flags, command, _, offset, length = struct.unpack_from(layout, stream, at)
        struct.pack_into(">Q", stream, at + 8, len(requests))
        at += head
        if told != magic:
            return requests, True
        if command == Cmd.DISC:
            return requests, False
        has_payload = command == Cmd.WRITE or (extended and flags & CmdFlag.PAYLOAD_LEN)
        size = length if has_payload else 0
        if size > MAX_PAYLOAD:
            return requests, True
        payload = bytes(stream[at : at + size])
        at += size
        if len(payload) < size:
            break
        requests.append(_Request(command, flags, offset, length, payload))
    return requests, False


def _deserved(
    mode: Mode, wanted: _Request, contexts: Collection[int], *, read_only: bool
) -> set[int]:
    """The errors that the request deserves, any of them; 0 is none."""
    command, flags, offset, length, payload = wanted
    if command not in _FLAGS:
        return {Errno.EINVAL}
    errors: set[int] = set()
    if read_only and command in _WRITES:
        errors.add(Errno.EPERM)
    legal = _FLAGS[Cmd(command)]
    if mode is Mode.SIMPLE:
        legal &= ~CmdFlag.DF
    if mode is not Mode.EXTENDED:
        legal &= ~CmdFlag.PAYLOAD_LEN
    if flags & ~int(legal):  # the complement of an IntFlag has no bits without a name
        errors.add(Errno.EINVAL)
    if command == Cmd.BLOCK_STATUS:
        if flags & CmdFlag.PAYLOAD_LEN and mode is Mode.EXTENDED:
            length, ids = _filter(payload)
            if not set(ids) <= set(contexts) or len(set(ids)) < len(ids) or not ids:
                errors.add(Errno.EINVAL)
        if not contexts or not length:
            errors.add(Errno.EINVAL)
    if command == Cmd.FLUSH:
        return errors or ({Errno.EINVAL} if offset or length else {0})
    if offset + length > SIZE:
        errors |= {Errno.ENOSPC, Errno.EINVAL} if command in _WRITES else {Errno.EINVAL}
    if not errors and flags & CmdFlag.FAST_ZERO:
        return {0, Errno.ENOTSUP}
    return errors or {0}


def _filter(payload: bytes) -> tuple[int, Sequence[int]]:
    if len(payload) < 8 or len(payload) % 4:
        return 0, ()
    length, *ids = struct.unpack(f">Q{len(payload) // 4 - 2}I", payload)
    return length, ids


def _replies(mode: Mode, said: bytes, requests: Sequence[_Request]) -> dict[int, Reply]:
    """All that the server said: whole replies, each to a request, and one to each."""
    replies: dict[int, Reply] = {}
    parts: dict[int, list[ReplyChunk]] = {}
    at = 0
    while at < len(said):
        if mode is Mode.SIMPLE:
            magic, error, cookie = struct.unpack_from(">IIQ", said, at)
            assert magic == 0x67446698
            at += 16
            wanted = requests[cookie]
            length = wanted.length if wanted.command == Cmd.READ and not error else 0
            assert cookie not in replies
            replies[cookie] = Reply(cookie, error, said[at : at + length], [], {})
            at += length
            continue
        if mode is Mode.EXTENDED:
            magic, flags, kind, cookie, offset, length = struct.unpack_from(">IHHQQQ", said, at)
            assert (magic, offset) == (0x6E8A278C, requests[cookie].offset)
            at += 32
        else:
            magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", said, at)
            assert magic == 0x668E33EF
            offset, at = None, at + 20
        assert cookie not in replies
        told = ReplyChunk(flags, kind, cookie, offset, said[at : at + length])
        assert len(told.payload) == length
        at += length
        parts.setdefault(cookie, []).append(told)
        if told.done:
            wanted = requests[cookie]
            size = min(wanted.length, SIZE) if wanted.command == Cmd.READ else 0
            replies[cookie] = assemble(parts.pop(cookie), wanted.offset, size)
    assert at == len(said)
    assert not parts
    return replies


def _judge_status(mode: Mode, wanted: _Request, contexts: Collection[int], reply: Reply) -> None:
    length, ids = wanted.length, contexts
    if wanted.flags & CmdFlag.PAYLOAD_LEN:
        length, ids = _filter(wanted.payload)
    assert reply.status.keys() == set(ids)
    assert len(reply.chunks) == len(ids)
    for extents in reply.status.values():
        lengths = [extent.length for extent in extents]
        assert min(lengths) > 0
        assert sum(lengths[:-1]) < length
        assert wanted.offset + sum(lengths) <= SIZE
        if wanted.flags & CmdFlag.REQ_ONE:
            assert len(lengths) == 1
            assert lengths[0] <= length
