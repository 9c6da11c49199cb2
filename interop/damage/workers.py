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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue

from interop.damage.generator import Case

DEFECT = "defect"
# Seconds for one case, which is a few hundred requests: a tenth of one, but a machine may be busy.
DEADLINE = 30.0
_START = 60.0
_ADDRESSES = 4 << 30  # of memory: where there is no end, there is one here

# Of one case, which has a number: its outcome, and what was said. An exception is a defect.
Judge = Callable[[int, Case], tuple[str, str]]
# What makes a judge in a process, whose temporary files are below a folder; it can be pickled.
MakeJudge = Callable[[Path], Judge]


@dataclass(frozen=True)
class Result:
    case: Case
    outcome: str
    said: str

    def __str__(self) -> str:
        return f"{self.case.name}: {self.outcome}: {self.said}"


def judged(cases: Iterable[Case], processes: int, make_judge: MakeJudge) -> Iterator[Result]:
    """The results, in any order."""
    waiting: Queue[tuple[int, Case] | None] = Queue()
    results: Queue[Result | None] = Queue()
    for numbered in enumerate(cases):
        waiting.put(numbered)
    threads = [
        threading.Thread(target=_drive, args=(waiting, results, make_judge), daemon=True)
        for _ in range(processes)
    ]
    for thread in threads:
        waiting.put(None)
        thread.start()
    for _ in threads:
        while (result := results.get()) is not None:
            yield result


def table(results: Iterable[Result]) -> str:
    """The figures, by structure and by outcome."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result.case.structure][result.outcome] += 1
        counts["all"][result.outcome] += 1
    columns = sorted(counts["all"])
    lines = [f"{'':28}{'images':>8}" + "".join(f"{outcome:>9}" for outcome in columns)]
    for structure, found in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        numbers = "".join(f"{found[outcome]:{max(9, len(outcome))}}" for outcome in columns)
        lines.append(f"{structure:28}{found.total():8}{numbers}")
    return "\n".join(lines)


def _drive(
    waiting: Queue[tuple[int, Case] | None], results: Queue[Result | None], make_judge: MakeJudge
) -> None:
    worker: _Worker | None = None
    while (numbered := waiting.get()) is not None:
        worker = worker or _Worker(make_judge)
        outcome, said = worker.judge(*numbered)
        if outcome == DEFECT:
            worker.end()
            worker = None
        results.put(Result(numbered[1], outcome, said))
    if worker:
        worker.end()
    results.put(None)


class _Worker:
    """A process, and what is said to it."""

    def __init__(self, make_judge: MakeJudge) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="pynbd-damage-")
        self._stacks = Path(self._folder.name) / "stacks"
        work = (theirs, self._folder.name, make_judge)
        self._process = spawn.Process(target=_work, args=work, daemon=True)
        self._process.start()
        theirs.close()
        self._first = True

    def judge(self, number: int, case: Case) -> tuple[str, str]:
        self._ours.send((number, case))
        try:
            # The process ends itself, and tells where it was; this is for one that cannot.
            if self._ours.poll(2 * DEADLINE + self._first * _START):
                self._first = False
                outcome, said = self._ours.recv()
                return outcome, said
            return DEFECT, "it hangs, and does not end itself"
        except EOFError:
            self._process.join()
            where = self._stacks.read_text() if self._stacks.exists() else ""
            return DEFECT, f"it ended with {self._process.exitcode}: {where}"

    def end(self) -> None:
        self._ours.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._folder.cleanup()


def _work(pipe: Connection, folder: str, make_judge: MakeJudge) -> None:
    tempfile.tempdir = folder
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    # The pipe ends when there is nothing more to do, or nobody waits for it any more.
    with (Path(folder) / "stacks").open("w") as stacks, suppress(EOFError, BrokenPipeError):
        faulthandler.enable(stacks)
        judge = make_judge(Path(folder))
        while True:
            number, case = pipe.recv()
            faulthandler.dump_traceback_later(DEADLINE, exit=True, file=stacks)
            try:
                outcome, said = judge(number, case)
            except BaseException:  # whatever it is, it is told
                outcome, said = DEFECT, traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            pipe.send((outcome, said))
