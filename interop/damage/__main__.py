"""``python -m interop.damage``: every damaged image opened for reading, and the figures."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import click

from interop.damage import beside_qemu, generator
from interop.damage.generator import Case
from interop.damage.reading import make_judge
from interop.damage.workers import DEFECT, Result, judged, table

PARTS = ("reading", "qemu")


def reading(cases: Sequence[Case], processes: int, commands_every: int) -> bool:
    """Whether there was no defect."""
    results: list[Result] = []
    with suppress(KeyboardInterrupt):  # then the figures are those of what was done
        for result in judged(cases, processes, partial(make_judge, commands_every=commands_every)):
            results.append(result)
            if result.outcome == DEFECT:
                print(result, flush=True)
    print(f"{len(results)} images\n{table(results)}")
    return not any(result.outcome == DEFECT for result in results)


def qemu(cases: Sequence[Case]) -> bool:
    """Whether no image has other bytes there."""
    counts = Counter[str]()
    with suppress(KeyboardInterrupt):
        for one in beside_qemu.compared(cases):
            counts[one.verdict.value] += 1
            if one.verdict is not beside_qemu.Verdict.ALIKE:
                print(f"{one.case.name}: {one.verdict.value}: {one.said}", flush=True)
    print(f"{counts.total()} images beside qemu-nbd: {dict(counts)}")
    return not counts[beside_qemu.Verdict.OTHER.value]


@click.command(epilog="Example: python -m interop.damage --only 'plain/header v2/l1_size'")
@click.option("--part", type=click.Choice(PARTS), default="reading", show_default=True)
@click.option("--seed", default=1, show_default=True, help="What decides about everything.")
@click.option("--count", default=0, help="So many images, spread over all structures (0: all).")
@click.option("--only", default="", help="Those whose names begin so.")
@click.option("--processes", default=2, show_default=True)
@click.option("--commands-every", default=4, show_default=True, help="How many run the commands.")
def main(part: str, seed: int, count: int, only: str, processes: int, commands_every: int) -> None:
    """Open damaged images for reading, and print the figures; status 1 if there is a defect."""
    cases = generator.cases_named(only, seed)
    if count:
        cases = generator.spread(cases, count, seed)
    started = time.monotonic()
    well = reading(cases, processes, commands_every) if part == "reading" else qemu(cases)
    print(f"in {time.monotonic() - started:.0f} s")
    sys.exit(not well)


if __name__ == "__main__":
    main()
