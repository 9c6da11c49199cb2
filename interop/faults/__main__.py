"""``python -m interop.faults``: every call of every scenario in turn, with every fault."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from interop.faults.calls import Fault
from interop.faults.runs import Run, content_of, plan
from interop.faults.scenarios import SCENARIOS, Place, draws

# qemu-img looks at what one run in so many has left, of those that change an image.
_QEMU_EVERY = 20


class Figures:
    """What became of the faults, by call."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.checked = 0
        self.bad = 0

    def add(self, call: str, outcome: str) -> None:
        self.outcomes.setdefault(call, Counter())[outcome] += 1

    def __str__(self) -> str:
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        lines = [f"{call}: {_told(counts)}" for call, counts in sorted(self.outcomes.items())]
        told = f"{total.total()} faults: {_told(total)}; qemu-img checked {self.checked} images"
        return "\n".join([*lines, told, f"{self.bad} broke a rule"])


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items()))


async def run(name: str, fault: str | None, sample: int, seed: int, figures: Figures) -> None:
    """One scenario, with all of its faults, some of them or one."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pynbd-faults-") as folder:
        place = Place(name, Path(folder))
        content = await content_of(place)
        faults = [Fault.parse(fault)] if fault else await plan(place, content)
        if sample and sample < len(faults):
            faults = draws(f"{seed} {name}").sample(faults, sample)
        for number, chosen in enumerate(faults):
            one = Run(place, content, chosen)
            try:
                outcome = await one.run()
                if number % _QEMU_EVERY == 0 and place.checked_by_qemu:
                    one.ask_qemu()
                    figures.checked += 1
            except Exception as error:
                outcome = "BROKEN"
                figures.bad += 1
                print(f"--scenario {name} --fault {chosen}: {error!r:.900}", flush=True)
                if fault:
                    raise
            figures.add(chosen.call, outcome)
    print(f"{name}: {len(faults)} faults in {time.monotonic() - started:.0f} s", flush=True)


@click.command(epilog="Example: python -m interop.faults --scenario write-raw --fault pwrite:3:EIO")
@click.option("--scenario", type=click.Choice(list(SCENARIOS)), multiple=True, help="All without.")
@click.option("--fault", help="Only this one: CALL:NUMBER:OUTCOME, and :lasting if it lasts.")
@click.option("--sample", default=0, help="So many faults of each scenario; all without.")
@click.option("--seed", default=1, show_default=True, help="What decides which they are.")
def main(scenario: tuple[str, ...], fault: str | None, sample: int, seed: int) -> None:
    """Let every system call of a disk fail, one after the other, and print the figures.

    Temporary files are where TMPDIR says; where that is in memory nothing is ever cold.
    """
    figures = Figures()
    for name in scenario or SCENARIOS:
        asyncio.run(run(name, fault, sample, seed, figures))
    print(figures)
    raise SystemExit(bool(figures.bad))


if __name__ == "__main__":
    main()
