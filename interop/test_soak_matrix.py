"""The matrix of the soak: every pair of values that an image can have is in it."""

from __future__ import annotations

from itertools import islice
from random import Random

from interop.soak.matrix import drawn, legal, pairs, rows


def test_every_legal_pair_meets() -> None:
    matrix = rows()
    met = {pair for row in matrix for pair in pairs(row.choice)}
    assert met >= {pair for choice in islice(drawn(Random(7)), 8000) for pair in pairs(choice)}
    assert all(legal(row.choice) for row in matrix)
    assert matrix == rows()
    assert matrix != rows(seed=2)


def test_there_may_be_more() -> None:
    assert len({row.name for row in rows(count=60)}) == 60
