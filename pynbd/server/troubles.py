"""What is told of requests that fail on the host: a line in the log, once for each kind of failure
and place.

A client may repeat a request that fails for ever, and a disk may fail all over; neither fills the
log. After a while everything may be told again: a disk that is full today is news next week.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable

log = logging.getLogger("pynbd")

MAX_LINES = 100
# Seconds after which what was told is news again.
PERIOD = 3600.0
# Bytes that count as one place: the largest cluster of qcow2.
PLACE = 2 << 20


class TroubleLog:
    """The failures of one export that were told, at most `MAX_LINES` in ``period`` seconds."""

    def __init__(self, period: float = PERIOD) -> None:
        self._period = period
        self._told: set[tuple[Hashable, int]] = set()
        self._since = time.monotonic()

    def tell(self, line: str, kind: Hashable, offset: int) -> None:
        """Log ``line``, if this ``kind`` of failure is news at this guest offset."""
        now = time.monotonic()
        if now - self._since > self._period:
            self._told.clear()
            self._since = now
        failure = kind, offset // PLACE
        if failure in self._told or len(self._told) == MAX_LINES:
            return
        self._told.add(failure)
        log.error("%s", line)
        if len(self._told) == MAX_LINES:
            log.error("more requests may fail, which is not told for a while")
