"""A seeded mix of requests, several of them in flight on several connections, judged as they go.

1. What is asked for is decided by the seed; in which order the answers come is not.
2. Half of the requests meet in a few hot places, so that they overlap and clusters are freed and
   taken again.
3. A discard of whole clusters leaves zeroes, one of less may leave what was there. Where the image
   has a version that cannot say so, a discard may do nothing; it never shows what lies below.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import NamedTuple

import numpy as np

from interop.soak.shadow import Change, Mismatch, Shadow, stamp
from pynbd.client.connection import Client
from pynbd.errors import RequestError
from pynbd.protocol.values import Error

IN_FLIGHT = 16
CONNECTIONS = 3
ALLOCATION = "base:allocation"
_ZERO = 2  # NBD_STATE_ZERO

# A blank is a write of zero bytes.
KINDS = {"write": 34, "blank": 2, "zeroes": 12, "trim": 9, "read": 32, "status": 4, "flush": 7}
_HOT_PLACES = 6


class _Left(Exception):
    """The last request was asked, and others are in flight."""


class Request(NamedTuple):
    """One request; ``number`` is what `stamp` writes. A trim or zeroes of ``length`` bytes."""

    number: int
    kind: str
    offset: int = 0
    length: int = 0
    fua: bool = False
    no_hole: bool = False
    fast_zero: bool = False


@dataclass(frozen=True)
class Form:
    """What the mix has to know of a disk: lengths in bytes; whether discarded clusters read as
    zeroes.

    A disk that is too large for a shadow is seen through windows of whole clusters, which begin
    every ``stride`` bytes: ``size`` is that of all of them, and no request leaves its window.
    """

    size: int
    cluster_size: int
    subcluster_size: int
    zeroes_what_is_discarded: bool = True
    window: int = 0
    stride: int = 0

    def place(self, offset: int) -> int:
        """Where on the disk a byte is that the windows, put together, have at ``offset``."""
        if not self.window:
            return offset
        return offset // self.window * self.stride + offset % self.window

    def room(self, offset: int) -> int:
        """How many bytes from there on are in one piece."""
        return self.window - offset % self.window if self.window else self.size - offset


class Plan:
    """Requests without end, from a seed."""

    def __init__(self, form: Form, seed: str) -> None:
        self._form = form
        self._rng = Random(seed)
        self._hot = [self._rng.randrange(form.size) for _ in range(_HOT_PLACES)]
        self._longest = min(form.size, 4 << 20)

    def request(self, number: int) -> Request:
        rng = self._rng
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "flush":
            return Request(number, kind)
        offset, length = self._range()
        if kind in ("read", "status"):
            return Request(number, kind, offset, length)
        fua = rng.random() < 0.04
        zeroes = kind == "zeroes"
        no_hole, fast_zero = zeroes and rng.random() < 0.3, zeroes and rng.random() < 0.2
        return Request(number, kind, offset, length, fua, no_hole, fast_zero)

    def _range(self) -> tuple[int, int]:
        """Bytes, sectors, about a cluster, several of them, now and then a lot."""
        rng, form = self._rng, self._form
        cluster = form.cluster_size
        unit, longest = rng.choices(
            [
                (1, 700),
                (512, 64 << 10),
                (form.subcluster_size, 2 * cluster),
                (cluster, max(4 * cluster, 128 << 10)),
                (1, max(3 * cluster, 64 << 10)),
                (1, self._longest),
            ],
            [20, 25, 20, 20, 14, 1] if cluster < 1 << 20 else [30, 35, 25, 4, 5, 1],
        )[0]
        longest = min(longest, self._longest)
        length = max(rng.randrange(longest // unit + 1) * unit, min(unit, form.size))
        start = rng.choice(self._hot) if rng.random() < 0.5 else rng.randrange(form.size)
        start = max(start - rng.randrange(length + 1), 0) // unit * unit
        return start, min(length, form.room(start))


class Mix:
    """Sends the requests of plans to a server, and judges what comes back by a shadow.

    ``changes`` are those that the server has carried out, ``counts`` says how many of each kind
    were answered. ``tolerated``: errors that are right, for a disk that has no room.
    """

    def __init__(self, shadow: Shadow, form: Form, *, tolerated: Sequence[Error] = ()) -> None:
        self.shadow = shadow
        self.counts: Counter[str] = Counter()
        self.changes: list[Request] = []
        self._form = form
        self._tolerated = frozenset(tolerated)
        self._numbers = count(1)

    async def run(
        self,
        uri: str,
        requests: int,
        seed: str,
        *,
        connections: int = CONNECTIONS,
        in_flight: int = IN_FLIGHT,
        leave: bool = False,
    ) -> None:
        """Ask ``requests`` of them; raises `Mismatch`, and what the server should not answer.

        ``leave``: the clients do not wait for the last answers.
        """
        plan = Plan(self._form, seed)
        wanted = (plan.request(next(self._numbers)) for _ in range(requests))
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(await Client.open(uri, contexts=[ALLOCATION]))
                for _ in range(connections)
            ]
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(in_flight):
                        client = clients[number % connections]
                        group.create_task(self._work(client, wanted, leave=leave))
            except BaseExceptionGroup as failures:
                _, others = failures.split(_Left)
                if others:
                    raise others.exceptions[0] from None
                self.counts["left"] += 1

    async def read_all(self, uri: str) -> None:
        """Judge the whole disk. Nothing else is in flight: the shadow is exact afterwards."""
        async with await Client.open(uri) as client:
            offset = 0
            while offset < self._form.size:
                length = min(1 << 20, self._form.room(offset))
                await self._read(client, Request(0, "read", offset, length))
                offset += length
        assert not self.shadow.unsettled

    async def _work(self, client: Client, wanted: Iterator[Request], *, leave: bool) -> None:
        for request in wanted:
            try:
                await self._ask(client, request)
            except (Mismatch, RequestError) as error:
                error.add_note(f"{request}")
                raise
            self.counts[request.kind] += 1
        if leave:
            raise _Left

    async def _ask(self, client: Client, request: Request) -> None:
        match request.kind:
            case "read":
                await self._read(client, request)
            case "status":
                await self._status(client, request)
            case "flush":
                await self._flush(client)
            case _:
                await self._change(client, request)

    async def _read(self, client: Client, request: Request) -> None:
        reading = self.shadow.begin_read(request.offset, request.length)
        got = await client.pread(self._form.place(request.offset), request.length)
        self.shadow.judge(reading, np.frombuffer(got, np.uint8))

    async def _status(self, client: Client, request: Request) -> None:
        """What is said to read as zeroes has to."""
        reading = self.shadow.begin_read(request.offset, request.length)
        place = self._form.place(request.offset)
        status = (await client.block_status(place, request.length))[ALLOCATION]
        offset = request.offset
        for length, flags in status:
            if flags & _ZERO:
                self.shadow.judge_zeroes(reading, offset, length)
            offset += length
        self.shadow.forget(reading)

    async def _flush(self, client: Client) -> None:
        try:
            await client.flush()
        except RequestError as error:
            if error.error not in self._tolerated:
                raise
            self.counts[f"flush: {Error(error.error)}"] += 1

    async def _change(self, client: Client, request: Request) -> None:
        changes = list(self._begin(request))
        try:
            await self._send(client, request)
        except RequestError as error:
            if request.fast_zero and error.error == Error.ENOTSUP:
                ended = self.shadow.refused
            elif error.error in self._tolerated:
                ended = self.shadow.failed
            else:
                raise
            self.counts[f"{request.kind}: {Error(error.error)}"] += 1
        else:
            ended = self.shadow.completed
            self.changes.append(request)
        for change in changes:
            ended(change)

    def _begin(self, request: Request) -> Iterator[Change]:
        number, kind, offset, length, *_ = request
        if kind == "write":
            yield self.shadow.begin(offset, length, stamp(number, offset, length))
        elif kind == "trim":
            yield from self._begin_trim(offset, offset + length)
        else:
            yield self.shadow.begin(offset, length)

    def _begin_trim(self, offset: int, end: int) -> Iterator[Change]:
        first, last = self._whole(offset, end, self._form.subcluster_size)
        start, stop = self._whole(offset, end, self._form.cluster_size)
        if start == stop or not self._form.zeroes_what_is_discarded:
            pieces = [(first, last, True)]
        else:
            pieces = [(first, start, True), (start, stop, False), (stop, last, True)]
        for piece, until, optional in pieces:
            if piece < until:
                yield self.shadow.begin(piece, until - piece, optional=optional)

    def _whole(self, offset: int, end: int, unit: int) -> tuple[int, int]:
        """The whole units of a range; the last one of the disk may be short."""
        first = min(-(-offset // unit) * unit, end)
        last = end if end == self._form.size else end // unit * unit
        return first, max(first, last)

    async def _send(self, client: Client, request: Request) -> None:
        number, kind, offset, length, fua, no_hole, fast_zero = request
        place = self._form.place(offset)
        if kind == "write":
            await client.pwrite(place, stamp(number, offset, length).tobytes(), fua=fua)
        elif kind == "blank":
            await client.pwrite(place, bytes(length), fua=fua)
        elif kind == "zeroes":
            await client.write_zeroes(place, length, fua=fua, no_hole=no_hole, fast_zero=fast_zero)
        else:
            await client.trim(place, length, fua=fua)
