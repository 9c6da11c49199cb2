"""The memory that the requests and replies of all connections hold, and everybody's share of it.

Counted is what a client makes the server keep: payloads that come in, requests under way with what
they read or write, replies that wait to be taken. Bytes of a file that the socket will take from
the page cache hold none. The rules:

1. A connection that holds nothing always has one short request at a time (of up to `SHORT` bytes,
   or a BLOCK_STATUS): nobody starves, and everybody can prove that he takes what he asks for. What
   a connection holds up to `SHORT` is not counted: many who hold little keep nobody waiting.
2. One half of the memory is for whoever comes.
3. The rest is for those who have proved that they take what they ask for, and end what they begin:
   who has moved so many bytes may hold `TRUST` times as many. What they hold is not counted in the
   half of those who come.
4. All others wait, and receive nothing meanwhile: in the order in which they came to wait, one
   batch each time that some is free. Who came late does not overtake them.
5. Who holds some that others wait for has to move the faster (`pynbd.server.stalls`).

So no more is held than the limit, one request of the longest kind, and for each connection one
short request, or the answer to a BLOCK_STATUS (2 MiB).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from itertools import count
from math import inf
from operator import itemgetter

# Bytes of a request that is served whatever others hold.
SHORT = 1 << 20
# How much more than ever before a connection may want.
TRUST = 4
# What a request under way is worth, apart from its bytes: a Task, and what it refers to.
REQUEST_COST = 1 << 12


class SharedMemory:
    """What there is for all; ``limit`` in bytes, 0 is no limit."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit or inf
        self.used = 0
        """All that is held."""
        self._counted = 0  # of it, and of that what those hold who have proved nothing
        self._unproved = 0
        self.short = False
        """Whether a connection has to ask before it takes some."""
        # Those who wait, proved or not, in order; with the numbers in which they came.
        self._waiting: dict[bool, dict[Share, int]] = {True: {}, False: {}}
        self._numbers = count()
        self._waking = False

    @property
    def full(self) -> bool:
        return self._counted >= self._limit

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for some."""
        return any(self._waiting.values())

    def left(self, *, proved: bool) -> bool:
        return not self.full and (proved or 2 * self._unproved < self._limit)

    def change(self, held: int, counted: int, *, proved: bool) -> None:
        """So much more is held and counted, of somebody who has proved himself or not."""
        self.used += held
        self._counted += counted
        if not proved:
            self._unproved += counted
        self._look()

    def wait(self, share: Share, *, proved: bool) -> None:
        """Have ``share`` resumed in its turn."""
        self._waiting[not proved].pop(share, None)
        self._waiting[proved].setdefault(share, next(self._numbers))
        self._look()

    def leave(self, share: Share) -> None:
        for waiting in self._waiting.values():
            waiting.pop(share, None)
        self._look()

    def next_in_turn(self) -> Share | None:
        """Of those who wait, the first for whom there is some."""
        heads = [
            next(iter(waiting.items()))
            for proved, waiting in self._waiting.items()
            if waiting and self.left(proved=proved)
        ]
        return min(heads, key=itemgetter(1))[0] if heads else None

    def _look(self) -> None:
        self.short = self.awaited or not self.left(proved=False)
        if self.awaited and not self._waking and self.next_in_turn() is not None:
            self._waking = True
            # Not at once: it may be in the middle of a batch that somebody has memory again.
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        share = self.next_in_turn()
        if share is not None:
            self.leave(share)
            share.take_turn()
        self._look()


class Share:
    """That of one connection, made in its context. ``resume`` lets it go on after it had to wait;
    ``taken``: how many bytes its client has taken so far. ``brought``: how many in long payloads.
    """

    def __init__(
        self, memory: SharedMemory, resume: Callable[[], None], taken: Callable[[], int]
    ) -> None:
        self._memory = memory
        self._resume = resume
        self._taken = taken
        self.brought = 0
        self._context: Context = copy_context()
        self._its_turn = False
        self._proved = False  # when it was last allowed to begin something
        self.held = 0
        self._counted = 0

    def hold(self, amount: int) -> None:
        """So many bytes are held now."""
        if amount != self.held:
            counted = max(amount - SHORT, 0)
            held, more = amount - self.held, counted - self._counted
            self.held, self._counted = amount, counted
            self._memory.change(held, more, proved=self._proved)

    @property
    def in_the_way(self) -> bool:
        """Whether others wait for what is held here."""
        memory = self._memory
        return bool(self._counted) and memory.awaited and (memory.full or not self._proved)

    def allows(self, wanted: int = 0) -> bool:
        """Whether a request that will hold ``wanted`` bytes may begin (0: any short one). False: it
        waits for its turn.
        """
        memory = self._memory
        if not memory.short or (not self.held and wanted <= SHORT):
            return True
        moved = self._taken() + self.brought
        proved = moved * TRUST >= max(self.held + wanted, SHORT)
        if memory.left(proved=proved) and (self._its_turn or memory.next_in_turn() is None):
            self._count_as(proved)
            return True
        memory.wait(self, proved=proved)
        return False

    def _count_as(self, proved: bool) -> None:
        if proved != self._proved:
            self._memory.change(0, -self._counted, proved=self._proved)
            self._proved = proved
            self._memory.change(0, self._counted, proved=proved)

    def take_turn(self) -> None:
        self._its_turn = True
        try:
            self._context.run(self._resume)
        finally:
            self._its_turn = False

    def close(self) -> None:
        """Nothing is held any more, and nothing waited for."""
        self.hold(0)
        self._memory.leave(self)
