"""A client that has many requests in flight, and judges each answer when it comes.

`Judge` is of one disk: it knows what its bytes may be (`interop.soak.shadow`) and what its contexts
may say; a `Conversation` is one connection to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from interop.soak.shadow import Bytes, Change, Reading, Shadow
from tests.conformance.asking import is_refusal
from tests.conformance.client import (
    SIMPLE_REPLY_MAGIC,
    Cmd,
    CmdFlag,
    Disconnected,
    Errno,
    Extent,
    Mode,
    Peer,
    Reply,
    ReplyChunk,
    assemble,
    request,
)
from tests.model.disks import BITMAP, GRANULARITY, Kept
from tests.model.requests import Asked, Session, check_extents, check_shape

Mask = npt.NDArray[np.bool_]

ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"
_HOLE_AND_ZERO, _ZERO = 3, 2


@dataclass(eq=False)
class Pending:
    """A request in flight. ``stored``, ``dirty``: what its range was known to be when it was
    asked.
    """

    asked: Asked
    changes: list[Change] = field(default_factory=list)
    reading: Reading | None = None
    stored: Mask | None = None
    dirty: Mask | None = None
    alone: bool = True


class Judge:
    """What a disk may be seen to hold, by all of its clients."""

    def __init__(self, disk: Kept, content: Bytes) -> None:
        self.disk = disk
        self.shadow = Shadow(content)
        self.stopping = False
        self._stored = np.zeros(disk.size, bool)  # written as data, and nothing since
        self._dirty = np.zeros(-(-disk.size // GRANULARITY), bool)  # what a bitmap has to know
        self._touched = self._dirty.copy()  # what it may know
        self._changing: list[Pending] = []

    def begin(self, asked: Asked, session: Session) -> Pending:
        pending = Pending(asked)
        if asked.error(session):
            return pending
        offset, end = asked.offset, asked.offset + asked.effect
        if asked.command == Cmd.READ:
            pending.reading = self.shadow.begin_read(offset, asked.length)
        elif asked.command == Cmd.BLOCK_STATUS:
            pending.reading = self.shadow.begin_read(offset, asked.effect)
            pending.stored = self._stored[offset:end].copy()
            pending.dirty = self._dirty.copy()
        elif asked.command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES) and asked.length:
            pending.changes = list(self._begin_changes(asked))
            self._touched[offset // GRANULARITY : -(-end // GRANULARITY)] = True
            writes = asked.command == Cmd.WRITE
            if not writes:
                self._stored[offset:end] = False
            for other in self._changing:
                there = other.asked
                if there.offset < end and offset < there.offset + there.length:
                    other.alone &= writes
                    pending.alone &= there.command == Cmd.WRITE
            self._changing.append(pending)
        return pending

    def _begin_changes(self, asked: Asked) -> Iterator[Change]:
        """A discard zeroes whole clusters of an image, and of the rest what it likes."""
        offset, end = asked.offset, asked.offset + asked.length
        if asked.command == Cmd.WRITE:
            content = np.frombuffer(asked.payload, np.uint8)
            yield self.shadow.begin(offset, asked.length, content)
        elif asked.command == Cmd.WRITE_ZEROES:
            yield self.shadow.begin(offset, asked.length)
        else:
            cluster = self.disk.cluster
            first = last = end
            if cluster:
                first = min(-(-offset // cluster) * cluster, end)
                last = end if end == self.disk.size else max(end // cluster * cluster, first)
            for start, stop, optional in (
                (offset, first, True),
                (first, last, False),
                (last, end, True),
            ):
                if start < stop:
                    yield self.shadow.begin(start, stop - start, optional=optional)

    def answered(self, pending: Pending, session: Session, reply: Reply) -> None:
        """Raises AssertionError for an answer that is wrong."""
        asked, expected = pending.asked, pending.asked.error(session)
        if self.stopping and reply.error == Errno.ESHUTDOWN:
            expected = Errno.ESHUTDOWN
        if asked.flags & CmdFlag.FAST_ZERO and not expected and reply.error == Errno.ENOTSUP:
            expected = Errno.ENOTSUP
        assert reply.error == expected, (Errno(reply.error), expected)
        if expected:
            is_refusal(session.mode, reply, expected, asked.offset)
            self._end(pending, happened=False)
            return
        check_shape(session.mode, asked, reply)
        if asked.command == Cmd.READ:
            assert pending.reading
            self.shadow.judge(pending.reading, np.frombuffer(reply.data, np.uint8))
            return
        if asked.command == Cmd.BLOCK_STATUS:
            self._check_status(pending, session, reply)
        self._end(pending, happened=True)

    def _end(self, pending: Pending, *, happened: bool) -> None:
        asked = pending.asked
        for change in pending.changes:
            (self.shadow.completed if happened else self.shadow.refused)(change)
        if pending.reading:
            self.shadow.forget(pending.reading)
        if pending in self._changing:
            self._changing.remove(pending)
            end = asked.offset + asked.length
            if happened and asked.command == Cmd.WRITE:
                self._dirty[asked.offset // GRANULARITY : -(-end // GRANULARITY)] = True
                if pending.alone:
                    self._stored[asked.offset : end] = True

    def abandoned(self, pending: Pending) -> None:
        """Nobody knows whether it has happened."""
        for change in pending.changes:
            self.shadow.failed(change)
        if pending.reading:
            self.shadow.forget(pending.reading)
        if pending in self._changing:
            self._changing.remove(pending)

    # Metadata contexts

    def _check_status(self, pending: Pending, session: Session, reply: Reply) -> None:
        asked = pending.asked
        assert set(reply.status) == asked.wanted(session)
        for number, extents in reply.status.items():
            check_extents(asked, extents)
            at = 0
            for extent in extents:
                self._check_extent(pending, session.contexts[number], at, extent)
                at += extent.length

    def _check_extent(self, pending: Pending, context: str, at: int, extent: Extent) -> None:
        offset, end = pending.asked.offset + at, pending.asked.offset + at + extent.length
        assert pending.stored is not None
        assert pending.dirty is not None
        assert pending.reading
        still = self._stored[offset:end]
        stored = bool((pending.stored[at : at + extent.length] & still).any())
        if context == ALLOCATION:
            assert extent.flags in (0, _ZERO, _HOLE_AND_ZERO)
            if extent.flags & _ZERO:
                self.shadow.judge_zeroes(pending.reading, offset, extent.length)
            assert not (stored and extent.flags), "written data is no hole"
        elif context == DEPTH:
            assert 0 <= extent.flags <= self.disk.depth
            assert not stored or extent.flags == 1
        else:
            assert context == BITMAP
            granules = slice(offset // GRANULARITY, -(-end // GRANULARITY))
            if extent.flags:
                assert extent.flags == 1
                assert self._touched[granules].all(), "what nobody touched is dirty"
            else:
                assert not pending.dirty[granules].any(), "a change was not recorded"


class Conversation:
    """A connection in transmission."""

    def __init__(self, peer: Peer, session: Session, judge: Judge) -> None:
        self.peer = peer
        self.session = session
        self._judge = judge
        self._pending: dict[int, Pending] = {}
        self._chunks: dict[int, list[ReplyChunk]] = {}

    @property
    def busy(self) -> int:
        return len(self._pending)

    def bytes_of(self, asked: Asked, cookie: int) -> bytes:
        """A request on the wire."""
        return request(
            self.session.mode,
            asked.command,
            asked.offset,
            asked.length,
            flags=asked.flags,
            cookie=cookie,
            payload=asked.payload,
        )

    def begin(self, asked: Asked, cookie: int) -> bytes:
        """What has to be sent now; the answer is awaited."""
        self._pending[cookie] = self._judge.begin(asked, self.session)
        return self.bytes_of(asked, cookie)

    def collect(self) -> None:
        """All answers."""
        while self._pending:
            self._answer()

    def collect_to_end(self) -> None:
        """The answers that come before the server closes; the others are given up."""
        try:
            while True:
                self._answer()
        except Disconnected:
            self.give_up()

    def give_up(self) -> None:
        """The client leaves, whatever is in flight."""
        self.peer.sock.close()
        for pending in self._pending.values():
            self._judge.abandoned(pending)
        self._pending.clear()

    def _answer(self) -> None:
        """One simple reply, or one chunk."""
        if self.session.mode is Mode.SIMPLE:
            head = self.peer.read(16)
            assert int.from_bytes(head[:4]) == SIMPLE_REPLY_MAGIC
            error, cookie = int.from_bytes(head[4:8]), int.from_bytes(head[8:])
            asked = self._pending[cookie].asked
            length = 0 if error or asked.command != Cmd.READ else asked.length
            self._ended(cookie, Reply(cookie, error, self.peer.read(length), [], {}))
            return
        chunk = self.peer.read_chunk()
        chunks = self._chunks.setdefault(chunk.cookie, [])
        chunks.append(chunk)
        if chunk.done:
            del self._chunks[chunk.cookie]
            asked = self._pending[chunk.cookie].asked
            length = asked.length if asked.command == Cmd.READ else 0
            if any(each.type & 1 << 15 for each in chunks):
                length = 0
            self._ended(chunk.cookie, assemble(chunks, asked.offset, length))

    def _ended(self, cookie: int, reply: Reply) -> None:
        pending = self._pending[cookie]
        try:
            self._judge.answered(pending, self.session, reply)
        except AssertionError as error:
            error.add_note(f"{self.session.mode}: {pending.asked}")
            raise
        del self._pending[cookie]


def cut(peer: Peer, data: bytes, cuts: Sequence[int]) -> None:
    """Send in segments, each only once the one before was taken."""
    ends = [*sorted({at % len(data) for at in cuts} if data else ()), len(data)]
    start = 0
    for end in ends:
        try:
            peer.send(data[start:end])
        except Disconnected:
            return  # what was answered before tells whether that was right
        if end < len(data):
            peer.wait_taken()
        start = end
