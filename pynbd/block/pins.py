"""Pins: the host clusters that requests under way may still use.

A read or an in-place write maps first and does its I/O later. If it waits in between, somebody may
free the cluster that it was mapped to, and another may take it: the late bytes would be read from,
or land in, somebody else's data. So whoever may wait is inside `Pins.hold` from `map` to its last
system call, and a cluster is punched or used again only when everybody who was inside when it was
freed has left. What is mapped and done in one step of the loop needs no pin.

Nobody says which clusters he uses: time is divided into ages, each freed cluster ends one, and a
request pins all that was there in the age it began in. That costs two additions for a request,
and keeps a freed cluster no longer than the longest request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class _Age:
    """How many requests began between two freed clusters, and are still under way."""

    __slots__ = ("number", "over", "requests")

    def __init__(self, number: int) -> None:
        self.number = number
        self.requests = 0
        self.over: asyncio.Future[None] | None = None  # somebody waits for its last request

    def begin(self) -> None:
        self.requests += 1

    def end(self) -> None:
        self.requests -= 1
        if self.over is not None and not self.requests and not self.over.done():
            self.over.set_result(None)

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class Pins:
    """The ages of one image."""

    def __init__(self) -> None:
        self._ages = deque([_Age(0)])

    def hold(self) -> _Age:
        """A context manager: whatever is mapped inside is not used again before it is left."""
        return self._ages[-1]

    def end_age(self) -> int:
        """Clusters were freed: the number of the age that may still use them."""
        age = self._ages[-1]
        self._ages.append(_Age(age.number + 1))
        return age.number

    def gone(self, age: int) -> bool:
        """Whether every request that began in ``age`` or before has ended."""
        ages = self._ages
        while len(ages) > 1 and not ages[0].requests:
            ages.popleft()
        return ages[0].number > age

    async def drained(self) -> None:
        """Until every request that has begun has ended."""
        age = self.end_age()
        while not self.gone(age):
            oldest = self._ages[0]
            if oldest.over is None:
                oldest.over = asyncio.get_running_loop().create_future()
            await asyncio.shield(oldest.over)
