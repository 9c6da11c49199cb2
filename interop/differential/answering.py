"""A client that has many requests in flight on one connection, and what it is answered.

Every reply is held against the specification on its own, whoever sent it: "Structured reply
message", "Metadata querying" (rows R and X of the conformance table). What two servers answer is
compared elsewhere.
"""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from interop.differential.asking import Ask
from tests.conformance.client import (
    SIMPLE_REPLY_MAGIC,
    Chunk,
    Cmd,
    CmdFlag,
    Disconnected,
    Extent,
    Mode,
    Option,
    Peer,
    ReplyChunk,
    assemble,
)

DISCONNECTED = -1
"""In the place of an error: the server closed the connection."""

Map = list[Extent]


class Gone(Exception):
    """The server does not take connections any more."""


@dataclass(frozen=True)
class Answer:
    error: int
    data: bytes = b""
    status: dict[str, Map] = field(default_factory=dict)

    def __str__(self) -> str:
        return "disconnect" if self.error == DISCONNECTED else f"error {self.error}"


class Connection:
    """One connection to one server, made anew when that closes it.

    ``done_twice`` counts the chunks that came for a BLOCK_STATUS after the last one of its reply.
    """

    def __init__(self, path: Path, mode: Mode, contexts: Sequence[str]) -> None:
        self._path = path
        self._contexts = contexts if mode is not Mode.SIMPLE else ()
        self._cookies = count(1)
        self.mode = mode
        self.done_twice = 0
        self._open()

    def _open(self) -> None:
        try:
            self.peer = Peer(self._path, deadline=60)
            self.peer.greet()
        except (ConnectionError, Disconnected) as error:
            raise Gone(self._path) from error
        self.peer.headers(self.mode)
        self.ids: dict[str, int] = {}
        if self._contexts:
            self.ids = self.peer.meta(Option.SET_META_CONTEXT, "", self._contexts)
            assert sorted(self.ids) == sorted(self._contexts)
        self._names = {number: name for name, number in self.ids.items()}
        info = self.peer.info(Option.GO)
        self.size, self.flags = info.size, info.flags
        self._refused = set[int]()

    def close(self) -> None:
        self.peer.sock.close()

    def send(self, asks: Sequence[Ask]) -> None:
        """Ask all of them at once."""
        self._asked = dict(zip(self._cookies, asks, strict=False))
        messages = (ask.message(self.mode, cookie, self.ids) for cookie, ask in self._asked.items())
        self.peer.send_anyway(b"".join(messages))

    def receive(self) -> list[Answer]:
        """The answers to what was sent, in its order."""
        answers = dict.fromkeys(self._asked, Answer(DISCONNECTED))
        waiting = dict(self._asked)
        chunks = defaultdict[int, list[ReplyChunk]](list)
        try:
            while waiting:
                simple = self._simple(waiting)
                if simple:
                    cookie, answers[cookie] = simple
                    del waiting[cookie]
                    continue
                chunk = self.peer.read_chunk()
                if chunk.cookie in self._refused and chunk.done and chunk.type == Chunk.ERROR:
                    self.done_twice += 1
                    continue
                chunks[chunk.cookie].append(chunk)
                if chunk.done:
                    ask = waiting.pop(chunk.cookie)
                    answers[chunk.cookie] = self._chunked(ask, chunks.pop(chunk.cookie))
        except Disconnected:
            self.close()
            self._open()
        return list(answers.values())

    def ask(self, ask: Ask) -> Answer:
        self.send([ask])
        (answer,) = self.receive()
        return answer

    def _simple(self, waiting: dict[int, Ask]) -> tuple[int, Answer] | None:
        """A simple reply, if that is what comes: never to a READ if there may be chunks, and never
        with extended headers.
        """
        if self.mode is Mode.EXTENDED or (
            self.mode is Mode.STRUCTURED and not self._simple_comes()
        ):
            return None
        magic, error, cookie = struct.unpack(">IIQ", self.peer.read(16))
        assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
        ask = waiting[cookie]
        reads = ask.command == Cmd.READ and not error
        assert self.mode is Mode.SIMPLE or ask.command != Cmd.READ
        return cookie, Answer(error, self.peer.read(ask.length if reads else 0))

    def _simple_comes(self) -> bool:
        magic = self.peer.sock.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)
        return magic == SIMPLE_REPLY_MAGIC.to_bytes(4)

    def _chunked(self, ask: Ask, chunks: list[ReplyChunk]) -> Answer:
        assert all(chunk.offset in (None, ask.offset) for chunk in chunks), chunks
        reads = ask.command == Cmd.READ
        reply = assemble(chunks, ask.offset, ask.length if reads else 0)
        if reply.error:
            if ask.command == Cmd.BLOCK_STATUS:
                self._refused.add(reply.cookie)
            return Answer(reply.error)
        if reads and ask.flags & CmdFlag.DF:
            assert len(chunks) - (chunks[-1].type == Chunk.NONE) <= 1, chunks
        status = {self._names[number]: extents for number, extents in reply.status.items()}
        if ask.command == Cmd.BLOCK_STATUS:
            wanted = self.ids if ask.contexts is None else ask.contexts
            kinds = sum(chunk.type != Chunk.NONE for chunk in chunks)
            assert sorted(status) == sorted(wanted), f"{ask}: {status}"
            assert kinds == len(wanted), f"{ask}: {kinds} chunks"
            for extents in status.values():
                _check_extents(ask, extents)
        return Answer(0, reply.data, status)


def _check_extents(ask: Ask, extents: Map) -> None:
    """Rows X4 to X7 and X13. The last one may overshoot, but no server here lets it."""
    lengths = [length for length, _ in extents]
    assert lengths
    assert min(lengths) > 0
    assert sum(lengths) <= ask.length, f"{ask}: {extents}"
    assert len(lengths) == 1 or not ask.flags & CmdFlag.REQ_ONE, f"{ask}: {extents}"


def covered(extents: Map) -> int:
    return sum(length for length, _ in extents)


def complete(connection: Connection, ask: Ask, context: str, extents: Map, length: int) -> Map:
    """A map that covers ``length`` bytes: what a server has left out is asked for."""
    found = list(extents)
    while (done := covered(found)) < length:
        rest = Ask("status", Cmd.BLOCK_STATUS, ask.offset + done, length - done)
        answer = connection.ask(rest)
        assert not answer.error, f"{rest}: {answer}"
        found += answer.status[context]
    return found
