"""The memory that the requests and replies of all connections hold, and everybody's share of it.

Counted is what a client makes the server keep: payloads that come in, requests under way with what
they read or write, replies that wait to be taken. Bytes of a file that the socket will take from
the page cache hold none. The rules:

1. While there is some left, it is for whoever comes.
2. When it is used up, a connection that holds nothing still has one short request at a time (one
   of up to `SHORT` bytes): nobody starves, and who leaves nothing unread notices little.
3. All others wait, and receive nothing meanwhile: in the order in which they came to wait, one
   batch each time that some is free. Who came late does not overtake them.
4. Who holds some and does not move is disconnected the sooner (`pynbd.server.stalls`).

So no more is held than the limit, one request of the longest kind, and one short request for each
connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context

# Bytes of a request that is served whatever others hold.
SHORT = 1 << 20
# What a request under way is worth, apart from its bytes: a Task, and what it refers to.
REQUEST_COST = 1 << 12


class SharedMemory:
    """What there is for all; ``limit`` in bytes, 0 is no limit."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self.used = 0
        self.short = False
        """Whether it is used up, or somebody waits: then each connection has to ask."""
        self._waiting: dict[Share, None] = {}
        self._waking = False

    @property
    def left(self) -> bool:
        return self.used < self._limit or not self._limit

    @property
    def awaited(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def change(self, amount: int) -> None:
        self.used += amount
        self._look()

    def wait(self, share: Share) -> None:
        """Have ``share`` resumed in its turn."""
        self._waiting[share] = None
        self._look()

    def leave(self, share: Share) -> None:
        self._waiting.pop(share, None)
        self._look()

    def _look(self) -> None:
        self.short = bool(self._waiting) or not self.left
        if self._waiting and self.left and not self._waking:
            self._waking = True
            # Not at once: it may be in the middle of a batch that somebody has memory again.
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = False
        if self._waiting and self.left:
            share = next(iter(self._waiting))
            del self._waiting[share]
            share.take_turn()
        self._look()


class Share:
    """That of one connection, made in its context; ``resume`` lets it go on after it had to
    wait.
    """

    def __init__(self, memory: SharedMemory, resume: Callable[[], None]) -> None:
        self._memory = memory
        self._resume = resume
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
        return self._memory.short and self.held > SHORT

    def allows(self, wanted: int = 0) -> bool:
        """Whether a request that will hold ``wanted`` bytes may begin (0: any short one). False: it
        waits for its turn.
        """
        memory = self._memory
        if not memory.short or (not self.held and wanted <= SHORT):
            return True
        if memory.left and (self._its_turn or not memory.awaited):
            return True
        memory.wait(self)
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
