"""What is asked: requests from a seed, as a client may send them and as it may not.

"Request types" and "Block status payload" of the NBD specification. What a `Form` says of a disk
decides where requests begin and end: at the edges of what may differ, beside them, anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from interop.soak.shadow import stamp
from tests.conformance.client import Cmd, CmdFlag, Mode, filter_payload, request

CHANGES = (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
AT_ONCE = 16
"""Requests in flight: as many as qemu-nbd takes from one client."""

NO_FLAGS = CmdFlag(0)
UNKNOWN_ID = 0xFFFFFFF0
_LONGEST = 256 << 10
_COARSEST = 1 << 20
"""The granularity of bitmaps here, at most: what one request marks dirty, another one is told."""
_READ_WITH = 64 << 10
_LONGEST_OF_ALL = 2 << 20

READING = {
    "read": 40,
    "status": 38,
    "flush": 2,
    "write": 3,
    "trim": 2,
    "zeroes": 2,
    "wrong flags": 5,
    "wrong payload": 4,
}
WRITING = {
    "read": 14,
    "status": 16,
    "write": 28,
    "blank": 4,
    "zeroes": 18,
    "trim": 13,
    "flush": 3,
    "wrong flags": 2,
    "wrong payload": 1,
}
# On its own: what qemu-nbd reads ahead in a layer below, it copies, and says so in its maps.
READING_AHEAD = {"cache": 1}


class Ask(NamedTuple):
    """One request. ``length`` is the effect length; ``contexts`` those of a payload that filters,
    None without one, and "" stands for an id that no context has. ``junk`` is a payload of a
    command that has none.
    """

    kind: str
    command: Cmd
    offset: int = 0
    length: int = 0
    flags: CmdFlag = NO_FLAGS
    payload: bytes = b""
    contexts: tuple[str, ...] | None = None
    junk: bytes = b""

    def message(self, mode: Mode, cookie: int, ids: Mapping[str, int]) -> bytes:
        length, flags, payload = self.length, self.flags, self.payload
        if mode is Mode.EXTENDED and self.command == Cmd.WRITE:
            flags |= CmdFlag.PAYLOAD_LEN
        if self.contexts is not None:
            wanted = [ids.get(name, UNKNOWN_ID) for name in self.contexts]
            payload = filter_payload(self.length, wanted)
        if self.contexts is not None or self.junk:
            flags |= CmdFlag.PAYLOAD_LEN
            payload += self.junk
            length = len(payload)
        return request(
            mode, self.command, self.offset, length, flags=flags, cookie=cookie, payload=payload
        )

    @property
    def changes(self) -> bool:
        return self.command in CHANGES

    @property
    def end(self) -> int:
        return self.offset + self.length

    def __str__(self) -> str:
        told = f"{self.kind} of {self.length} at {self.offset}"
        told += f", {self.flags!r}" if self.flags else ""
        told += f", of {', '.join(self.contexts)}" if self.contexts is not None else ""
        return told + (f", {len(self.junk)} bytes of payload" if self.junk else "")


@dataclass(frozen=True)
class Form:
    """Bytes of a disk, of its clusters, of what has a state of its own; its metadata contexts.

    Most requests begin in the first ``hot`` bytes, if there is anything special about them.
    """

    size: int
    cluster_size: int
    subcluster_size: int
    contexts: tuple[str, ...]
    hot: int = 0


class Plan:
    """Requests without end to one connection, from a seed."""

    def __init__(self, form: Form, mode: Mode, kinds: Mapping[str, int], seed: str) -> None:
        self._form = form
        bitmaps = [name for name in form.contexts if name.startswith("qemu:dirty-bitmap:")]
        self._unit = max(form.cluster_size, _COARSEST if bitmaps else _READ_WITH)
        self._mode = mode
        self._kinds = [kind for kind in kinds if mode is not Mode.SIMPLE or kind != "status"]
        self._weights = [kinds[kind] for kind in self._kinds]
        self._rng = Random(f"{seed} {mode.value}")
        self._number = 0

    def batches(self, count: int) -> Iterator[list[Ask]]:
        """So many requests, together as long as no one asks for what another one changes."""
        batch, touched = list[Ask](), list[Ask]()
        for _ in range(count):
            ask = self.request()
            if len(batch) == AT_ONCE or any(self._meet(ask, other) for other in touched):
                yield batch
                batch, touched = [], []
            batch.append(ask)
            touched.append(ask)
        yield batch

    def _meet(self, ask: Ask, other: Ask) -> bool:
        if not ask.changes and not other.changes:
            return False
        unit = self._unit
        return ask.offset // unit * unit < other.end and other.offset // unit * unit < ask.end

    def request(self) -> Ask:
        rng = self._rng
        self._number += 1
        kind = rng.choices(self._kinds, self._weights)[0]
        offset, length = self._range()
        fua = CmdFlag.FUA if rng.random() < 0.03 else NO_FLAGS
        match kind:
            case "read":
                chunked = self._mode is not Mode.SIMPLE
                flags = CmdFlag.DF if chunked and rng.random() < 0.2 else NO_FLAGS
                return Ask(kind, Cmd.READ, offset, length, flags | fua)
            case "status":
                return self._status(fua)
            case "cache":
                return Ask(kind, Cmd.CACHE, offset, length, fua)
            case "flush":
                if rng.random() < 0.8:
                    return Ask(kind, Cmd.FLUSH, flags=fua)
                return Ask(kind, Cmd.FLUSH, offset % 1024, length % 1024, fua)
            case "write":
                payload = stamp(self._number, offset % (1 << 28), length).tobytes()
                return Ask(kind, Cmd.WRITE, offset, length, fua, payload)
            case "blank":
                return Ask(kind, Cmd.WRITE, offset, length, fua, bytes(length))
            case "trim":
                return Ask(kind, Cmd.TRIM, offset, length, fua)
            case "zeroes":
                return Ask(kind, Cmd.WRITE_ZEROES, offset, length, fua | self._zero_flags())
            case "wrong flags":
                return self._wrong_flags(offset, length)
            case _:
                return self._wrong_payload(offset, length)

    def _zero_flags(self) -> CmdFlag:
        no_hole = CmdFlag.NO_HOLE if self._rng.random() < 0.25 else NO_FLAGS
        return no_hole | (CmdFlag.FAST_ZERO if self._rng.random() < 0.2 else NO_FLAGS)

    def _status(self, flags: CmdFlag) -> Ask:
        rng, form = self._rng, self._form
        offset, length = self._range()
        if rng.random() < 0.3:
            length = max(form.size - offset, 0)
        if rng.random() < 0.35:
            flags |= CmdFlag.REQ_ONE
        contexts = None
        if self._mode is Mode.EXTENDED and rng.random() < 0.5:
            contexts = tuple(rng.sample(form.contexts, rng.randrange(1, len(form.contexts) + 1)))
        return Ask("status", Cmd.BLOCK_STATUS, offset, length, flags, contexts=contexts)

    def _wrong_flags(self, offset: int, length: int) -> Ask:
        """One flag or two that the command may not have, or may: no payload depends on them."""
        rng = self._rng
        command = rng.choice([Cmd.READ, Cmd.CACHE, Cmd.FLUSH, Cmd.BLOCK_STATUS, *CHANGES])
        flags = CmdFlag(1 << rng.choice([1, 2, 3, 4, 6, 9, 15]) | 1 << rng.choice([0, 2, 10]))
        if command == Cmd.WRITE:
            length %= 1024
            return Ask("write", command, offset, length, flags, bytes(length))
        return Ask("wrong flags", command, offset, length, flags)

    def _wrong_payload(self, offset: int, length: int) -> Ask:
        """In extended mode a payload where there is none, or one that filters wrongly."""
        rng, contexts = self._rng, self._form.contexts
        kind, junk = "wrong payload", rng.randbytes(rng.choice([1, 4, 13, 700]))
        if self._mode is not Mode.EXTENDED or rng.random() < 0.4:
            command = rng.choice([Cmd.READ, Cmd.CACHE, Cmd.FLUSH, Cmd.TRIM, Cmd.WRITE_ZEROES])
            if self._mode is Mode.EXTENDED:
                return Ask(kind, command, offset, length, junk=junk)
            return Ask(kind, command, offset, length, CmdFlag.PAYLOAD_LEN)
        one = rng.choice(contexts)
        names, junk = rng.choice(
            [
                ((), b""),
                ((one, one), b""),
                ((one, ""), b""),
                ((*contexts, ""), b""),
                (contexts, junk[:13]),
            ]
        )
        return Ask(kind, Cmd.BLOCK_STATUS, offset, length, contexts=names, junk=junk)

    def _range(self) -> tuple[int, int]:
        rng, form = self._rng, self._form
        if rng.random() < 0.02:
            return self._beyond()
        unit = rng.choice([1, 512, form.subcluster_size, form.cluster_size])
        room = form.hot if form.hot and rng.random() < 0.8 else form.size
        offset = rng.randrange(room) // unit * unit
        if rng.random() < 0.2:
            offset = max(offset + rng.choice([-512, -1, 1, 511]), 0)
        unit, longest = rng.choice(
            [
                (1, 700),
                (512, 64 << 10),
                (form.subcluster_size, 2 * form.cluster_size),
                (form.cluster_size, 4 * form.cluster_size),
                (1, 3 * form.cluster_size),
            ]
        )
        most = _LONGEST_OF_ALL if rng.random() < 0.02 else max(_LONGEST, unit)
        length = min(rng.randrange(longest // unit + 1) * unit, most)
        if rng.random() < 0.98:  # a length of 0 now and then
            length = max(length, unit)
        return offset, min(length, max(form.size - offset, 0))

    def _beyond(self) -> tuple[int, int]:
        """What does not lie on the disk, with a length that every header holds."""
        rng, size = self._rng, self._form.size
        offset = rng.choice([size - 256, size - 1, size, size + 1, 1 << 62, 1 << 63, (1 << 64) - 1])
        return offset, rng.choice([0, 1, 512, 4096])


def after(asks: Iterable[Ask]) -> Iterator[Ask]:
    """What makes two disks alike again: plain zeroes where fast ones may have been refused."""
    for ask in asks:
        if ask.command == Cmd.WRITE_ZEROES and ask.flags & CmdFlag.FAST_ZERO:
            yield ask._replace(flags=ask.flags & ~CmdFlag.FAST_ZERO)
