"""Buffers that all connections of a server take from and give back to.

A fresh buffer costs a page fault for every 4 KiB, many times what receiving into it costs, and an
idle connection needs none. Whoever takes a buffer owns it until it is given back.
"""

from __future__ import annotations

from pynbd.server.shares import SharedMemory

# Bytes of idle buffers that are kept.
IDLE_MAX = 8 << 20
# Replies that are built in place before they have to leave.
INLINE_SIZE = 1 << 19


class BufferPool:
    """Idle buffers by size, powers of two; and the one in which short replies are built.

    ``inline`` is free for whoever runs, from one `await` to the next. ``users``: the connections
    that take from here. ``memory``: what they may hold, all in all; no limit if none is given.
    """

    def __init__(self, memory: SharedMemory | None = None) -> None:
        self.users = 0
        self.memory = memory or SharedMemory()
        self._idle: dict[int, list[bytearray]] = {}
        self._idle_bytes = 0
        self.inline = bytearray(INLINE_SIZE)
        self.inline_view = memoryview(self.inline)

    def take(self, length: int) -> bytearray:
        """A buffer of at least ``length`` bytes (1 or more), with any content."""
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


class Lease:
    """A buffer in the hands of ``users``; the last of them gives it back."""

    __slots__ = ("_buffer", "_pool", "_users")

    def __init__(self, buffer: bytearray, users: int, pool: BufferPool) -> None:
        self._buffer = buffer
        self._users = users
        self._pool = pool

    def end(self) -> None:
        """One of the users is done."""
        self._users -= 1
        if not self._users:
            self._pool.give(self._buffer)
