"""The model of a request: which header is right, what the server answers to it, and what it may do.

"Transmission phase" of the NBD specification, with the decisions of docs/protocol-support.md (rows
B, C, P, W and X). It imports nothing of pynbd.

The order of the checks: known command, read-only export, flags, range.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

from tests.conformance.client import (
    DONE,
    MAX_PAYLOAD,
    Chunk,
    Cmd,
    CmdFlag,
    Errno,
    Extent,
    Mode,
    Reply,
)

_STRUCTURED = {Cmd.READ: CmdFlag.DF}
_EXTENDED = {
    Cmd.READ: CmdFlag.DF,
    Cmd.WRITE: CmdFlag.PAYLOAD_LEN,
    Cmd.BLOCK_STATUS: CmdFlag.PAYLOAD_LEN,
}
_ALWAYS = {
    Cmd.WRITE_ZEROES: CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO,
    Cmd.BLOCK_STATUS: CmdFlag.REQ_ONE,
}
CHANGES = {Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES}


def legal_flags(mode: Mode, command: int) -> CmdFlag:
    """What a command may carry (table C)."""
    known = Cmd(command)
    flags = CmdFlag.FUA | _ALWAYS.get(known, CmdFlag(0))
    if mode is Mode.STRUCTURED:
        flags |= _STRUCTURED.get(known, CmdFlag(0))
    if mode is Mode.EXTENDED:
        flags |= _EXTENDED.get(known, CmdFlag(0))
    return flags


@dataclass(frozen=True)
class Session:
    """What was negotiated. ``contexts``: names by id."""

    mode: Mode
    size: int
    read_only: bool
    contexts: dict[int, str]


@dataclass(frozen=True)
class Asked:
    """A request as it is sent."""

    command: int
    flags: int
    offset: int
    length: int
    payload: bytes = field(default=b"", repr=False)

    def payload_length(self, mode: Mode) -> int:
        """Bytes that follow the header."""
        extended = mode is Mode.EXTENDED and self.flags & CmdFlag.PAYLOAD_LEN
        return self.length if self.command == Cmd.WRITE or extended else 0

    @property
    def filters(self) -> bool:
        return self.command == Cmd.BLOCK_STATUS and bool(self.flags & CmdFlag.PAYLOAD_LEN)

    @property
    def effect(self) -> int:
        """The effect length."""
        return int.from_bytes(self.payload[:8]) if self.filters else self.length

    def wanted(self, session: Session) -> set[int]:
        """The contexts that a BLOCK_STATUS which succeeds is about."""
        if not self.filters:
            return set(session.contexts)
        return set(struct.unpack(f">{len(self.payload) // 4 - 2}I", self.payload[8:]))

    def error(self, session: Session) -> Errno:
        """How it has to be answered, if the host has no trouble."""
        if self.command not in set(Cmd) - {Cmd.DISC}:
            return Errno.EINVAL
        if self.command in CHANGES and session.read_only:
            return Errno.EPERM
        if self.flags & ~int(legal_flags(session.mode, self.command)):
            return Errno.EINVAL
        if self.command == Cmd.FLUSH:
            return Errno.EINVAL if self.offset or self.length else Errno.OK
        if self.command == Cmd.BLOCK_STATUS and not self._asks_well(session.contexts):
            return Errno.EINVAL
        if self.offset + self.effect > session.size:
            full = self.length and self.command in (Cmd.WRITE, Cmd.WRITE_ZEROES)
            return Errno.ENOSPC if full else Errno.EINVAL
        return Errno.OK

    def _asks_well(self, contexts: Collection[int]) -> bool:
        if not self.filters:
            return bool(contexts) and self.length > 0
        ids, rest = divmod(len(self.payload) - 8, 4)
        if ids < 1 or rest or not self.effect:
            return False
        wanted = struct.unpack(f">{ids}I", self.payload[8:])
        return len(set(wanted)) == ids and set(wanted) <= set(contexts)


def disconnects(asked: Asked, mode: Mode) -> bool:
    """Its payload is longer than any may be."""
    return asked.payload_length(mode) > MAX_PAYLOAD


def check_shape(mode: Mode, asked: Asked, reply: Reply) -> None:
    """A success has the chunks that it may have (rows C7 to C10, R1 to R10, X2)."""
    for chunk in reply.chunks:
        assert chunk.offset in (None, asked.offset)
        assert chunk.flags in (0, DONE)
        assert chunk.done == (chunk is reply.chunks[-1])
        assert len(chunk.payload) <= MAX_PAYLOAD + 8
    if mode is Mode.SIMPLE:
        return
    kinds = [chunk.type for chunk in reply.chunks]
    if asked.command == Cmd.READ and asked.length:
        content = [kind for kind in kinds if kind != Chunk.NONE]
        assert set(content) <= {Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE}
        if asked.flags & CmdFlag.DF:
            assert content == [Chunk.OFFSET_DATA]
        check_cover(asked, reply)
    elif asked.command == Cmd.BLOCK_STATUS:
        kind = Chunk.BLOCK_STATUS_EXT if mode is Mode.EXTENDED else Chunk.BLOCK_STATUS
        assert kinds == [kind] * len(reply.status)
    else:
        assert kinds == [Chunk.NONE]


def check_cover(asked: Asked, reply: Reply) -> None:
    """Row R1: what was read is there once."""
    pieces = []
    for chunk in reply.chunks:
        if chunk.type != Chunk.NONE:
            start, hole = int.from_bytes(chunk.payload[:8]), chunk.type == Chunk.OFFSET_HOLE
            length = int.from_bytes(chunk.payload[8:]) if hole else len(chunk.payload) - 8
            pieces.append((start, start + length))
    at = asked.offset
    for start, end in sorted(pieces):
        assert start == at
        at = end
    assert at == asked.offset + asked.length


def check_extents(asked: Asked, extents: list[Extent]) -> None:
    """Rows X4 to X7 and X13: how extents have to lie."""
    assert extents
    assert all(extent.length for extent in extents)
    assert sum(extent.length for extent in extents) <= asked.effect
    flags = [extent.flags for extent in extents]
    assert all(one != other for one, other in pairwise(flags))
    if asked.flags & CmdFlag.REQ_ONE:
        assert len(extents) == 1
