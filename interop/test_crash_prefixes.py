"""At any power cut a qcow2 image opens, is not corrupt, and holds what was flushed.

The long form is ``make soak``; here each image of `interop.soak.plans` has one short run, and every
state of its files that a crash can leave is judged.
"""

from __future__ import annotations

import pytest

from interop.soak.crashes import Variant, crash_run, images_of
from interop.soak.plans import PLANS, Plan

COUNT = 12  # requests of a session


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
async def test_every_prefix(plan: Plan) -> None:
    counts = await crash_run(plan, 1, count=COUNT, peer_every=20)
    assert images_of(counts) > COUNT


@pytest.mark.parametrize("plan", PLANS[::7], ids=lambda plan: plan.name)
async def test_every_prefix_with_threads(plan: Plan) -> None:
    counts = await crash_run(plan, 2, count=COUNT, variant=Variant.THREADS, peer_every=20)
    assert images_of(counts) > COUNT
