"""The threads for calls that may wait for a disk.

``run_in_executor`` does the same with a future of its own for each side, three locks and a wake-up
of the loop for each call, most of it in the thread, which fights the loop for the interpreter all
that time. Here a thread takes a call, makes it, and puts the outcome into the loop's tray; the loop
is woken once for all that lies there.

Threads take the calls of those who ask (`ASKING`) in turn: one who lets hundreds of them wait for a
disk takes no more than a turn from the others.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from pynbd.block.turns import ASKING, Turns

T = TypeVar("T")


class _Tray:
    """The outcomes that one event loop has not seen yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
        self.loop = loop
        self._pool = pool
        self._outcomes: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._woken = False

    def put(self, future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
        """From any thread."""
        self._outcomes.append((future, value, error))
        # Who finds the loop woken has put his before it looks, as `_deliver` clears this first.
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._outcomes:
            future, value, error = self._outcomes.popleft()
            self._pool.busy -= 1
            if future.done():
                continue  # it was cancelled
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)


_Work = tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...], _Tray]


class Lane:
    """Calls that are made one after the other, because they would wait for each other anyway: by
    one thread, which goes on to the next without a hop.
    """

    def __init__(self) -> None:
        self._calls: Turns[_Work] = Turns()
        self._taken = False  # by a thread, or soon
        self._lock = threading.Lock()

    def add(self, work: _Work) -> bool:
        """Whether a thread has to be sent."""
        with self._lock:
            self._calls.add(ASKING.get(), work)
            taken, self._taken = self._taken, True
        return not taken

    def next(self) -> _Work | None:
        """The next one for the thread that is here; None: it may go."""
        with self._lock:
            work = self._calls.next()
            self._taken = work is not None
            return work


class Pool:
    """At most ``threads`` threads, started when they are needed. Where the host lets not even one
    start, calls are made by who asks for them.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.busy = 0  # calls that are waiting, under way, or not delivered
        self._most = threads
        self._name = name
        self._threads: list[threading.Thread] = []
        self._work: Turns[_Work | Lane] = Turns()
        self._lock = threading.Lock()  # around them
        self._more: SimpleQueue[bool] = SimpleQueue()  # True for each of them, False for the end
        self._tray: _Tray | None = None
        self._closed = False

    def start(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Have ``call(*args)`` made. The future is done when it has returned, unless it is
        cancelled: then the call is not made, or goes on by itself.
        """
        work = self._work_of(call, args)
        self._send(ASKING.get(), work)
        return work[0]

    def start_in_lane(self, lane: Lane, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """`start`, one after the other with all that is in the lane."""
        work = self._work_of(call, args)
        if lane.add(work):
            self._send(lane, lane)
        return work[0]

    def _work_of(self, call: Callable[..., Any], args: tuple[Any, ...]) -> _Work:
        if self._closed:
            raise RuntimeError("the threads have ended")
        loop = asyncio.get_running_loop()
        if self._tray is None or self._tray.loop is not loop:
            self._tray = _Tray(loop, self)
        self.busy += 1
        return loop.create_future(), call, args, self._tray

    def _send(self, who: object, work: _Work | Lane) -> None:
        with self._lock:
            self._work.add(who, work)
        self._more.put(True)
        if self.busy > len(self._threads) < self._most:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the host has none left: those that are here make all calls
                if not self._threads:
                    self._more.put(False)
                    self._run()
            else:
                self._threads.append(thread)

    def close(self) -> None:
        """Wait for the calls under way; those that are waiting are not made."""
        self._closed = True
        for _ in self._threads:
            self._more.put(False)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while self._more.get():
            with self._lock:
                work = self._work.next()
            assert work is not None
            if isinstance(work, Lane):
                while (of_lane := work.next()) is not None:
                    self._make(of_lane)
            else:
                self._make(work)
            del work  # nothing is held while the thread waits

    def _make(self, work: _Work) -> None:
        future, call, args, tray = work
        value: Any = None
        error: BaseException | None = None
        if future.cancelled() or self._closed:
            error = asyncio.CancelledError()
        else:
            try:
                value = call(*args)
            except BaseException as raised:
                error = raised
        tray.put(future, value, error)
