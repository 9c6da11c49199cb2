"""One target under atheris (libFuzzer), guided by coverage, in a process of its own.

Where that grows, another one goes on with its corpus: what atheris puts into the code keeps the
result of each comparison of arrays for ever.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import dataclass
from hashlib import sha1
from itertools import count
from mmap import PAGESIZE
from pathlib import Path

from tests.fuzz.targets import Target

# Bytes that one input may make the process grow to, as a sanitizer would count them.
RSS_LIMIT_MB = 512
# What may stay behind of all inputs before another process goes on; one input still may not make it
# grow to the limit.
_KEPT_MOST = RSS_LIMIT_MB << 19
# The exit status that libFuzzer has for it; its own are 70 for a hang, 71 for too much memory.
CRASHED = 77
# What ends a process that has grown.
FULL = 78

_PULSE = re.compile(r"^#(\d+)\s+\S+\s+cov: (\d+) .*?corp: (\d+)/", re.MULTILINE)
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
_ARTIFACT = re.compile(r"Test unit written to (\S+)")


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a run is over. ``seconds`` or ``runs`` may be 0, which is no bound; ``hang``: seconds
    that one input may take.
    """

    seconds: int
    runs: int
    seed: int
    hang: int

    def left(self, spent: float, outcome: Outcome) -> Bounds | None:
        """For the process that goes on after ``spent`` seconds: None if the run is over."""
        seconds, runs = self.seconds - int(spent), self.runs - outcome.inputs
        if (self.seconds and seconds <= 0) or (self.runs and runs <= 0):
            return None
        seconds, runs = max(seconds, 0), max(runs, 0)
        return Bounds(seconds, runs, self.seed + outcome.processes, self.hang)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to, in all its ``processes``. ``status``: of the last one. ``artifact``: the
    input that failed.
    """

    inputs: int
    coverage: int
    corpus: int
    processes: int
    status: int
    artifact: Path | None

    @property
    def verdict(self) -> str:
        if self.artifact:
            return self.artifact.name.partition("-")[0].upper()
        return "ok" if self.well else f"ended with status {self.status}"

    @property
    def well(self) -> bool:
        return self.status in (0, FULL)


def fuzz(target: Target, folder: Path, bounds: Bounds) -> None:
    """Run until it is over, or until the process has grown; ends the process. Everything lies in
    ``folder``, also of the processes before.
    """
    import atheris  # noqa: PLC0415 (it is not there on every machine)

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = list(target.seeds())
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number:04}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.dictionary))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    flags = {
        "seed": bounds.seed,
        "max_len": target.max_len,
        "timeout": bounds.hang,
        "report_slow_units": bounds.hang,
        "rss_limit_mb": RSS_LIMIT_MB,
        "artifact_prefix": f"{folder}/",
        "print_final_stats": 1,
        "len_control": 0,  # seeds are long from the beginning on
    }
    if target.dictionary:  # an empty one is refused
        flags["dict"] = words
    if bounds.seconds:
        flags["max_total_time"] = bounds.seconds
    if bounds.runs:
        flags["runs"] = bounds.runs + len(seeds)

    memory = os.open("/proc/self/statm", os.O_RDONLY)
    inputs = count(1)

    def one_input(data: bytes) -> None:
        number = next(inputs)
        try:
            target.run(data)
        except BaseException:
            artifact = folder / f"crash-{sha1(data).hexdigest()}"
            artifact.write_bytes(data)
            traceback.print_exc()
            print(f"Test unit written to {artifact}", flush=True)
            os._exit(CRASHED)
        if int(os.pread(memory, 64, 0).split()[1]) * PAGESIZE > _KEPT_MOST:
            print(f"stat::number_of_executed_units: {number}", flush=True)
            os._exit(FULL)

    arguments = [f"-{name}={value}" for name, value in flags.items()]
    atheris.Setup([target.name, *arguments, str(corpus)], one_input)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def outcome(folder: Path, status: int) -> Outcome:
    """What the log of a run says, up to a process that ended with ``status``."""
    log = (folder / "log").read_text(errors="replace")
    pulses = _PULSE.findall(log)
    *told, last = _EXECUTED.split(log)
    inputs = [int(number) for number in told[1::2]]
    if untold := _PULSE.findall(last):  # of a process that could not
        inputs.append(int(untold[-1][0]))
    artifacts = _ARTIFACT.findall(log)
    return Outcome(
        sum(inputs),
        max((int(coverage) for _, coverage, _ in pulses), default=0),
        int(pulses[-1][2]) if pulses else 0,
        len(inputs),
        status,
        Path(artifacts[-1]) if artifacts else None,
    )
