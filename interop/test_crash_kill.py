"""kill -9 of a busy server: the image keeps what was flushed, and is not corrupt."""

from __future__ import annotations

import pytest

from interop.soak.kill import kill_rounds
from interop.soak.plans import PLANS, RAW, Plan

CHOSEN = ("packed", "lazy-shared", "apart-raw")


@pytest.mark.parametrize(
    "plan", [RAW, *(plan for plan in PLANS if plan.name in CHOSEN)], ids=lambda plan: plan.name
)
async def test_kill(plan: Plan) -> None:
    assert await kill_rounds(plan, seed=1, rounds=3) > 50
