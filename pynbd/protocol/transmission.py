"""The transmission phase: requests in, replies out ("Transmission" in the NBD specification).

Three dialects, fixed by the negotiation: compact requests with simple replies, compact requests
with structured replies, extended requests with extended replies. `dialect` gives the one of a
session. All three have one shape, so that nothing above this module asks which it is, save where
the specification itself does.

Rules:

1. Exactly one chunk of a reply carries DONE, and it is the last.
2. A chunk carries DONE only if nothing can go wrong any more while it is sent.
3. In the extended dialect every chunk repeats the request's offset.
4. A text in an error chunk is cut as `wire.encode_message` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pynbd.protocol import wire
from pynbd.protocol.values import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    Error,
    ReplyFlag,
    ReplyType,
)

_WRITE = int(Command.WRITE)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_DONE = int(ReplyFlag.DONE)
_NONE = int(ReplyType.NONE)
_DATA = int(ReplyType.OFFSET_DATA)
_HOLE = int(ReplyType.OFFSET_HOLE)
_ERROR = int(ReplyType.ERROR)
_STATUS = int(ReplyType.BLOCK_STATUS)
_STATUS_EXT = int(ReplyType.BLOCK_STATUS_EXT)

Lengths = npt.NDArray[np.int64]
States = npt.NDArray[Any]


class Request(NamedTuple):
    """One request as it came. ``offset`` and ``length`` in bytes.

    ``length`` is the length of the payload if there is one, otherwise the effect length.
    """

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: memoryview | None = None

    def __str__(self) -> str:
        flags = f" {CommandFlag(self.flags & 0x3F)}" if self.flags else ""
        return f"{Command(self.command)}{flags} {self.offset}+{self.length}"


class Dialect(ABC):
    """How requests are read and replies are written in one session.

    Every method that builds a reply takes the request's ``cookie`` and ``offset``.
    """

    structured = True
    extended = False
    request: Struct = wire.COMPACT_REQUEST
    magic: int = REQUEST_MAGIC
    data_head_size: int
    """Bytes before the data in the reply to a read that is answered in one piece."""
    done_size: int
    """Bytes of the whole reply to a command without data that succeeded."""

    def payload_length(self, flags: int, command: int, length: int) -> int:
        """How many bytes of payload follow this request header."""
        return length if command == _WRITE else 0

    @abstractmethod
    def put_data_head(
        self, buffer: bytearray, at: int, cookie: int, offset: int, length: int
    ) -> None:
        """Write the head of a complete, successful READ reply; ``length`` bytes of data follow
        it.
        """

    @abstractmethod
    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        """Write `done` into a buffer."""

    @abstractmethod
    def data(self, cookie: int, offset: int, at: int, length: int) -> bytes:
        """The head of ``length`` bytes of data from guest offset ``at``; more of the reply
        follows.
        """

    @abstractmethod
    def hole(self, cookie: int, offset: int, at: int, length: int) -> bytes:
        """``length`` zero bytes from guest offset ``at``; more of the reply follows."""

    @abstractmethod
    def done(self, cookie: int, offset: int) -> bytes:
        """The end of a reply that succeeded; also the whole reply to a command without data."""

    @abstractmethod
    def error(self, cookie: int, offset: int, error: int, message: str) -> bytes:
        """The end of a reply that failed."""

    @abstractmethod
    def status(
        self,
        cookie: int,
        offset: int,
        context: int,
        lengths: Lengths,
        states: States,
        *,
        last: bool,
    ) -> memoryview:
        """One context's descriptors: extent lengths in bytes and status flags, both arrays of a
        size.
        """


class SimpleReplies(Dialect):
    """Compact requests, simple replies ("Simple reply message").

    A read has no chunks here: its data follow the head, and there is no end to mark.
    """

    structured = False
    data_head_size = done_size = wire.SIMPLE_REPLY.size

    def put_data_head(
        self, buffer: bytearray, at: int, cookie: int, offset: int, length: int
    ) -> None:
        wire.SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        wire.SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def data(self, cookie: int, offset: int, at: int, length: int) -> bytes:
        return wire.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, at: int, length: int) -> bytes:
        raise AssertionError("a simple reply has no holes")

    def done(self, cookie: int, offset: int) -> bytes:
        return wire.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, error: int, message: str) -> bytes:
        return wire.SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)

    def status(
        self,
        cookie: int,
        offset: int,
        context: int,
        lengths: Lengths,
        states: States,
        *,
        last: bool,
    ) -> memoryview:
        raise AssertionError("a simple reply has no block status")


class _Chunks(Dialect):
    """What replies in chunks have in common: everything but the head of a chunk."""

    @abstractmethod
    def _head(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        """The head of a chunk with ``length`` bytes of payload."""

    @abstractmethod
    def _status_head(
        self, flags: int, cookie: int, offset: int, context: int, count: int
    ) -> tuple[bytes, str]:
        """All that precedes ``count`` descriptors, and the type of their two numbers."""

    def data(self, cookie: int, offset: int, at: int, length: int) -> bytes:
        head = self._head(0, _DATA, cookie, offset, wire.OFFSET_DATA.size + length)
        return head + wire.OFFSET_DATA.pack(at)

    def hole(self, cookie: int, offset: int, at: int, length: int) -> bytes:
        head = self._head(0, _HOLE, cookie, offset, wire.OFFSET_HOLE.size)
        return head + wire.OFFSET_HOLE.pack(at, length)

    def done(self, cookie: int, offset: int) -> bytes:
        return self._head(_DONE, _NONE, cookie, offset, 0)

    def error(self, cookie: int, offset: int, error: int, message: str) -> bytes:
        text = wire.encode_message(message)
        payload = wire.ERROR_PAYLOAD.pack(error or Error.EINVAL, len(text)) + text
        return self._head(_DONE, _ERROR, cookie, offset, len(payload)) + payload

    def status(
        self,
        cookie: int,
        offset: int,
        context: int,
        lengths: Lengths,
        states: States,
        *,
        last: bool,
    ) -> memoryview:
        # There may be a hundred thousand: each number is written once, in its place, as it is sent.
        flags, count = _DONE if last else 0, len(lengths)
        head, number = self._status_head(flags, cookie, offset, context, count)
        chunk = np.empty(len(head) + 2 * count * np.dtype(number).itemsize, np.uint8)
        chunk.data[: len(head)] = head
        descriptors = chunk[len(head) :].view(number)
        descriptors[::2], descriptors[1::2] = lengths, states
        return chunk.data


class StructuredReplies(_Chunks):
    """Compact requests, structured replies ("Structured reply chunk message")."""

    data_head_size = wire.STRUCTURED_DATA.size
    done_size = wire.STRUCTURED_CHUNK.size

    def put_data_head(
        self, buffer: bytearray, at: int, cookie: int, offset: int, length: int
    ) -> None:
        wire.STRUCTURED_DATA.pack_into(
            buffer, at, STRUCTURED_REPLY_MAGIC, _DONE, _DATA, cookie, length + 8, offset
        )

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        wire.STRUCTURED_CHUNK.pack_into(buffer, at, STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0)

    def _head(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return wire.STRUCTURED_CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def _status_head(
        self, flags: int, cookie: int, offset: int, context: int, count: int
    ) -> tuple[bytes, str]:
        length = wire.BLOCK_STATUS.size + count * wire.DESCRIPTOR.size
        head = self._head(flags, _STATUS, cookie, offset, length)
        return head + wire.BLOCK_STATUS.pack(context), ">u4"


class ExtendedReplies(_Chunks):
    """Extended requests and replies ("Extended reply chunk message")."""

    extended = True
    request = wire.EXTENDED_REQUEST
    magic = EXTENDED_REQUEST_MAGIC
    data_head_size = wire.EXTENDED_DATA.size
    done_size = wire.EXTENDED_CHUNK.size

    def payload_length(self, flags: int, command: int, length: int) -> int:
        # A WRITE without PAYLOAD_LEN breaks a rule, but its data are on the wire all the same.
        return length if flags & _PAYLOAD_LEN or command == _WRITE else 0

    def put_data_head(
        self, buffer: bytearray, at: int, cookie: int, offset: int, length: int
    ) -> None:
        wire.EXTENDED_DATA.pack_into(
            buffer, at, EXTENDED_REPLY_MAGIC, _DONE, _DATA, cookie, offset, length + 8, offset
        )

    def put_done(self, buffer: bytearray, at: int, cookie: int, offset: int) -> None:
        wire.EXTENDED_CHUNK.pack_into(
            buffer, at, EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, offset, 0
        )

    def _head(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return wire.EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)

    def _status_head(
        self, flags: int, cookie: int, offset: int, context: int, count: int
    ) -> tuple[bytes, str]:
        length = wire.BLOCK_STATUS_EXT.size + count * wire.DESCRIPTOR_EXT.size
        head = self._head(flags, _STATUS_EXT, cookie, offset, length)
        return head + wire.BLOCK_STATUS_EXT.pack(context, count), ">u8"


def dialect(*, structured: bool, extended: bool) -> Dialect:
    """The dialect of a session that negotiated these."""
    if extended:
        return ExtendedReplies()
    return StructuredReplies() if structured else SimpleReplies()
