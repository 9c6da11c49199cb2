"""``python -m tests.fuzz``: bytes for every reader of bytes, for a long time."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import click

from tests.fuzz.guided import FULL, Bounds, Outcome, fuzz, outcome
from tests.fuzz.targets import Target, load, names


def loaded(chosen: tuple[str, ...]) -> list[Target]:
    """The targets, and what they reach of pynbd, instrumented: once, for all that are forked."""
    import atheris  # noqa: PLC0415 (it is not there on every machine)

    quiet = redirect_stderr(io.StringIO())  # it tells every module
    with quiet, atheris.instrument_imports(include=["pynbd"]):
        return [load(name) for name in chosen]


def run(targets: list[Target], folder: Path, scratch: str, bounds: Bounds, jobs: int) -> bool:
    """Run each in a child, ``jobs`` at a time, and print a line for each; whether all is well.

    ``scratch``: for the temporary files of the children, who end without a chance to remove them.
    """

    def started(target: Target, bounds: Bounds) -> int:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            tempfile.tempdir = scratch
            try:
                fuzz(target, folder / target.name, bounds)
            finally:
                os._exit(1)
        return child

    waiting, running, well = targets[::-1], dict[int, tuple[Target, float]](), True
    while waiting or running:
        while waiting and len(running) < jobs:
            target = waiting.pop()
            (folder / target.name).mkdir(exist_ok=True)
            (folder / target.name / "log").unlink(missing_ok=True)
            running[started(target, bounds)] = target, time.monotonic()
        child, status = os.wait()
        target, since = running.pop(child)
        result = outcome(folder / target.name, os.waitstatus_to_exitcode(status))
        spent = time.monotonic() - since
        if result.status == FULL and (left := bounds.left(spent, result)):
            running[started(target, left)] = target, since
            continue
        tell(target, result, spent, folder / target.name / "log")
        well &= result.well
    return well


def tell(target: Target, result: Outcome, seconds: float, log: Path) -> None:
    print(
        f"{target.name:28} {result.inputs:9} inputs {result.inputs / seconds:7.0f}/s"
        f"  coverage {result.coverage:5}  corpus {result.corpus:5}  {result.verdict}",
        flush=True,
    )
    if result.processes > 1:
        print(f"  in {result.processes} processes, each until it had grown")
    if not result.well:
        print(f"  its log: {log}")
    if result.artifact:
        print(f"  again: python -m tests.fuzz {target.name} --input {result.artifact}")


@contextmanager
def working_folder(corpus: Path | None) -> Iterator[Path]:
    """Where inputs are kept: for good, or until all is well."""
    if corpus:
        corpus.mkdir(parents=True, exist_ok=True)
        yield corpus.resolve()
    else:
        folder = tempfile.mkdtemp(prefix="pynbd-fuzz-")
        yield Path(folder)
        shutil.rmtree(folder)


@click.command(epilog="Example: python -m tests.fuzz protocol_uri --seconds 60")
@click.argument("chosen", metavar="[NAME]...", nargs=-1, type=click.Choice(names()))
@click.option("--seconds", default=0, help="For each target.")
@click.option("--runs", default=0, help="Inputs for each target, beside the seeds.")
@click.option("--seed", default=1, show_default=True, help="What mutation begins with.")
@click.option("--hang", default=5, show_default=True, help="Seconds that one input may take.")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="Targets at a time.")
@click.option("--corpus", type=click.Path(path_type=Path), help="Where inputs are kept.")
@click.option(
    "--input", "again", type=click.Path(path_type=Path, exists=True), help="Run just this one."
)
def main(
    chosen: tuple[str, ...],
    seconds: int,
    runs: int,
    seed: int,
    hang: int,
    jobs: int,
    corpus: Path | None,
    again: Path | None,
) -> None:
    """Fuzz the targets NAME, all without, and print a line of figures for each."""
    if again:
        if len(chosen) != 1:
            raise click.UsageError("--input wants the NAME of its target")
        load(chosen[0]).run(again.read_bytes())
        print("all is well")
        return
    bounds = Bounds(seconds if seconds or runs else 60, runs, seed, hang)
    with working_folder(corpus) as folder, tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        if not run(loaded(chosen or tuple(names())), folder, scratch, bounds, jobs):
            sys.exit(1)


if __name__ == "__main__":
    main()
