"""The memory that the requests and replies of all connections hold, and everybody's share of it.

Counted is what a client makes the server keep: payloads that come in, requests under way with what
they read or write, replies that wait to be taken. Bytes of a file that the socket will take from
the page cache hold none. The rules:

1. While not even half of it is used, it is for whoever comes.
2. The other half is for those who have proved that they take what they ask for, and end what they
   begin: who has moved so many bytes may want `TRUST` times as many.
3. A connection that holds nothing always has one short request at a time (of up to `SHORT` bytes):
   nobody starves, and everybody can prove it.
4. All others wait, and receive nothing meanwhile: in the order in which they came to wait, one
   batch each time that some is free. Who came late does not overtake them.
5. Who holds some and does not move is disconnected the sooner (`pynbd.server.stalls`).

So no more is held than the limit, one request of the longest kind, and one short request for each
connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from math import inf

# Bytes of a request that is served whatever others hold.
SHORT = 1 << 20
# How much more than ever before a connection may want.
TRUST = 4
# What a request under way is worth, apart from its bytes: a Task, and what it refers to.
REQUEST_COST = 1 << 12


class SharedMemory:
    """What there is for all; ``limit`` in bytes, 0 is no limit."""

    def __init__(self, limit: int = 0) -> None:
        # The part of those who have proved nothing, and all of it for those who have.
        self._limits = (limit // 2, limit) if limit else (inf, inf)
        self.used = 0
        self.short = False
        """Whether a connection has to ask before it takes some."""
        self._waiting: tuple[dict[Share, None], dict[Share, None]] = ({}, {})
        self._waking = False

    def left(self, *, proved: bool) -> bool:
        return self.used < self._limits[proved]

    def awaited(self, *, proved: bool) -> bool:
        """Whether somebody waits who has, or has not."""
        return bool(self._waiting[proved])

    def change(self, amount: int) -> None:
        self.used += amount
        self._look()

    def wait(self, share: Share, *, proved: bool) -> None:
        """Have ``share`` resumed in its turn."""
        self._waiting[not proved].pop(share, None)
        self._waiting[proved][share] = None
        self._look()

    def leave(self, share: Share) -> None:
        for waiting in self._waiting:
            waiting.pop(share, None)
        self._look()

    def _look(self) -> None:
        waiting = any(self._waiting)
        self.short = waiting or not self.left(proved=False)
        if waiting and not self._waking and self._next() is not None:
            self._waking = True
            # Not at once: it may be in the middle of a batch that somebody has memory again.
            asyncio.get_running_loop().call_soon(self._wake)

    def _next(self) -> Share | None:
        for proved in (True, False):
            if self._waiting[proved] and self.left(proved=proved):
                return next(iter(self._waiting[proved]))
        return None

    def _wake(self) -> None:
        self._waking = False
        share = self._next()
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
        self.held = 0

    def hold(self, amount: int) -> None:
        """So many bytes are held now."""
        if amount != self.held:
            change, self.held = amount - self.held, amount
            self._memory.change(change)

    @property
    def in_the_way(self) -> bool:
        """Whether others wait for what is held here."""
        memory = self._memory
        return bool(self.held) and (memory.awaited(proved=True) or memory.awaited(proved=False))

    def allows(self, wanted: int = 0) -> bool:
        """Whether a request that will hold ``wanted`` bytes may begin (0: any short one). False: it
        waits for its turn.
        """
        memory = self._memory
        if not memory.short or (not self.held and wanted <= SHORT):
            return True
        proved = (self._taken() + self.brought) * TRUST >= max(wanted, SHORT)
        if memory.left(proved=proved) and (self._its_turn or not memory.awaited(proved=proved)):
            return True
        memory.wait(self, proved=proved)
        return False

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
