"""What decompression may take of a turn of the loop: one share for all images together.

A cluster costs what comes out of it, and the bytes of its stream, which may be full of blocks that
make nothing. Both are bounded, so that neither a chain of many images nor a stream that was made to
take long holds the loop for more than about three milliseconds; what does not fit goes to the pool.
"""

from __future__ import annotations

import asyncio
import threading

# In bytes of clusters, and no more clusters than these, as small ones cost more than their bytes:
# about a millisecond's work with what known writers make.
TURN_BYTES = 1 << 19
TURN_CLUSTERS = 32
# In bytes of streams (`compression.cost`), some 55 ns each if they are nothing but blocks that make
# nothing: as long as a cluster of the usual size.
TURN_COST = 64 << 10


class LoopShare(threading.local):
    """What is left in this turn of the loop that runs in this thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bytes = 0
        self._cost = 0.0

    def allows(self, size: int, cost: float) -> bool:
        """Whether there is room for a cluster of ``size`` bytes whose stream may ``cost`` so
        much.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # another one in this thread: what the last one owed is gone
            self._loop = loop
            self._renew()
        return size <= self._bytes and cost <= self._cost

    def take(self, size: int, cost: float) -> None:
        """It is decompressed."""
        if self._bytes == TURN_BYTES:
            asyncio.get_running_loop().call_soon(self._renew)
        self._bytes -= max(size, TURN_BYTES // TURN_CLUSTERS)
        self._cost -= cost

    def _renew(self) -> None:
        self._bytes, self._cost = TURN_BYTES, TURN_COST


LOOP_SHARE = LoopShare()
