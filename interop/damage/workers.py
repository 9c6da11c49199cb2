"""Processes that judge: each many cases, and another one after each failure.

A process that ends, or is silent for longer than `DEADLINE`, is an outcome too.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import resource
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue

from interop.damage.generator import Case
from interop.damage.reading import Outcome, Reading

DEADLINE = 10.0  # for one case: a hang is one that takes longer
_START = 60.0
_ADDRESSES = 4 << 30  # of memory: where there is no end, there is one here


@dataclass(frozen=True)
class Result:
    case: Case
    outcome: Outcome
    said: str


def judged(cases: Iterable[Case], processes: int, commands_every: int = 4) -> Iterator[Result]:
    """The results, in any order."""
    waiting: Queue[tuple[Case, bool] | None] = Queue()
    results: Queue[Result | None] = Queue()
    for number, case in enumerate(cases):
        waiting.put((case, number % commands_every == 0))
    threads = [
        threading.Thread(target=_drive, args=(waiting, results), daemon=True)
        for _ in range(processes)
    ]
    for thread in threads:
        waiting.put(None)
        thread.start()
    for _ in threads:
        while (result := results.get()) is not None:
            yield result


def _drive(waiting: Queue[tuple[Case, bool] | None], results: Queue[Result | None]) -> None:
    worker: _Worker | None = None
    while (work := waiting.get()) is not None:
        worker = worker or _Worker()
        outcome, said = worker.judge(*work)
        if outcome is Outcome.DEFECT:
            worker.end()
            worker = None
        results.put(Result(work[0], outcome, said))
    if worker:
        worker.end()
    results.put(None)


class _Worker:
    """A process, and what is said to it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="pynbd-damage-")
        self._stacks = Path(self._folder.name) / "stacks"
        self._process = spawn.Process(target=_work, args=(theirs, self._folder.name), daemon=True)
        self._process.start()
        theirs.close()
        self._first = True

    def judge(self, case: Case, commands: bool) -> tuple[Outcome, str]:
        self._ours.send((case, commands))
        try:
            # The process ends itself, and tells where it was; this is for one that cannot.
            if self._ours.poll(3 * DEADLINE + self._first * _START):
                self._first = False
                outcome, said = self._ours.recv()
                return Outcome(outcome), str(said)
            return Outcome.DEFECT, "it hangs, and does not end itself"
        except EOFError:
            self._process.join()
            where = self._stacks.read_text() if self._stacks.exists() else ""
            return Outcome.DEFECT, f"it ended with {self._process.exitcode}: {where}"

    def end(self) -> None:
        self._ours.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._folder.cleanup()


def _work(pipe: Connection, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    with (Path(folder) / "stacks").open("w") as stacks:
        faulthandler.enable(stacks)
        judge: Callable[..., tuple[Outcome, str]] = Reading(Path(folder)).judge
        while True:
            try:
                case, commands = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(DEADLINE, exit=True, file=stacks)
            try:
                outcome, said = judge(case, commands=commands)
            except BaseException:  # whatever it is, it is told
                outcome, said = Outcome.DEFECT, traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            pipe.send((outcome.value, said))
