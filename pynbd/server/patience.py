"""Whether a connection waits a moment for the next request itself, before the event loop does.

A thread that sleeps in the loop is woken late: 50 us after the request came are usual, more on a
virtual machine, and as long as serving it takes. A client that asks one thing at a time is best
served by somebody who is still awake. So a connection that is alone on the server goes on looking
for so long as such a client needs; those who disappoint are looked out for more and more seldom.

Clients that ask many things at a time are better served in batches, which form while nobody looks.
"""

from __future__ import annotations

import os

# Seconds: what a client may take from a reply to its next request.
LONGEST = 60e-6
# So many times in a row the client has asked one thing only.
LONE_REQUESTS = 8
# After n disappointments in a row so many chances are let pass: 2 ** n, no more than this.
MOST_LET_PASS = 1 << 10


class Patience:
    """That of one connection."""

    def __init__(self) -> None:
        # Somebody else has to run meanwhile: the client, to begin with.
        self._possible = len(os.sched_getaffinity(0)) > 1
        self._lone = 0
        self._let_pass = 0
        self._disappointed = 0

    def received(self, requests: int) -> None:
        """So many requests came at a time."""
        self._lone = self._lone + 1 if requests == 1 else 0

    def worth_it(self) -> bool:
        """Whether to look for the next request this time."""
        if self._lone < LONE_REQUESTS:
            return False
        if self._let_pass:
            self._let_pass -= 1
            return False
        return self._possible

    def came(self) -> None:
        """It came."""
        self._disappointed = 0

    def did_not_come(self) -> None:
        """It did not."""
        self._disappointed += 1
        self._let_pass = min(1 << self._disappointed, MOST_LET_PASS)
