"""Damaged images, opened for reading: a spread over all structures.

A failure says the name of the image; ``python -m interop.damage --only NAME`` is that one again.
"""

from __future__ import annotations

import pytest

from interop.damage import generator
from interop.damage.generator import Case
from interop.damage.reading import Outcome, make_judge
from interop.damage.workers import DEFECT, judged

IMAGES, PARTS, SEED = 400, 2, 6


def cases(part: int) -> list[Case]:
    return generator.spread(generator.every(), IMAGES, SEED)[part::PARTS]


@pytest.mark.parametrize("part", range(PARTS))
def test_refused_or_served_and_nothing_else(part: int) -> None:
    results = list(judged(cases(part), 1, make_judge))
    defects = [str(result) for result in results if result.outcome == DEFECT]
    assert not defects, "\n".join(defects)
    assert {result.outcome for result in results} == set(Outcome)


def test_the_long_form_is_long() -> None:
    """And every image in it has a name of its own."""
    names = [case.name for case in generator.every()]
    assert len(names) == len(set(names)) >= 5000


def test_a_spread_meets_every_structure() -> None:
    structures = {case.structure for case in generator.every()}
    chosen = generator.spread(generator.every(), IMAGES, SEED)
    assert {case.structure for case in chosen} == structures
    assert generator.spread(generator.every(), 50, 3) == generator.spread(generator.every(), 50, 3)
