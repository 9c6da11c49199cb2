"""An event loop in a thread, for a server whose client is the test: what is left behind is seen.

``HYPOTHESIS_PROFILE=long`` runs the machines of this folder long, over examples that differ each
time::

    HYPOTHESIS_PROFILE=long EXAMPLES=5000 pytest --hypothesis-seed=1 tests/model

The seed is printed at the end of a run that failed, and the example in full.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis.errors import StopTest

from pynbd.server.export import ExportTable
from pynbd.server.limits import Limits
from pynbd.server.listening import listen_unix
from pynbd.server.server import Server
from pynbd.server.tls import Tls
from tests.conformance.client import DEADLINE

T = TypeVar("T")

LONG: Final = os.environ.get("HYPOTHESIS_PROFILE") == "long"
LOOPS: Final[Mapping[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
_PATIENT: Final = Limits(handshake_seconds=0)  # a busy machine takes its time
unhurried: Final = pytest.mark.timeout(0 if LONG else 600)  # a failure is made small first

for make in LOOPS.values():
    make().close()  # the first one of a kind opens what all of them share


def profile(examples: int, steps: int) -> settings:
    """So many examples of so many steps in a run of all tests, the same ones each time."""
    return settings(
        max_examples=int(os.environ.get("EXAMPLES", "1000")) if LONG else examples,
        stateful_step_count=steps,
        derandomize=not LONG,
        database=None,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class _Defects(logging.Handler):
    """What a server says that it must never have to say."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(self.format(record))


class LoopThread:
    """A running event loop, and a server in it."""

    def __init__(self, kind: str) -> None:
        self.loop = LOOPS[kind]()
        run = self.loop.run_forever
        self._thread = threading.Thread(target=run, name="pynbd-server", daemon=True)
        self._thread.start()
        self._defects = _Defects()
        self._log = logging.getLogger("pynbd")
        self._log.addHandler(self._defects)
        self._serving: asyncio.Task[None] | None = None
        self._lasting: set[asyncio.Task[Any]] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE)

    def serve(
        self,
        exports: ExportTable,
        path: str,
        *,
        tls: Tls | None = None,
        structured: bool = True,
        extended: bool = True,
    ) -> Server:
        """Start a server on a unix socket; it listens already."""

        async def start() -> Server:
            listener = listen_unix(path)
            dialects = {"structured": structured, "extended": extended}
            server = Server(exports, [listener], limits=_PATIENT, tls=tls, **dialects)
            self._serving = asyncio.create_task(server.run())
            await asyncio.sleep(0)
            self._lasting = asyncio.all_tasks()
            return server

        return self.run(start())

    def settle(self) -> None:
        """Until the sessions of all clients, who have left, are over."""

        async def others() -> None:
            sessions = asyncio.all_tasks() - self._lasting - {asyncio.current_task()}
            if sessions:
                await asyncio.wait(sessions)

        self.run(others())
        assert not self._defects.told, self._defects.told

    def ended(self) -> None:
        """Until the server, which was told to stop, has ended."""

        async def end() -> None:
            assert self._serving
            await self._serving

        self.run(end())

    def close(self) -> None:
        """The server has ended before: nothing may be left."""

        async def left() -> set[str]:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            return {repr(task.get_coro()) for task in tasks}

        tasks = self.run(left())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self._log.removeHandler(self._defects)
        assert not tasks, f"tasks are left: {tasks}"
        assert not self._defects.told, self._defects.told


def failed() -> bool:
    """Whether a machine is torn down because it has failed."""
    error = sys.exc_info()[1]
    return error is not None and not isinstance(error, StopTest)  # its example is too long


def descriptors() -> set[str]:
    """What this process has open: number and what it is."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number}: {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the listing's own
    return found
