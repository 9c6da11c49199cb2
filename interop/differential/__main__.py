"""``python -m interop.differential``: the same requests to pynbd and qemu-nbd, for a long time."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from math import inf
from pathlib import Path
from random import Random

import click

from interop.differential import runs
from interop.differential.comparing import Findings
from interop.differential.differences import EVERY
from interop.differential.images import KINDS, Subject, subjects

WAYS = {"read": runs.read, "write": runs.write}


@click.command(epilog="Example: python -m interop.differential --only 'matrix m07' --seed 1")
@click.option("--requests", default=200_000, show_default=True, help="In all.")
@click.option("--each", type=int, help="Of each image, in place of an equal share of all.")
@click.option("--seed", default=1, show_default=True, help="What decides about the requests.")
@click.option("--kind", type=click.Choice(KINDS), multiple=True, help="Of images; all without.")
@click.option("--way", type=click.Choice(list(WAYS)), multiple=True, help="Both without.")
@click.option("--only", help="The one image that is wanted.")
@click.option("--seconds", type=float, default=inf, help="After which no image is begun.")
def main(
    requests: int,
    each: int | None,
    seed: int,
    kind: tuple[str, ...],
    way: tuple[str, ...],
    only: str | None,
    seconds: float,
) -> None:
    """Ask pynbd and qemu-nbd the same, and print what is answered differently."""
    # Both servers end with this, and what they had in a folder goes.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    wanted = [
        (subject, name)
        for name in way or WAYS
        for subject in subjects()
        if subject.kind in (kind or KINDS) and only in (None, subject.name)
        if not (subject.damaged and name == "write")
    ]
    Random(seed).shuffle(wanted)
    each = each or -(-requests // len(wanted))
    done, failed = Findings(), 0
    started = time.monotonic()
    for number, (subject, name) in enumerate(wanted):
        if time.monotonic() - started > seconds:
            print(f"no time for {len(wanted) - number} of {len(wanted)} runs")
            break
        findings = Findings()
        try:
            _one(subject, name, each, seed, findings)
        except Exception as error:
            failed += 1
            again = f"--way {name} --only '{subject}' --each {each} --seed {seed}"
            said = "\n".join([str(error), *getattr(error, "__notes__", ())])
            print(f"{again}: {type(error).__name__}: {said}", flush=True)
        done.counts += Counter({f"{name}: {key}": n for key, n in findings.counts.items()})
        done.rules += findings.rules
        print(f"{name}: {subject}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{failed} runs failed; in {time.monotonic() - started:.0f} s:")
    for text, count in sorted(done.counts.items()):
        print(f"  {text} {count}")
    for rule in EVERY:
        print(f"  {rule.name} ({rule.row}): {done.rules[rule]}")
    sys.exit(failed > 0)


def _one(subject: Subject, way: str, requests: int, seed: int, findings: Findings) -> None:
    with tempfile.TemporaryDirectory(prefix="differential-") as folder:
        WAYS[way](subject, Path(folder), requests, seed, findings)
    findings.judge()


if __name__ == "__main__":
    main()
