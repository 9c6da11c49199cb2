"""Servers in a thread of their own, with a loop of its own: for callers that have no loop, or block
theirs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

from pynbd.server.disk import Disk
from pynbd.server.memory import MemoryDisk
from pynbd.server.serving import serve


class ServerThread:
    """A thread that serves until `stop`. ``errors`` gets what it logs as an error, such as why a
    request has failed: clients are told in one word.
    """

    def __init__(self, errors: list[str]) -> None:
        self._pool = ThreadPoolExecutor(1, "pynbd")
        self._ready = threading.Event()
        self._running = self._pool.submit(self._run, errors)
        self._running.add_done_callback(lambda _: self._ready.set())  # there may be no loop to have
        self._ready.wait()
        if self._running.done():
            self._end()

    def _run(self, errors: list[str]) -> None:
        asyncio.run(self._serve_all(errors))

    async def _serve_all(self, errors: list[str]) -> None:
        log = logging.getLogger("pynbd")
        handler = _Errors(errors)
        log.addHandler(handler)
        try:
            async with AsyncExitStack() as self._stack:
                self._loop = asyncio.get_running_loop()
                self._stopped = asyncio.Event()
                self._ready.set()
                await self._stopped.wait()
        finally:
            log.removeHandler(handler)

    def serve(self, image: str | os.PathLike[str] | Disk | bytes | int, **options: Any) -> str:
        """Serve an image, or a `MemoryDisk` of these bytes or of this size, with the options of
        `pynbd.server.serving.serve`; the URI, where clients can connect when this returns.
        """
        __tracebackhide__ = True  # pytest shows the test's own line, and what went wrong
        if isinstance(image, bytes | int):
            image = MemoryDisk(image)
        serving = self._stack.enter_async_context(serve(image, **options))
        return asyncio.run_coroutine_threadsafe(serving, self._loop).result().uri

    def stop(self) -> None:
        """End every server and the thread. Raises what went wrong at the end."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._end()

    def _end(self) -> None:
        with self._pool:
            self._running.result()


class _Errors(logging.Handler):
    """Keeps the errors of the thread that it was made in."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._errors.append(self.format(record))
