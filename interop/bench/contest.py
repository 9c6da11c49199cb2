"""Rounds of A B A B, and of their ratios the median.

Each row measures every server in turn, round after round, so that whatever disturbs the machine
disturbs all of them. Each round begins with another one: who writes first is given memory that
nobody has used for a while, which the host of a virtual machine is slow to give. Of qemu-nbd's two
ways of asynchronous I/O the slower drops out after the first round. A ratio above 1 means that
pynbd is the better one.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from interop.bench import images
from interop.bench.rows import Row
from interop.bench.servers import PYNBD, QEMU, serve


@dataclass(frozen=True)
class Result:
    row: Row
    rounds: dict[str, list[float]]

    def figure(self, name: str) -> float:
        return median(self.rounds[name])

    @property
    def ratios(self) -> dict[str, float]:
        """The median of the ratios of the rounds, for each rival that stayed to the end."""
        ours = self.rounds[PYNBD]
        return {
            name: median(self.row.job.ratio(a, b) for a, b in zip(ours, theirs, strict=True))
            for name, theirs in self.rounds.items()
            if name != PYNBD and len(theirs) == len(ours)
        }

    @property
    def best(self) -> str:
        """The rival to be measured by."""
        return min(self.ratios, key=self.ratios.__getitem__)

    @property
    def ratio(self) -> float:
        return self.ratios[self.best]

    @property
    def met(self) -> bool:
        return self.ratio >= self.row.required


def contest(row: Row, rounds: int, seconds: float) -> Result:
    """``rounds`` measurements of about ``seconds`` each of pynbd and of all its rivals."""
    names = [PYNBD, *row.rivals]
    results: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(measured(row, name, seconds))
        better = min if row.job.lower_is_better else max
        qemu = [name for name in names if name in QEMU]
        keep = better(qemu, key=lambda name: results[name][0], default=None)
        names = [name for name in names if name == keep or name not in qemu]
    return Result(row, results)


def measured(row: Row, name: str, seconds: float) -> float:
    """One figure, from a server that serves nobody else and ends with it."""
    if name != PYNBD and row.limit is not None:
        return row.limit
    path = row.image()
    with serve(name, path, row.way) as server:
        figure = row.job.measure(server, seconds)
    images.settle(path)
    return figure
