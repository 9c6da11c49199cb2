"""``python -m interop.hostile``: the whole crowd, and the figures."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import click

from interop.hostile.runs import run

TRANSPORTS = ("unix", "tcp")


@click.command(epilog="Example: python -m interop.hostile --transport tcp --seed 7")
@click.option("--transport", type=click.Choice(TRANSPORTS), multiple=True, help="Both without.")
@click.option("--idle", default=1000, show_default=True, help="Idle connections.")
@click.option("--hostile", default=200, show_default=True, help="Hostile clients.")
@click.option("--turns", default=30, show_default=True, help="Rounds of each polite client.")
@click.option("--seed", default=1, show_default=True, help="What decides about everything.")
def main(transport: tuple[str, ...], idle: int, hostile: int, turns: int, seed: int) -> None:
    """Let a crowd loose on a server, serve polite clients in it, and print what it took."""
    for name in transport or TRANSPORTS:
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
            figures = asyncio.run(run(name, Path(folder), idle, hostile, turns, seed))
        print(f"{name}: {figures}", flush=True)
        kinds = sorted(figures.came)
        print("  " + ", ".join(f"{kind} {figures.came[kind]}" for kind in kinds), flush=True)


if __name__ == "__main__":
    main()
