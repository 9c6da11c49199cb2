"""What decompression may take of a turn of the loop: one share for all images together.

A cluster costs what comes out of it, and the bytes of its stream, which may be full of blocks that
make nothing. So a share is so many clusters, and a millisecond, whichever is over first; and no
cluster is for the loop whose stream could take longer than three. What does not fit goes to the
pool.
"""

from __future__ import annotations

import asyncio
import threading
from time import perf_counter

# In bytes of clusters, and no more clusters than these, as small ones cost more than their bytes:
# about a millisecond's work with what known writers make.
TURN_BYTES = 1 << 19
TURN_CLUSTERS = 32
# Seconds after which no further cluster is begun.
TURN_SECONDS = 0.001
# What one cluster may cost (`compression.cost`): some 55 ns for each, if it is nothing but blocks
# that make nothing. As much as a cluster of the usual size.
MOST_COST = 64 << 10


class LoopShare(threading.local):
    """What is left in this turn of the loop that runs in this thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bytes = 0
        self._until = 0.0

    def allows(self, size: int) -> bool:
        """Whether there is room for a cluster of ``size`` bytes."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # another one in this thread: what the last one owed is gone
            self._loop = loop
            self._renew()
        return size <= self._bytes and (self._bytes == TURN_BYTES or perf_counter() < self._until)

    def take(self, size: int) -> None:
        """It is decompressed now."""
        if self._bytes == TURN_BYTES:
            self._until = perf_counter() + TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._renew)
        self._bytes -= max(size, TURN_BYTES // TURN_CLUSTERS)

    def _renew(self) -> None:
        self._bytes = TURN_BYTES


LOOP_SHARE = LoopShare()
