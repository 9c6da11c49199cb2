"""``python -m interop.damage``: every damaged image opened for reading, and the figures."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable

import click

from interop.damage import generator
from interop.damage.reading import Outcome
from interop.damage.workers import Result, judged


def table(results: Iterable[Result]) -> str:
    """By structure and by outcome."""
    counts: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for result in results:
        counts[result.case.structure][result.outcome] += 1
        counts["all"][result.outcome] += 1
    columns = [outcome for outcome in Outcome if counts["all"][outcome]]
    lines = [f"{'':28}{'images':>8}" + "".join(f"{outcome.value:>9}" for outcome in columns)]
    for structure, found in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        numbers = "".join(f"{found[outcome]:9}" for outcome in columns)
        lines.append(f"{structure:28}{found.total():8}{numbers}")
    return "\n".join(lines)


@click.command(epilog="Example: python -m interop.damage --only 'plain/header v2/l1_size'")
@click.option("--seed", default=1, show_default=True, help="What decides about everything.")
@click.option("--count", default=0, help="So many images, spread over all structures (0: all).")
@click.option("--only", default="", help="Those whose names begin so.")
@click.option("--processes", default=2, show_default=True)
@click.option("--commands-every", default=4, show_default=True, help="How many run the commands.")
def main(seed: int, count: int, only: str, processes: int, commands_every: int) -> None:
    """Open damaged images for reading, and print the figures; status 1 if there is a defect."""
    cases: list[generator.Case] = generator.cases_named(only, seed)
    if count:
        cases = generator.spread(cases, count, seed)
    started, results = time.monotonic(), list[Result]()
    for result in judged(cases, processes, commands_every):
        results.append(result)
        if result.outcome is Outcome.DEFECT:
            print(f"{result.case.name}:\n{result.said}", flush=True)
    print(f"{len(results)} images in {time.monotonic() - started:.0f} s")
    print(table(results))
    sys.exit(any(result.outcome is Outcome.DEFECT for result in results))


if __name__ == "__main__":
    main()
