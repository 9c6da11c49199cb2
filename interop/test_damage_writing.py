"""Damaged images, written to and repaired: a spread over all structures.

A failure says the name of the image; ``python -m interop.damage --part writing --only NAME`` (or
``repairs``) is that one again.
"""

from __future__ import annotations

from functools import partial

import pytest

from interop import peers
from interop.damage import generator, writing, writing_repairs
from interop.damage.workers import DEFECT, MakeJudge, judged
from interop.damage.writing_qemu import written

WRITTEN, UNTRUSTED, REPAIRED, SEED = 80, 50, 60, 6
# References that no refcount counts: their clusters are handed out again, in QEMU as here.
UNCOUNTED = ["refcounts of 8 bits/refcounts of 8 bits/data/0", "narrow/refcounts of 1 bits/data/0"]


@pytest.mark.parametrize(
    "make_judge, count, outcomes",
    [
        (writing.make_judge, WRITTEN, {"refused", "found", "served"}),
        (partial(writing.make_judge, untrusted=True), UNTRUSTED, {"refused", "served"}),
        (writing_repairs.make_judge, REPAIRED, {"clean", "left", "not checked"}),
    ],
    ids=["writing", "writing untrusted", "repairs"],
)
def test_it_is_not_damaged_further(make_judge: MakeJudge, count: int, outcomes: set[str]) -> None:
    results = list(judged(generator.spread(generator.every(), count, SEED), 1, make_judge))
    defects = [str(result) for result in results if result.outcome == DEFECT]
    assert not defects, "\n".join(defects)
    assert {result.outcome for result in results} >= outcomes


def test_qemu_makes_the_same_damage_worse() -> None:
    """What is called uncounted has no defence there, either."""
    peers.require("qemu-nbd")
    cases = [case for case in generator.every() if case.name in UNCOUNTED]
    assert len(cases) == len(UNCOUNTED)
    assert {result.outcome for result in judged(cases, 1, writing.make_judge)} == {"uncounted"}
    assert all(worse for _, worse in written(cases))
