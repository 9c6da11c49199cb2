"""A mix of requests to some images of the matrix, for a short time; ``make soak`` takes longer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import peers
from interop.soak.matrix import Row, rows
from interop.soak.runs import run_row

REQUESTS = 400


def few(matrix: list[Row]) -> Iterator[Row]:
    """Rows in which every value of every factor is met."""
    wanted = {value for row in matrix for value in row.choice.items()}
    while wanted:
        best = max(matrix, key=lambda row: (len(wanted & row.choice.items()), -row.cluster_size))
        wanted -= best.choice.items()
        yield best


ROWS = {row.name: row for row in few(rows())}


@pytest.mark.parametrize("name", ROWS)
def test_mix(name: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdsh")
    counts = run_row(ROWS[name], tmp_path, REQUESTS, by_libnbd=100)
    assert counts["read"] > REQUESTS // 5
    assert counts["write"] > REQUESTS // 5
