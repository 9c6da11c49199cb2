"""Every rule of the order of writes is needed: without it the crash tests find a broken image."""

from __future__ import annotations

import pytest

from interop.soak.mutations import MUTATIONS, Mutation, damage_run, find
from pynbd.block.qcow2.commit import Rule


def test_every_rule_is_switched_off() -> None:
    assert set(Rule) <= {mutation.rule for mutation in MUTATIONS}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
async def test_teeth(mutation: Mutation) -> None:
    assert await find(mutation)


async def test_damage_is_told_when_it_is_marked() -> None:
    await damage_run(1)
