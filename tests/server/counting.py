"""What a request costs: system calls of the disk and the socket, copied bytes, Tasks, hops into the
pool, looks at tables, memory. Counted where the kernel is asked, and told apart by thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pynbd.block import quick_writes
from pynbd.block.node import BlockNode
from pynbd.block.pool import Pool
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.server import transmission

_READS = ("pread", "preadv", "read", "readv")
_WRITES = ("pwrite", "pwritev", "write", "writev")
_SYNCS = ("fdatasync", "fsync")
_libc = ctypes.CDLL(None)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Call(NamedTuple):
    """One system call that has ended, and how many bytes it moved."""

    name: str
    in_loop: bool
    moved: int


class CountedSocket(socket.socket):
    """A socket that tells of the calls on it."""

    def __init__(self, sock: socket.socket, calls: list[str]) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._calls = calls

    def recv_into(self, *args: Any) -> int:
        self._calls.append("recv")
        return super().recv_into(*args)

    def send(self, *args: Any) -> int:
        self._calls.append("send")
        return super().send(*args)

    def sendmsg(self, *args: Any) -> int:
        self._calls.append("send")
        return super().sendmsg(*args)


class Costs:
    """What was spent since `start`. `wrap` is for the server's socket.

    It must not depend on when a busy machine lets us run, or on its dirty pages.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._loop_thread = threading.get_ident()
        self._counting = False
        self._disk: list[Call] = []
        self.socket_calls: list[str] = []  # in their order
        self._patch = patch
        self.tasks = 0
        self.hops = 0
        patch.setattr(transmission, "TURN_SECONDS", 60.0)
        patch.setattr(quick_writes, "SLOW", 60.0)
        patch.setattr(quick_writes, "writers_run_free", lambda _: True)
        for name in (*_READS, *_WRITES, *_SYNCS, "sendfile"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        for name in ("start", "start_in_lane"):
            patch.setattr(Pool, name, self._hopping(getattr(Pool, name)))

    def start(self) -> None:
        """Begin to count, in a running loop."""
        self._disk.clear()
        self.socket_calls.clear()
        self.tasks = self.hops = 0
        self._counting = True
        asyncio.get_running_loop().set_task_factory(self._task)

    def stop(self) -> None:
        """What comes from now on is not counted."""
        self._counting = False
        asyncio.get_running_loop().set_task_factory(None)

    async def at_best(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Count ``work``, once more if it met a page that the kernel was just moving elsewhere: for
        what never goes to the pool otherwise.
        """
        for _ in range(5):
            self.start()
            await work()
            self.stop()
            if not self.hops:
                return

    def wrap(self, sock: socket.socket) -> socket.socket:
        return CountedSocket(sock, self.socket_calls)

    @property
    def socket(self) -> Counter[str]:
        return Counter(self.socket_calls)

    def calls(self, *names: str, in_loop: bool | None = None) -> list[int]:
        """What each of these calls gave back; those of the loop's thread or the others', or all."""
        return [
            call.moved
            for call in self._disk
            if call.name in names and in_loop in (None, call.in_loop)
        ]

    def reads(self, *, in_loop: bool | None = None) -> list[int]:
        """Bytes of each read that brought more than the one byte of a probe."""
        return [count for count in self.calls(*_READS, in_loop=in_loop) if count > 1]

    def writes(self) -> list[int]:
        return self.calls(*_WRITES)

    def syncs(self) -> int:
        return len(self.calls(*_SYNCS))

    def sent(self) -> list[int]:
        """Bytes of each send-file."""
        return self.calls("sendfile")

    def times(self, owner: type, name: str) -> list[tuple[Any, ...]]:
        """A list to which each later call of a method adds its arguments."""
        asked: list[tuple[Any, ...]] = []
        method = getattr(owner, name)

        def counted(itself: Any, *args: Any, **rest: Any) -> Any:
            if self._counting:
                asked.append(args)
            return method(itself, *args, **rest)

        self._patch.setattr(owner, name, counted)
        return asked

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            if not self._counting:
                return call(*args)
            moved = 0
            try:
                value = call(*args)
                moved = len(value) if isinstance(value, bytes) else value or 0
                return value
            finally:
                in_loop = threading.get_ident() == self._loop_thread
                self._disk.append(Call(name, in_loop, moved))

        return counted

    def _hopping(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def counted(pool: Pool, *args: Any) -> Any:
            self.hops += self._counting
            return start(pool, *args)

        return counted

    def _task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **rest: Any) -> Any:
        self.tasks += 1
        return asyncio.Task(coroutine, loop=loop, **rest)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection on loopback, as `socket.socketpair` gives those of a unix socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


@contextmanager
def in_page_cache(*paths: Path) -> Iterator[None]:
    """Keep files in the page cache, which some hosts take away after a moment."""
    with ExitStack() as stack:
        for path in paths:
            file = stack.enter_context(path.open("rb"))
            pages = stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            _libc.mlock(np.frombuffer(pages, np.uint8).ctypes.data, len(pages))  # or not
            for at in range(0, len(pages), mmap.PAGESIZE):
                pages[at]
        yield


@contextmanager
def peak_memory(peaks: list[int]) -> Iterator[None]:
    """Append the most bytes that were allocated at a time, beyond those at the beginning."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


def table_lookups(node: BlockNode) -> int:
    """How often an L2 table was asked for, in all layers."""
    return sum(
        layer.mapping.tables.lookups for layer in node.chain() if isinstance(layer, Qcow2Node)
    )


async def take(sock: socket.socket, length: int, into: bytearray) -> None:
    """Receive ``length`` bytes, in no memory but ``into``, which they overwrite again and again."""
    loop = asyncio.get_running_loop()
    view = memoryview(into)
    while length:
        count = await loop.sock_recv_into(sock, view[: min(length, len(view))])
        assert count
        length -= count


def spread(count: int, step: int, seed: int = 0) -> list[int]:
    """``count`` different multiples of ``step`` in no order, none of which follows another."""
    return [2 * slot * step for slot in random.Random(seed).sample(range(count), count)]
