"""Receive buffers that are used again.

A fresh buffer costs a page fault for every 4 KiB, many times what receiving into it costs. Buffers
whose bytes have been written to disk come back here.
"""

from __future__ import annotations

# Bytes of idle buffers that are kept for each session.
IDLE_MAX = 8 << 20


class BufferPool:
    """Idle buffers by size, powers of two."""

    def __init__(self) -> None:
        self._idle: dict[int, list[bytearray]] = {}
        self._idle_bytes = 0

    def take(self, length: int) -> bytearray:
        """A buffer of at least ``length`` bytes, with any content."""
        size = 1 << (length - 1).bit_length()
        idle = self._idle.get(size)
        if idle:
            self._idle_bytes -= size
            return idle.pop()
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take back a buffer that nobody reads any more."""
        if self._idle_bytes + len(buffer) <= IDLE_MAX:
            self._idle_bytes += len(buffer)
            self._idle.setdefault(len(buffer), []).append(buffer)
