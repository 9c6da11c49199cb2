"""Run the rows, tell each as it is done, keep them all."""

from __future__ import annotations

import argparse
import compileall
from fnmatch import fnmatch
from pathlib import Path

import pynbd
from interop.bench import report
from interop.bench.contest import Result, contest
from interop.bench.rows import ROWS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m interop.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="some rows, under two minutes in all")
    parser.add_argument("--only", metavar="GLOB", default="*", help="rows by name")
    parser.add_argument("--rounds", type=int, help="measurements of each server")
    parser.add_argument("--seconds", type=float, help="about the length of each")
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), help="what is written (%(default)s)"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="the page whose table is replaced"
    )
    arguments = parser.parse_args()
    rounds = arguments.rounds if arguments.rounds is not None else 2 if arguments.quick else 5
    seconds = arguments.seconds if arguments.seconds is not None else 0.3 if arguments.quick else 2
    rows = [
        row
        for row in ROWS
        if fnmatch(row.name, arguments.only) and (row.quick or not arguments.quick)
    ]
    if rounds < 1 or not 0 < seconds <= 60:
        parser.error("--rounds is 1 or more, --seconds more than 0 and at most 60")
    if not rows:
        parser.error(f"no row is called {arguments.only!r}; docs/performance.md names them")
    if arguments.markdown and len(rows) < len(ROWS):
        parser.error("--markdown replaces the whole table: not with --quick or --only")
    try:
        if arguments.markdown:
            report.around(arguments.markdown)
        arguments.json.open("a").close()
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    # As a package that was installed: who serves from a checkout would compile it at every start.
    compileall.compile_dir(Path(pynbd.__file__).parent, quiet=1)
    results: list[Result] = []
    settings: dict[str, object] = {"rounds": rounds, "seconds": seconds}
    print(report.line(report.COLUMNS), flush=True)
    try:
        for row in rows:
            results.append(contest(row, rounds, seconds))
            print(report.line(report.cells(results[-1])), flush=True)
    finally:  # half an hour of figures is not lost with the row that fails
        report.write_json(arguments.json, results, settings)
    if arguments.markdown:
        report.write_markdown(arguments.markdown, results, settings)


if __name__ == "__main__":
    main()
