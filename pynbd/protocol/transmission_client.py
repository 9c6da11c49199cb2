"""The transmission phase, the client's side: requests out, replies in.

"Simple reply message", "Structured reply chunk message", "Extended reply chunk message" and
"Structured reply types" of the NBD specification, in all three dialects.

1. `Replies` is fed with whatever has arrived. It says where the next bytes are to go: long data
   go straight to where the caller wants them.
2. Chunks may come in any order and between those of other replies; a reply is over with DONE.
3. A reply that contradicts its request or the specification is a `ProtocolError`. What one costs
   is bounded by what was asked for.
4. An error chunk fails its request, and whatever else the reply holds is read and forgotten.
5. Flags of a chunk other than DONE are ignored, and so are error types that are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pynbd.errors import ProtocolError
from pynbd.protocol import wire
from pynbd.protocol.handshake import Session
from pynbd.protocol.handshake_client import printable
from pynbd.protocol.metadata import encode_filter
from pynbd.protocol.transmission import Dialect, Request
from pynbd.protocol.values import (
    EXTENDED_REPLY_MAGIC,
    MAX_STRING,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    CommandFlag,
    ReplyFlag,
    ReplyType,
)

_DONE = int(ReplyFlag.DONE)
_DATA = int(ReplyType.OFFSET_DATA)
_SIMPLE_MAGIC = SIMPLE_REPLY_MAGIC.to_bytes(4, "big")

_BUFFER = 1 << 16
# From so many bytes on, data are received where they belong; below, one call receives many replies.
_DIRECT = 1 << 13

# QEMU and nbdkit stop at 2**20 descriptors or below; each has 16 bytes at most.
_LONGEST_STATUS: Final = 64 << 20
_LONGEST_ERROR: Final = MAX_STRING + 64


@dataclass(frozen=True, slots=True, eq=False)
class Status:
    """Consecutive extents in one metadata context: ``lengths`` in bytes and status ``flags``.

    Iterates as pairs of ints.
    """

    lengths: npt.NDArray[np.int64]
    flags: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.lengths.tolist(), self.flags.tolist(), strict=True)

    def clip(self, length: int) -> Status:
        """The part that describes the first ``length`` bytes, 1 or more."""
        ends = self.lengths.cumsum()
        if int(ends[-1]) <= length:
            return self
        count = int(np.searchsorted(ends, length)) + 1
        lengths = self.lengths[:count].copy()
        lengths[-1] -= int(ends[count - 1]) - length
        return Status(lengths, self.flags[:count])


class Asked:
    """A request that was sent, and what was answered so far.

    ``request`` as it is to be understood: its length is the effect length. ``view`` takes the data
    of a READ; ``contexts`` are the ids that a BLOCK_STATUS is to be answered for. ``waiter``
    belongs to whoever asks. When it is over, ``error`` is 0 or why it failed, in NBD's numbers, and
    ``message`` what the server says to people.
    """

    __slots__ = (
        "contexts",
        "covered",
        "error",
        "message",
        "pieces",
        "request",
        "statuses",
        "view",
        "waiter",
    )

    def __init__(
        self,
        request: Request,
        *,
        view: memoryview | None = None,
        contexts: Collection[int] = (),
        waiter: Any = None,
    ) -> None:
        self.request = request
        self.view = view
        self.contexts = contexts
        self.waiter = waiter
        self.error = 0
        self.message = ""
        self.covered = 0
        self.pieces: list[tuple[int, int]] = []  # [start, end) of the content, unless it is all
        self.statuses: dict[int, Status] = {}

    def breach(self, what: str) -> ProtocolError:
        return ProtocolError(f"the reply to {self.request}: {what}")


def encode(dialect: Dialect, asked: Asked, *, filtered: bool) -> bytes:
    """The header of a request, and its payload if it is ``filtered``: a BLOCK_STATUS for its
    contexts alone, in the extended dialect. The data of a WRITE follow.
    """
    flags, command, cookie, offset, length, data = asked.request
    payload = encode_filter(length, list(asked.contexts)) if filtered else b""
    if filtered or (dialect.extended and data is not None):
        flags |= CommandFlag.PAYLOAD_LEN
    head = dialect.request.pack(
        dialect.magic, flags, command, cookie, offset, len(payload) or length
    )
    return head + payload


class Replies:
    """Takes apart what a server sends in one session.

    ``asked``: the requests under way, by cookie. Whoever sends a request enters it; when it is over
    it is removed, and handed to ``finished``.
    """

    def __init__(self, session: Session, finished: Callable[[Asked], None]) -> None:
        self.asked: dict[int, Asked] = {}
        self._contexts: Mapping[int, str] = session.contexts
        self._size = session.export.size
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0  # of what was received and not yet taken
        self._sink: memoryview | None = None  # what is to be filled next, if not a head
        self._direct = False
        self._filled: Callable[[], None] = lambda: None
        self._current: Asked | None = None  # the READ whose buffer is being filled
        self._finished = finished
        self._extended = session.extended
        self._head = self._simple_reply
        if session.structured or session.extended:
            self._head = self._extended_chunk if session.extended else self._structured_chunk

    def room(self) -> memoryview:
        """Where the next bytes are to be received; it has room for at least one."""
        if self._sink is not None and len(self._sink) >= _DIRECT:
            self._direct = True
            return self._sink
        if self._start:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._buffer[self._end :]

    def received(self, count: int) -> None:
        """Take the ``count`` bytes that were received into `room`."""
        if self._direct:
            assert self._sink is not None
            self._direct = False
            self._sink = self._sink[count:]
            if not self._sink:
                self._end_of_sink()
        else:
            self._end += count
            while self._fill() if self._sink is not None else self._head():
                pass

    def abandon(self, asked: Asked) -> None:
        """Nobody wants the answer any more, and the buffer of ``asked`` may serve other ends."""
        if asked.view is not None:
            asked.view = memoryview(bytearray(len(asked.view)))
            if self._current is asked and self._sink is not None:
                self._sink = asked.view[: len(self._sink)]
                self._direct = False

    # What is made of whole pieces

    def _fill(self) -> bool:
        """Move what is at hand into the sink; whether it is full."""
        assert self._sink is not None
        count = min(len(self._sink), self._end - self._start)
        self._sink[:count] = self._buffer[self._start : self._start + count]
        self._start += count
        self._sink = self._sink[count:]
        if self._sink:
            return False
        self._end_of_sink()
        return True

    def _end_of_sink(self) -> None:
        self._sink = self._current = None
        self._filled()

    def _find(self, cookie: int) -> Asked:
        asked = self.asked.get(cookie)
        if asked is None:
            raise ProtocolError(f"a reply to a request that was not sent, cookie {cookie:#x}")
        return asked

    def _simple_reply(self) -> bool:
        if self._end - self._start < wire.SIMPLE_REPLY.size:
            return False
        magic, error, cookie = wire.SIMPLE_REPLY.unpack_from(self._buffer, self._start)
        if magic != SIMPLE_REPLY_MAGIC:
            raise ProtocolError(f"a reply with the magic number {magic:#x}")
        self._start += wire.SIMPLE_REPLY.size
        asked = self._find(cookie)
        if asked.covered or asked.statuses or asked.error:
            raise asked.breach("a simple reply in the middle of it")
        if error:
            asked.error = error
        elif asked.view is not None:
            self._content(asked, asked.request.offset, len(asked.view))
            self._receive(asked, asked.view, done=True)
            return True
        self._finish(asked)
        return True

    def _structured_chunk(self) -> bool:
        have = self._end - self._start
        if have < wire.SIMPLE_REPLY.size:
            return False
        if self._buffer[self._start : self._start + 4] == _SIMPLE_MAGIC:
            cookie = wire.SIMPLE_REPLY.unpack_from(self._buffer, self._start)[2]
            asked = self._find(cookie)
            if asked.view is not None:
                raise asked.breach("a simple one, after structured replies were negotiated")
            return self._simple_reply()
        if have < wire.STRUCTURED_CHUNK.size:
            return False
        head = wire.STRUCTURED_CHUNK.unpack_from(self._buffer, self._start)
        magic, flags, kind, cookie, length = head
        if magic != STRUCTURED_REPLY_MAGIC:
            raise ProtocolError(f"a reply chunk with the magic number {magic:#x}")
        return self._chunk(wire.STRUCTURED_CHUNK.size, self._find(cookie), flags, kind, length)

    def _extended_chunk(self) -> bool:
        if self._end - self._start < wire.EXTENDED_CHUNK.size:
            return False
        head = wire.EXTENDED_CHUNK.unpack_from(self._buffer, self._start)
        magic, flags, kind, cookie, offset, length = head
        if magic != EXTENDED_REPLY_MAGIC:
            raise ProtocolError(f"a reply chunk with the magic number {magic:#x}")
        asked = self._find(cookie)
        if offset != asked.request.offset:
            raise asked.breach(f"it repeats the offset {offset}")
        return self._chunk(wire.EXTENDED_CHUNK.size, asked, flags, kind, length)

    def _chunk(self, head: int, asked: Asked, flags: int, kind: int, length: int) -> bool:
        """A chunk with ``length`` bytes of payload, of which the ``head`` bytes are all there."""
        done = bool(flags & _DONE)
        if kind == _DATA:
            if asked.view is None or length <= wire.OFFSET_DATA.size:
                raise asked.breach(f"{ReplyType.OFFSET_DATA} of {length} bytes")
            if self._end - self._start < head + wire.OFFSET_DATA.size:
                return False
            (at,) = wire.OFFSET_DATA.unpack_from(self._buffer, self._start + head)
            self._start += head + wire.OFFSET_DATA.size
            self._receive(asked, self._content(asked, at, length - wire.OFFSET_DATA.size), done)
            return True
        self._start += head
        if kind == ReplyType.NONE:
            if length or not done:
                raise asked.breach(f"{ReplyType.NONE} with a payload, or not at its end")
            self._finish(asked)
            return True
        self._check_length(asked, kind, length)
        payload = bytearray(length)
        self._sink = memoryview(payload)

        def filled() -> None:
            self._payload(asked, kind, payload)
            if done:
                self._finish(asked)

        self._filled = filled
        return True

    def _check_length(self, asked: Asked, kind: int, length: int) -> None:
        """Before the payload of a chunk is received: what kind of it can be so long."""
        # An extent has a byte, or more.
        describable = asked.request.length if asked.contexts else 0
        if kind & 0x8000:
            valid = wire.ERROR_PAYLOAD.size <= length <= _LONGEST_ERROR
        elif kind == ReplyType.OFFSET_HOLE:
            valid = asked.view is not None and length == wire.OFFSET_HOLE.size
        elif kind == ReplyType.BLOCK_STATUS_EXT and self._extended:
            count, rest = divmod(length - wire.BLOCK_STATUS_EXT.size, wire.DESCRIPTOR_EXT.size)
            valid = 0 < count <= describable and not rest
        elif kind == ReplyType.BLOCK_STATUS and not self._extended:
            count, rest = divmod(length - wire.BLOCK_STATUS.size, wire.DESCRIPTOR.size)
            valid = 0 < count <= describable and not rest
        else:
            valid = False
        if not valid or length > _LONGEST_STATUS:
            raise asked.breach(f"{ReplyType(kind)} of {length} bytes")

    def _payload(self, asked: Asked, kind: int, payload: bytearray) -> None:
        if kind & 0x8000:
            self._error(asked, kind, payload)
        elif kind == ReplyType.OFFSET_HOLE:
            at, length = wire.OFFSET_HOLE.unpack(payload)
            view = self._content(asked, at, length)
            view[:] = bytes(length)
        else:
            self._status(asked, payload)

    def _content(self, asked: Asked, at: int, length: int) -> memoryview:
        """Where ``length`` bytes of content from guest offset ``at`` go."""
        assert asked.view is not None
        first, last = asked.request.offset, asked.request.offset + len(asked.view)
        if not first <= at < at + length <= last:
            raise asked.breach(f"content {at}+{length}, outside of the request")
        asked.covered += length
        if asked.covered > last - first:
            raise asked.breach("content that overlaps")
        pieces = asked.pieces
        if asked.covered < last - first or pieces:
            start = pieces.pop()[0] if pieces and pieces[-1][1] == at else at
            pieces.append((start, at + length))
        return asked.view[at - first : at - first + length]

    def _receive(self, asked: Asked, view: memoryview, done: bool) -> None:
        self._sink = view
        self._current = asked
        self._filled = (lambda: self._finish(asked)) if done else (lambda: None)

    def _error(self, asked: Asked, kind: int, payload: bytearray) -> None:
        error, size = wire.ERROR_PAYLOAD.unpack_from(payload)
        fixed = wire.ERROR_PAYLOAD.size
        if kind == ReplyType.ERROR_OFFSET:
            fixed += wire.ERROR_OFFSET.size
        if not error or size > len(payload) - fixed:
            raise asked.breach(f"{ReplyType(kind)} {error} with a message of {size} bytes")
        if kind == ReplyType.ERROR_OFFSET:
            (at,) = wire.ERROR_OFFSET.unpack_from(payload, len(payload) - wire.ERROR_OFFSET.size)
            if not 0 <= at - asked.request.offset < asked.request.length:
                raise asked.breach(f"{ReplyType(kind)} at {at}, outside of the request")
        if not asked.error:
            asked.error = error
            text = payload[wire.ERROR_PAYLOAD.size :][:size]
            asked.message = printable(text.decode("utf-8", "replace"))

    def _status(self, asked: Asked, payload: bytearray) -> None:
        if self._extended:
            context, count = wire.BLOCK_STATUS_EXT.unpack_from(payload)
            columns = np.frombuffer(payload, ">u8", offset=wire.BLOCK_STATUS_EXT.size)
            if len(columns) != 2 * count:
                raise asked.breach(f"{count} descriptors announced, {len(columns) // 2} sent")
        else:
            (context,) = wire.BLOCK_STATUS.unpack_from(payload)
            columns = np.frombuffer(payload, ">u4", offset=wire.BLOCK_STATUS.size)
        if context not in asked.contexts:
            raise asked.breach(f"metadata context {context}, which was not asked for")
        if context in asked.statuses:
            raise asked.breach(f"metadata context {context} a second time")
        lengths, flags = (column.astype(np.uint64) for column in (columns[::2], columns[1::2]))
        if self._contexts[context].startswith("base:") and (flags >> np.uint64(32)).any():
            raise asked.breach("more than 32 bits of status in the namespace base:")
        _, _, _, offset, length, _ = asked.request
        one = asked.request.flags & CommandFlag.REQ_ONE
        # All before the first that is past the end are exact, as each is below 2**63.
        ends = lengths.cumsum()
        if not lengths.all() or (lengths > self._size).any() or (ends > self._size - offset).any():
            raise asked.breach("an extent without length, or past the end of the export")
        if len(ends) > 1 and (one or int(ends[-2]) >= length):
            raise asked.breach("more extents than were asked for")
        if one and int(ends[0]) > length:
            raise asked.breach("an extent longer than the request")
        asked.statuses[context] = Status(lengths.astype(np.int64), flags)

    def _finish(self, asked: Asked) -> None:
        del self.asked[asked.request.cookie]
        if not asked.error:
            if asked.view is not None:
                self._check_content(asked)
            if len(asked.statuses) < len(asked.contexts):
                raise asked.breach("a metadata context is missing")
        self._finished(asked)

    def _check_content(self, asked: Asked) -> None:
        assert asked.view is not None
        if asked.covered < len(asked.view):
            raise asked.breach("content is missing")
        pieces = sorted(asked.pieces)
        if any(end > start for (_, end), (start, _) in pairwise(pieces)):
            raise asked.breach("content that overlaps")
