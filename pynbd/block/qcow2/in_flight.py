"""Ranges of guest clusters whose mapping is being changed: who overlaps waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager


class InFlight:
    """The changes under way. Reads and writes in place do not meet here: they have pins."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._waiting: list[asyncio.Future[None]] = []

    def overlap(self, first: int, last: int) -> bool:
        """Whether somebody changes one of clusters [first, last)."""
        return any(first < end and start < last for start, end in self._ranges)

    def alone(self, ranges: Sequence[tuple[int, int]]) -> AbstractAsyncContextManager[None]:
        """Nobody else changes these ranges of clusters (first, last + 1) inside the block.

        All are entered at once, so that no two can wait for each other.
        """
        return _Alone(self, ranges)

    async def enter(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The beginning of `alone`."""
        while self._ranges and any(self.overlap(first, last) for first, last in ranges):
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        self._ranges += ranges

    def leave(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The end of `alone`."""
        for entered in ranges:
            self._ranges.remove(entered)
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


class _Alone(AbstractAsyncContextManager[None]):
    """Every write that allocates comes through here: a generator would cost it several times
    more.
    """

    def __init__(self, in_flight: InFlight, ranges: Sequence[tuple[int, int]]) -> None:
        self._in_flight = in_flight
        self._ranges = ranges

    async def __aenter__(self) -> None:
        await self._in_flight.enter(self._ranges)

    async def __aexit__(self, *_: object) -> None:
        self._in_flight.leave(self._ranges)


def ranges_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (first, last + 1)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = ranges[-1][0], number + 1
        else:
            ranges.append((number, number + 1))
    return ranges
