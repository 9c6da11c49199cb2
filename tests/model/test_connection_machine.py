"""Whole sessions on real disks, one or two at a time, held against a model.

Requests of every kind are in flight together and meet in a few places; sessions end in every way,
and the server, too. After each of them the next client works; a FLUSH on one connection covers what
was acknowledged on the other; and in the end the disk holds what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from interop.soak.shadow import stamp
from pynbd.block.node import BlockNode
from pynbd.server.export import Export, ExportTable
from pynbd.server.offers import offered_contexts
from tests.conformance.client import (
    COMPACT_REQUEST_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    Cmd,
    CmdFlag,
    Flag,
    Mode,
    Option,
    Peer,
    filter_payload,
)
from tests.model.conversation import Conversation, Judge, cut
from tests.model.disks import KINDS, SIZE, Kept, keep
from tests.model.loops import LoopThread, descriptors, failed, profile, unhurried
from tests.model.requests import Asked, Session, disconnects, legal_flags

LONGEST = 200_000
"""Bytes of payload of a request that is refused."""

_PLACES = [0, 4096 * 3 - 100, 16384, 65536, 70000, 131072, 150000, SIZE - 4096, SIZE - 1, SIZE]
_OFFSETS = st.one_of(
    st.sampled_from(_PLACES),
    st.sampled_from(_PLACES),
    st.integers(0, SIZE),
    st.integers(0, SIZE // 4096).map(lambda number: number * 4096),
)
_LENGTHS = st.one_of(
    st.sampled_from([1, 512, 4096, 4096, 16384, 65536, 140_000, SIZE]),
    st.integers(1, 700),
    st.integers(1, 40_000),
)
_COMMANDS = (
    [Cmd.READ, Cmd.WRITE] * 4
    + [Cmd.TRIM, Cmd.WRITE_ZEROES, Cmd.BLOCK_STATUS] * 2
    + [
        Cmd.CACHE,
        Cmd.FLUSH,
    ]
)
_BEYOND = st.sampled_from([SIZE, SIZE + 77, SIZE + 78, 1 << 31, 1 << 63, (1 << 64) - 1])
_ODD_LENGTHS = st.sampled_from([0, 0, 8, 12, 13, 1 << 20, MAX_PAYLOAD + 1, (1 << 32) - 1])


@st.composite
def _requests(draw: st.DrawFn) -> Asked:
    """Most of them could succeed; the payload comes when it is known who sends it."""
    command: int = draw(st.sampled_from(_COMMANDS))
    offset, length = draw(_OFFSETS), draw(_LENGTHS)
    legal = legal_flags(Mode.EXTENDED, command) & ~CmdFlag.PAYLOAD_LEN
    flags = int(CmdFlag(draw(st.integers(0, 63))) & legal) if draw(st.booleans()) else 0
    if command == Cmd.BLOCK_STATUS and draw(st.booleans()):
        flags |= CmdFlag.PAYLOAD_LEN
    if command == Cmd.FLUSH:
        offset = length = 0
    match draw(st.sampled_from(["right"] * 8 + ["command", "flags", "offset", "length"])):
        case "right":
            offset = min(offset, SIZE - 1) if command != Cmd.FLUSH else 0
            length = min(length, SIZE - offset)
        case "command":
            command = draw(st.sampled_from([8, 99, 0xFFFF, Cmd.FLUSH]))
        case "flags":
            flags = draw(st.integers(0, 63) | st.integers(0, 0xFFFF))
        case "offset":
            offset = draw(_BEYOND)
        case "length":
            length = draw(_ODD_LENGTHS)
    return Asked(command, flags, offset, length)


# Anywhere, or after each of the first bytes.
_CUTS = st.lists(st.integers(0, 1 << 20), max_size=3) | st.just(range(1, 60))
_WHICH = st.integers(0, 1)
_MODES = st.sampled_from([Mode.SIMPLE, Mode.STRUCTURED, Mode.EXTENDED, Mode.EXTENDED])
_IDS = st.lists(st.integers(0, 2), max_size=3)
_BATCH = st.lists(st.tuples(_requests(), _IDS), min_size=1, max_size=6)


class Connections(RuleBasedStateMachine):
    """One disk, one server after the other, up to two clients at a time."""

    disk: Kept

    @initialize(
        loop=st.sampled_from(["asyncio", "uvloop"]),
        kind=st.sampled_from([*KINDS, "qcow2", "extended", "python"]),
        seed=st.none() | st.integers(1, 1 << 16),
        modes=st.tuples(_MODES, _MODES),
    )
    def start(self, loop: str, kind: str, seed: int | None, modes: tuple[Mode, Mode]) -> None:
        self.before = descriptors()
        self.folder = TemporaryDirectory(prefix="pynbd-model-")
        self.thread = LoopThread(loop)
        self.disk = keep(kind, Path(self.folder.name), seed)
        self.judge = Judge(self.disk, self.thread.run(self.disk.stable()).copy())
        self.node: BlockNode = self.thread.run(self.disk.open())
        self.modes = list(modes)
        self.clients: list[Conversation | None] = [None, None]
        self.numbers = count(1)
        self.path = f"{self.folder.name}/socket"
        self._serve()

    def teardown(self) -> None:
        if not hasattr(self, "path"):
            return  # it has not come as far as that
        with self.folder:
            if failed():
                return  # that is what is to be seen
            for which in (0, 1):
                if self.clients[which]:
                    self._collect(which)
                    self._over(which)
            self.read_all(0)
            self._over(0)
            self._stop_server()
            self.thread.run(self.node.close())
            left = self.thread.run(self.disk.left())
            reading = self.judge.shadow.begin_read(0, self.disk.size)
            self.judge.shadow.judge(reading, left)
        self.thread.close()
        assert not descriptors() - self.before

    def _serve(self) -> None:
        export = Export("", self.node, contexts=offered_contexts(self.node))
        self.server = self.thread.serve(ExportTable([export]), self.path)
        self.idle = descriptors()

    def _stop_server(self) -> None:
        self.thread.loop.call_soon_threadsafe(self.server.stop)
        self.thread.ended()
        Path(self.path).unlink()

    # Coming and going

    def _client(self, which: int) -> Conversation:
        """The client of this number; a new one if the last one has left."""
        return self.clients[which] or self._connect(which, contexts=True)

    def _connect(self, which: int, *, contexts: bool) -> Conversation:
        mode = self.modes[which]
        peer = Peer(self.path)
        peer.greet()
        peer.headers(mode)
        ids: dict[str, int] = {}
        if mode is not Mode.SIMPLE and contexts:
            names = list(peer.meta(Option.LIST_META_CONTEXT))
            ids = peer.meta(Option.SET_META_CONTEXT, queries=names)
            assert set(ids) == set(names)
        told = peer.info(Option.GO)
        assert told.size == self.disk.size
        assert bool(told.flags & Flag.READ_ONLY) == self.disk.read_only
        assert told.flags & Flag.CAN_MULTI_CONN
        by_id = {number: name for name, number in ids.items()}
        session = Session(mode, self.disk.size, self.disk.read_only, by_id)
        client = self.clients[which] = Conversation(peer, session, self.judge)
        return client

    def _over(self, which: int) -> None:
        """The client has left, or leaves; nothing of its session is left."""
        client = self.clients[which]
        assert client
        client.give_up()
        self.clients[which] = None
        if not any(self.clients):
            self._alone()

    def _alone(self) -> None:
        """All clients have left, and nothing of theirs is left."""
        self.thread.settle()
        assert not descriptors() - self.idle

    @rule(which=_WHICH, mode=_MODES, contexts=st.booleans())
    def come_anew(self, which: int, mode: Mode, contexts: bool) -> None:
        if self.clients[which]:
            self._collect(which)
            self._over(which)
        self.modes[which] = mode
        self._connect(which, contexts=contexts)

    # Requests

    def _complete(self, client: Conversation, asked: Asked, ids: Sequence[int]) -> Asked:
        """A request as this client sends it: with a payload where one belongs.

        Nearly always with the flag that its mode wants; which request goes without follows from its
        numbers, and so do filters that are wrong.
        """
        mode, session = client.session.mode, client.session
        if mode is not Mode.EXTENDED:
            asked = replace(asked, length=asked.length & 0xFFFFFFFF)
            if asked.filters and asked.offset % 3:
                asked = replace(asked, flags=asked.flags & ~CmdFlag.PAYLOAD_LEN)
        elif asked.command == Cmd.WRITE and asked.flags < 64 and asked.offset % 5:
            asked = replace(asked, flags=asked.flags | CmdFlag.PAYLOAD_LEN)
        if asked.filters and mode is Mode.EXTENDED:
            chosen = [number + (number == 2 and asked.length == 8) for number in ids]
            if session.contexts and asked.length % 4:
                chosen = sorted(session.contexts)[: 1 + asked.length % len(session.contexts)]
            payload = filter_payload(asked.length, chosen)
            payload = payload[: len(payload) - (asked.length == 13)]
            return replace(asked, length=len(payload), payload=payload)
        if not asked.payload_length(mode):
            return asked
        asked = replace(asked, length=min(asked.length, LONGEST))
        number = next(self.numbers)
        if asked.offset > SIZE or number % 8 == 0:
            return replace(asked, payload=bytes(asked.length))
        return replace(asked, payload=stamp(number, asked.offset, asked.length).tobytes())

    def _send(
        self, which: int, batch: Sequence[tuple[Asked, Sequence[int]]], cuts: Sequence[int]
    ) -> None:
        client = self._client(which)
        wire = b""
        for asked, ids in batch:
            asked = self._complete(client, asked, ids)
            assert not disconnects(asked, client.session.mode)
            wire += client.begin(asked, next(self.numbers) * 0x9E3779B97F4A7C15 % (1 << 64))
        cut(client.peer, wire, cuts)

    def _collect(self, which: int) -> None:
        client = self.clients[which]
        assert client
        client.collect()

    @rule(which=_WHICH, batch=_BATCH, cuts=_CUTS)
    def ask(self, which: int, batch: Any, cuts: Sequence[int]) -> None:
        self._send(which, batch, cuts)

    @rule(which=_WHICH, batch=_BATCH)
    def ask_and_wait(self, which: int, batch: Any) -> None:
        """One after the other."""
        for each in batch:
            self._send(which, [each], [])
            self._collect(which)

    @rule(which=_WHICH)
    def collect(self, which: int) -> None:
        if self.clients[which]:
            self._collect(which)

    @rule(which=_WHICH)
    def read_all(self, which: int) -> None:
        self._send(which, [(Asked(Cmd.READ, 0, 0, self.disk.size), [])], [])
        self._collect(which)

    @rule(which=_WHICH)
    def flush(self, which: int) -> None:
        """What was acknowledged before, to whichever client, survives a power cut after it."""
        reading = self.judge.shadow.begin_read(0, self.disk.size)
        self._send(which, [(Asked(Cmd.FLUSH, 0, 0, 0), [])], [])
        self._collect(which)
        self.judge.shadow.judge(reading, self.thread.run(self.disk.stable()))

    @rule(which=_WHICH, asked=_requests())
    def write_through(self, which: int, asked: Asked) -> None:
        """So does a write with FUA, by itself."""
        client = self._client(which)
        offset = min(asked.offset, SIZE - 1)
        length = min(max(asked.length, 1), SIZE - offset)
        asked = self._complete(client, Asked(Cmd.WRITE, CmdFlag.FUA, offset, length), [])
        self._collect(which)
        cut(client.peer, client.begin(asked, 0), [])
        self._collect(which)
        if not self.disk.read_only:
            reading = self.judge.shadow.begin_read(offset, asked.length)
            stable = self.thread.run(self.disk.stable())
            self.judge.shadow.judge(reading, stable[offset : offset + asked.length])

    @rule(which=_WHICH, offset=_OFFSETS)
    def one_extent(self, which: int, offset: int) -> None:
        """Row X6: REQ_ONE gives the first extent as long as it is, while nothing changes."""
        client = self._client(which)
        for busy in filter(None, self.clients):
            busy.collect()
        offset = min(offset, SIZE - 1)
        length = self.disk.size - offset
        if client.session.contexts:
            every = client.peer.ask(Cmd.BLOCK_STATUS, offset, length).status
            one = client.peer.ask(Cmd.BLOCK_STATUS, offset, length, flags=CmdFlag.REQ_ONE).status
            assert set(every) == set(one) == set(client.session.contexts)
            for number, extents in every.items():
                (only,) = one[number]
                assert only.flags == extents[0].flags
                if len(extents) > 1:  # else that answer may be a short one
                    assert only.length == extents[0].length

    # The ends of sessions

    @rule(which=_WHICH, batch=_BATCH, garbage=_requests())
    def disconnect(self, which: int, batch: Any, garbage: Asked) -> None:
        """DISC: what was asked before is answered."""
        self._send(which, batch, [])
        client = self._client(which)
        disc = replace(garbage, command=Cmd.DISC, length=garbage.length & 0xFFFFFFFF)
        client.peer.send(client.bytes_of(disc, 7))
        client.collect()
        client.peer.expect_disconnect()
        self._over(which)

    @rule(which=_WHICH, batch=_BATCH, cut_one=_requests(), keep_bytes=st.integers(0, 1 << 20))
    def finish_in_the_middle(self, which: int, batch: Any, cut_one: Asked, keep_bytes: int) -> None:
        """What came whole is answered, the rest never was a request."""
        self._send(which, batch, [])
        client = self._client(which)
        part = client.bytes_of(self._complete(client, cut_one, [0]), 7)
        client.peer.send(part[: keep_bytes % len(part)])
        client.peer.finish()
        client.collect()
        client.peer.expect_disconnect()
        self._over(which)

    @rule(which=_WHICH, batch=_BATCH, keep_bytes=st.integers(0, 1 << 20))
    def vanish(self, which: int, batch: Any, keep_bytes: int) -> None:
        """Without waiting for anything, perhaps in the middle of a request."""
        client = self._client(which)
        self._send(which, batch[1:], [])
        part = client.bytes_of(self._complete(client, *batch[0]), 7)
        with suppress(BrokenPipeError):
            client.peer.send(part[: keep_bytes % len(part)])
        self._gone(which)

    def _gone(self, which: int) -> None:
        """Its requests may yet happen: until they have, or not, nobody else asks."""
        other = 1 - which
        if self.clients[other]:
            self._collect(other)
            client = self.clients[other]
            assert client
            client.give_up()
            self.clients[other] = None
        client = self.clients[which]
        assert client
        client.peer.sock.close()
        self.clients[which] = None
        self._alone()
        client.give_up()

    @rule(which=_WHICH, batch=_BATCH, how=st.sampled_from(["magic", "other magic", "payload"]))
    def break_a_rule(self, which: int, batch: Any, how: str) -> None:
        """There is no going on; what was asked before may be answered."""
        self._send(which, batch, [])
        client = self._client(which)
        mode = client.session.mode
        bad = client.bytes_of(Asked(Cmd.READ, 0, 0, 512), 7)
        if how == "magic":
            bad = bytes(4) + bad[4:]
        elif how == "other magic":
            extended = mode is Mode.EXTENDED
            magic = COMPACT_REQUEST_MAGIC if extended else EXTENDED_REQUEST_MAGIC
            bad = magic.to_bytes(4) + bad[4:]
        else:
            long = MAX_PAYLOAD + 1 if mode is not Mode.EXTENDED else 1 << 63
            bad = client.bytes_of(Asked(Cmd.WRITE, 0, 0, long), 7)
        with suppress(BrokenPipeError):
            client.peer.send(bad)
        client.collect_to_end()
        self._over(which)

    @rule(batches=st.tuples(_BATCH, _BATCH))
    def stop_the_server(self, batches: Any) -> None:
        """In the middle of requests: they are answered, or refused, or nobody knows."""
        for which, batch in enumerate(batches):
            self._send(which, batch, [])
        self.judge.stopping = True
        self.thread.loop.call_soon_threadsafe(self.server.stop)
        for client in self.clients:
            assert client
            client.collect_to_end()
        self.clients = [None, None]
        self.thread.ended()
        Path(self.path).unlink()
        self.judge.stopping = False
        self._serve()


TestConnections = unhurried(Connections.TestCase)
TestConnections.settings = profile(examples=50, steps=20)
