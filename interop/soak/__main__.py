"""``python -m interop.soak``: everything that is promised about writing qcow2, for a long time."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from interop.soak import crashes, kill
from interop.soak.far import SHAPES, run_far
from interop.soak.matrix import FACTORS, Row, pairs, rows
from interop.soak.mix import KINDS
from interop.soak.runs import run_row
from interop.soak.turns import CHOICES, Turns

PARTS = ("mix", "far", "turns", "crashes", "kill")
# Every fourth image is written by libnbd, too: about a sixth of its requests.
_LIBNBD_EVERY = 4


def mix(requests: int, seed: int, only: str | None) -> None:
    """The requests, spread over the images of the matrix."""
    matrix = rows(seed)
    each = -(-requests // len(matrix))
    counts, started = Counter[str](), time.monotonic()
    for number, row in enumerate(matrix):
        if only in (None, row.name):
            by_libnbd = each // 6 if number % _LIBNBD_EVERY == 0 else 0
            counts += _mixed(row, each - by_libnbd, by_libnbd)
    kinds = sum(counts[kind] for kind in KINDS)
    met = len({pair for row in matrix for pair in pairs(row.choice)})
    print(
        f"mix: {kinds} requests to {counts['images']} images in {_since(started)}, in which", end=""
    )
    print(f" {met} pairs of values of {len(FACTORS)} factors meet:")
    print(f"  {told(counts)}")


def _mixed(row: Row, requests: int, by_libnbd: int) -> Counter[str]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        counts = run_row(row, Path(folder), requests, by_libnbd=by_libnbd)
    print(f"  {row} ({_since(started)})", flush=True)
    counts["images"] += 1
    counts["by libnbd"] += by_libnbd
    return counts


def far(requests: int, seed: int) -> None:
    for name in SHAPES:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            counts = run_far(name, Path(folder), requests, seed)
        print(f"far: the disk {name!r} in {_since(started)}:\n  {told(counts)}", flush=True)


def turns(count: int, seed: int) -> None:
    """So many turns on each of a few images."""
    for name in CHOICES:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            counts = Turns(name, Path(folder), seed).run(count)
        print(f"turns: {count} on the image {name!r} in {_since(started)}:\n  {told(counts)}")


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


@click.command(epilog="Example: python -m interop.soak --part mix --image m07 --seed 1")
@click.option("--part", type=click.Choice(PARTS), multiple=True, help="What is done; all without.")
@click.option("--seed", default=1, show_default=True, help="What decides about everything.")
@click.option("--requests", default=200_000, show_default=True, help="Of the mix.")
@click.option("--image", help="The one image of the mix (m00, m01, ...) that is wanted.")
@click.option("--turns", "turns_each", default=100, show_default=True, help="On each image.")
@click.option("--crashes", "images", default=20_000, show_default=True, help="Images of crashes.")
@click.option("--kills", default=kill.ROUNDS, show_default=True, help="Of each of a few servers.")
def main(
    part: tuple[str, ...],
    seed: int,
    requests: int,
    image: str | None,
    turns_each: int,
    images: int,
    kills: int,
) -> None:
    """Write qcow2 images for a long time, and print the figures."""
    parts = part or PARTS
    if "mix" in parts:
        mix(requests, seed, image)
    if "far" in parts:
        far(requests // 20, seed)
    if "turns" in parts:
        turns(turns_each, seed)
    if "crashes" in parts:
        crashes.main(images, seed)
    if "kill" in parts:
        kill.main(kills, seed)


if __name__ == "__main__":
    main()
