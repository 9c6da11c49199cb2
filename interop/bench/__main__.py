"""Rounds of A B A B, and of their ratios the median.

Each row measures every server in turn, round after round, so that whatever disturbs the machine
disturbs all of them. Of qemu-nbd's two ways of asynchronous I/O the slower drops out after the
first round. A ratio above 1 means that pynbd is the better one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from interop import peers
from interop.bench import images
from interop.bench.servers import NAMES, Server, serve

Results = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    name: str
    unit: str
    measure: Callable[[Server], float]
    lower_is_better: bool = False


def reading(
    disk: str, mode: str, size: str, depth: int, milliseconds: int, whole: int = images.SIZE
) -> Row:
    """A row of reads of ``size`` at ``depth``; the disk has ``whole`` bytes."""

    def measure(server: Server) -> float:
        job = peers.fio(
            server.uri,
            *(f"--rw={mode}", f"--bs={size}", f"--iodepth={depth}", f"--size={whole}"),
            *("--time_based", f"--runtime={milliseconds}ms", "--ramp_time=200ms"),
            *("--norandommap", "--randrepeat=1"),
        )
        return float(job["read"]["iops"])

    return Row(f"{disk} {mode} {size} qd{depth}", "requests/s", measure)


def map_whole(server: Server) -> None:
    line = [*peers.command("nbdinfo"), "--map", server.uri]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, timeout=60)


def map_time(server: Server) -> float:
    start = time.perf_counter()
    map_whole(server)
    return time.perf_counter() - start


def map_cpu(server: Server) -> float:
    start = server.cpu()
    map_whole(server)
    return server.cpu() - start


def contest(row: Row, servers: list[Server], rounds: int) -> Results:
    results: Results = {server.name: [] for server in servers}
    better = min if row.lower_is_better else max
    for _ in range(rounds):
        for server in servers:
            results[server.name].append(row.measure(server))
        qemu = [server for server in servers if server.name.startswith("qemu-nbd")]
        best = better(qemu, key=lambda server: results[server.name][0])
        servers = [server for server in servers if server is best or server not in qemu]
    return {server.name: results[server.name] for server in servers}


def rivals(row: Row, results: Results) -> Iterator[tuple[str, float, float]]:
    """(name, median, median of the ratios of the rounds) of each server but pynbd."""
    ours = results["pynbd"]
    for name in (name for name in results if name != "pynbd"):
        pairs = list(zip(ours, results[name], strict=True))
        if row.lower_is_better:
            pairs = [(theirs, mine) for mine, theirs in pairs]
        yield name, median(results[name]), median(a / b for a, b in pairs)


def run(
    image: Path, form: str, names: list[str], rows: list[Row], rounds: int
) -> Iterator[dict[str, object]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(name, image, form)) for name in names]
        for row in rows:
            results = contest(row, servers, rounds)
            compared = list(rivals(row, results))
            line = "".join(
                f"   {name} {value:.4g} ({ratio:.2f})" for name, value, ratio in compared
            )
            print(f"{row.name:24} {row.unit:10} {median(results['pynbd']):9.4g}{line}", flush=True)
            ratios = {name: ratio for name, _, ratio in compared}
            yield {"row": row.name, "unit": row.unit, "rounds": results, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m interop.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes in all")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where results go")
    arguments = parser.parse_args()
    rounds, milliseconds = (3, 1200) if arguments.quick else (5, 5000)

    def reads(disk: str) -> list[Row]:
        shapes = [("randread", "4k", 1), ("randread", "4k", 16), ("read", "1M", 8)]
        return [reading(disk, *shape, milliseconds) for shape in shapes]

    maps = [
        Row("map 1 TiB, whole", "seconds", map_time, lower_is_better=True),
        Row("map 1 TiB, server", "cpu s", map_cpu, lower_is_better=True),
    ]
    scattered = reading("fragmented", "randread", "4k", 16, milliseconds, images.FRAGMENTED_SIZE)
    print(
        "row, pynbd's median; each other server's, and in brackets the ratio (above 1: pynbd leads)"
    )
    results = [
        *run(images.raw(), "raw", list(NAMES), reads("raw"), rounds),
        *run(images.qcow2(), "qcow2", list(NAMES[:3]), reads("qcow2"), rounds),
        *run(images.tebibyte(), "qcow2", list(NAMES[:2]), maps, rounds),
    ]
    if not arguments.quick:
        results += run(images.fragmented(), "qcow2", list(NAMES[:3]), [scattered], rounds)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
