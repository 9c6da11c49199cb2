"""Whoever neither takes its replies nor ends what it has begun is disconnected after a time.

Two things can stall: replies that wait for the client, and a request that has begun to come in. A
connection between two requests owes nothing, and may be silent for ever. The rules:

1. Nothing is done for a connection that owes nothing: the timer is set when something comes to be
   owed, looks from time to time, and is not set again once all is done.
2. Moving is what counts, at `LEAST_RATE` at least: one byte a second is none.
3. The time is long, as a client in a debugger, a machine that is suspended or a network that is
   away for minutes have done nothing wrong.
4. While others wait for memory that this one holds, the time is short, and it has to move so much
   that it is done with it in `LONGEST_WHEN_SHORT`: a few slow ones could keep it for hours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from pynbd.server.limits import Limits
from pynbd.server.shares import Share
from pynbd.server.stream import Stream

# Bytes a second: less is no progress. A line of 64 kbit/s has twice as much.
LEAST_RATE = 4096
# Seconds that the limit falls to while others have to wait for memory.
LIMIT_WHEN_SHORT = 15.0
# Seconds in which all that is held has to move then: of 32 MiB, 450 kbit/s.
LONGEST_WHEN_SHORT = 600.0
# How often it is looked in each of these times.
_LOOKS = 4


class Brought(NamedTuple):
    """``done``: how many bytes have come of a request. ``wanted``: the connection takes more."""

    done: int
    wanted: bool


class _Watched:
    """Something that may be owed; how long it has hardly moved."""

    def __init__(self, complaint: str) -> None:
        self.complaint = complaint
        self._since = 0.0
        self._mark: tuple[int, int] | None = None

    def stalled(self, now: float, rate: float, number: int, done: int | None) -> float | None:
        """Seconds that it has moved at less than ``rate``; None: nothing is owed (``done`` is
        None).

        ``number``: which it is; if it is another one, the one before has ended.
        """
        if done is None:
            self._mark = None
            return None
        mark = self._mark
        if (
            mark is None
            or mark[0] != number
            or done - mark[1] >= max(1, rate * (now - self._since))
        ):
            self._since, self._mark = now, (number, done)
        return now - self._since


class Stalls:
    """Those of one connection.

    ``brought``: how far the request is that has begun to come in; None if there is none.
    ``give_up`` is called, with the reason, when the time is over.
    """

    def __init__(
        self,
        limits: Limits,
        stream: Stream,
        share: Share,
        brought: Callable[[], Brought | None],
        give_up: Callable[[str], None],
    ) -> None:
        self._limit = limits.stall_seconds
        self._stream = stream
        self._share = share
        self._brought = brought
        self._give_up = give_up
        self._ending = False
        self._request = 0  # a number of the one that has begun
        self._replies = _Watched("it has taken too little of its replies for {:g} s")
        self._requests = _Watched("it has brought too little of a request for {:g} s")
        self._timer: asyncio.TimerHandle | None = None

    def owed(self, *, ending: bool = False) -> None:
        """The rest of the replies is owed: look after it from now on.

        ``ending``: nothing more will be sent, and what is lent has to be taken as well.
        """
        self._ending |= ending
        if self._timer is None and self._limit:
            self._look()

    def begun(self, *, another: bool = True) -> None:
        """The rest of a request is owed; of ``another`` one than before."""
        self._request += another
        if self._timer is None and self._limit:
            self._look()

    def close(self) -> None:
        """Nothing is owed any more."""
        self._limit = 0
        if self._timer:
            self._timer.cancel()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now, brought, stream = loop.time(), self._brought(), self._stream
        if brought and not brought.wanted:
            self._request += 1  # no time passes for it
        waits = stream.queued or (self._ending and stream.lent)
        short = min(self._limit, LIMIT_WHEN_SHORT)
        limit, rate = self._limit, float(LEAST_RATE)
        if self._share.in_the_way:
            limit, rate = short, max(rate, self._share.held / LONGEST_WHEN_SHORT)
        times = {
            self._replies: self._replies.stalled(now, rate, 0, stream.taken() if waits else None),
            self._requests: self._requests.stalled(
                now, rate, self._request, brought.done if brought else None
            ),
        }
        self._timer = None
        for watched, stalled in times.items():
            if stalled is not None and stalled >= limit:
                self._give_up(watched.complaint.format(limit))
                return
        if any(stalled is not None for stalled in times.values()):
            self._timer = loop.call_later(short / _LOOKS, self._look)
