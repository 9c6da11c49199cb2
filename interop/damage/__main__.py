"""``python -m interop.damage``: every damaged image read, or written, or repaired; the figures."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import click

from interop.damage import beside_qemu, generator, reading, writing, writing_qemu, writing_repairs
from interop.damage.generator import Case
from interop.damage.workers import DEFECT, MakeJudge, Result, judged, table
from interop.damage.writing import Outcome

PARTS = ("reading", "qemu", "writing", "writing untrusted", "repairs", "writing qemu")


def all_judged(cases: Sequence[Case], processes: int, make_judge: MakeJudge) -> bool:
    """Whether there was no defect."""
    results: list[Result] = []
    with suppress(KeyboardInterrupt):  # then the figures are those of what was done
        for result in judged(cases, processes, make_judge):
            results.append(result)
            if result.outcome in (DEFECT, Outcome.UNCOUNTED):
                print(result, flush=True)
    print(f"{len(results)} images\n{table(results)}")
    return not any(result.outcome == DEFECT for result in results)


def written_by_qemu(cases: Sequence[Case], processes: int) -> bool:
    """Of the images that writes make worse: how many qemu-nbd makes worse, too."""
    results = judged(cases, processes, writing.make_judge)
    uncounted = [result.case for result in results if result.outcome == Outcome.UNCOUNTED]
    counts = Counter[bool]()
    for case, worse in writing_qemu.written(uncounted):
        counts[bool(worse)] += 1
        print(f"{case.name}: {worse or 'not by QEMU'}", flush=True)
    print(f"{counts.total()} images are worse here, {counts[True]} of them under qemu-nbd")
    return True


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
@click.option(
    "--commands-every", default=4, show_default=True, help="Of which commands are run, too."
)
def main(part: str, seed: int, count: int, only: str, processes: int, commands_every: int) -> None:
    """Open damaged images, and print the figures; status 1 if there is a defect."""
    cases = generator.cases_named(only, seed)
    if count:
        cases = generator.spread(cases, count, seed)
    started = time.monotonic()
    match part:
        case "qemu":
            well = qemu(cases)
        case "writing qemu":
            well = written_by_qemu(cases, processes)
        case "writing":
            judge = partial(writing.make_judge, qemu_every=commands_every)
            well = all_judged(cases, processes, judge)
        case "writing untrusted":
            well = all_judged(cases, processes, partial(writing.make_judge, untrusted=True))
        case "repairs":
            well = all_judged(cases, processes, writing_repairs.make_judge)
        case _:
            judge = partial(reading.make_judge, commands_every=commands_every)
            well = all_judged(cases, processes, judge)
    print(f"in {time.monotonic() - started:.0f} s")
    sys.exit(not well)


if __name__ == "__main__":
    main()
