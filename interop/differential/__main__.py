"""``python -m interop.differential``: the same requests to pynbd and qemu-nbd, for a long time."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from interop.differential import runs
from interop.differential.comparing import Findings
from interop.differential.differences import Rule
from interop.differential.images import KINDS, Subject, subjects

WAYS = {"read": runs.read, "write": runs.write}


@click.command(epilog="Example: python -m interop.differential --only 'matrix m07' --seed 1")
@click.option("--requests", default=200_000, show_default=True, help="In all.")
@click.option("--each", type=int, help="Of each image, in place of an equal share of all.")
@click.option("--seed", default=1, show_default=True, help="What decides about the requests.")
@click.option("--kind", type=click.Choice(KINDS), multiple=True, help="Of images; all without.")
@click.option("--way", type=click.Choice(list(WAYS)), multiple=True, help="Both without.")
@click.option("--only", help="The one image that is wanted.")
def main(
    requests: int,
    each: int | None,
    seed: int,
    kind: tuple[str, ...],
    way: tuple[str, ...],
    only: str | None,
) -> None:
    """Ask pynbd and qemu-nbd the same, and print what is answered differently."""
    wanted = [
        (subject, name)
        for name in way or WAYS
        for subject in subjects()
        if subject.kind in (kind or KINDS) and only in (None, subject.name)
        if not (subject.damaged and name == "write")
    ]
    each = each or -(-requests // len(wanted))
    counts, rules, failed = Counter[str](), Counter[Rule](), 0
    started = time.monotonic()
    for subject, name in wanted:
        try:
            findings = _one(subject, name, each, seed)
        except Exception as error:
            failed += 1
            print(
                f"{name}: {subject}, {each} requests, seed {seed}: {error!r}\n{error}", flush=True
            )
            continue
        counts += Counter({f"{name}: {key}": n for key, n in findings.counts.items()})
        rules += findings.rules
    print(f"{len(wanted)} runs in {time.monotonic() - started:.0f} s, {failed} of them failed")
    for text, number in sorted(counts.items()):
        print(f"  {text} {number}")
    for rule, number in rules.items():
        print(f"  {rule.name} ({rule.row}): {number}")
    sys.exit(failed > 0)


def _one(subject: Subject, way: str, requests: int, seed: int) -> Findings:
    with tempfile.TemporaryDirectory(prefix="differential-") as folder:
        findings = WAYS[way](subject, Path(folder), requests, seed)
        findings.judge()
        return findings


if __name__ == "__main__":
    main()
