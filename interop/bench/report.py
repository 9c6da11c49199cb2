"""What is printed, and what is kept: a line for each row, JSON with every round, Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import version as version_of
from pathlib import Path

from interop import peers
from interop.bench import tls
from interop.bench.contest import Result
from interop.bench.servers import PYNBD

COLUMNS = "row", "unit", "pynbd", "best rival", "its figure", "ratio", "required", ""
WIDTHS = 32, 10, 10, 17, 10, 6, 8, 5
BEGIN, END = "<!-- the table of make bench begins -->", "<!-- the table of make bench ends -->"


def cells(result: Result) -> list[str]:
    row = result.row
    return [
        *(row.name, row.job.unit, shown(result.figure(PYNBD))),
        *(result.best, shown(result.figure(result.best))),
        *(f"{result.ratio:.2f}", f"{row.required:.2f}", "ok" if result.met else "BELOW"),
    ]


def shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def line(texts: list[str] | tuple[str, ...]) -> str:
    return "  ".join(map(str.ljust, texts, WIDTHS)).rstrip()


def machine() -> dict[str, object]:
    """What the figures depend on, and what is no secret."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pynbd": version_of("pynbd"),
        **{name: version(name) for name in ("qemu-nbd", "nbdkit", "nbdcopy", "fio")},
        "cipher": tls.CIPHER,
    }


def version(name: str) -> str:
    found = re.search(r"\d+\.\d+(\.\d+)?", peers.run(name, "--version").stdout)
    return found[0] if found else "unknown"


def write_json(path: Path, results: list[Result], settings: dict[str, object]) -> None:
    rows = [
        {
            "row": result.row.name,
            "unit": result.row.job.unit,
            "lower_is_better": result.row.job.lower_is_better,
            "required": result.row.required,
            "rounds": result.rounds,
            "ratios": result.ratios,
            "best": result.best,
            "ratio": result.ratio,
            "met": result.met,
        }
        for result in results
    ]
    report = {"machine": machine(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")


def around(page: Path) -> tuple[str, str]:
    """What stands on a page before and after its two marks. ``ValueError`` without these."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no place for the table: {BEGIN} ... {END}")
    return before, after


def write_markdown(page: Path, results: list[Result], settings: dict[str, object]) -> None:
    """Put the table and the facts of the machine between the two marks of a page."""
    facts = ", ".join(f"{name} {value}" for name, value in {**machine(), **settings}.items())
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, after = around(page)
    page.write_text(f"{before}{BEGIN}\n{facts}\n\n{table}\n{END}{after}")
