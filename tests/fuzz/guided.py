"""One target under atheris (libFuzzer), guided by coverage, in a process of its own."""

from __future__ import annotations

import os
import re
import sys
import traceback
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

from tests.fuzz.targets import Target

# Bytes that one input may make the process grow to, as a sanitizer would count them.
RSS_LIMIT_MB = 512
# The exit status that libFuzzer has for it; its own are 70 for a hang, 71 for too much memory.
CRASHED = 77

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. ``artifact``: the input that failed."""

    inputs: int
    coverage: int
    corpus: int
    status: int
    artifact: Path | None

    @property
    def verdict(self) -> str:
        if self.artifact:
            return self.artifact.name.partition("-")[0].upper()
        return f"ended with status {self.status}" if self.status else "ok"


def fuzz(target: Target, folder: Path, bounds: Bounds) -> None:
    """Run until it is over; ends the process. Everything lies in ``folder``."""
    import atheris  # noqa: PLC0415 (it is not there on every machine)

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = list(target.seeds())
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number:04}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.dictionary))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    flags = {
        "seed": bounds.seed,
        "max_len": target.max_len,
        "timeout": bounds.hang,
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

    def one_input(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            artifact = folder / f"crash-{sha1(data).hexdigest()}"
            artifact.write_bytes(data)
            traceback.print_exc()
            print(f"Test unit written to {artifact}", flush=True)
            os._exit(CRASHED)

    arguments = [f"-{name}={value}" for name, value in flags.items()]
    atheris.Setup([target.name, *arguments, str(corpus)], one_input)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def outcome(folder: Path, status: int) -> Outcome:
    """What the log of a run says."""
    log = (folder / "log").read_text(errors="replace")
    pulses = _PULSE.findall(log)
    number, coverage, corpus = pulses[-1] if pulses else (0, 0, 0)
    executed = _EXECUTED.search(log)
    artifact = _ARTIFACT.search(log)
    return Outcome(
        int(executed[1] if executed else number),
        int(coverage),
        int(corpus),
        status,
        Path(artifact[1]) if artifact else None,
    )
