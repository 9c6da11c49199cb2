"""Every system call of a disk in turn, with every fault that it can have: a part of the long form,
``python -m interop.faults``, whose rules are those of `interop.faults.runs`.

A failure names the line that runs just that one again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers
from interop.faults.runs import Run, content_of, plan
from interop.faults.scenarios import SCENARIOS, Place, draws

# Of each scenario; of those that write, qemu-img checks what the first of them has left.
SAMPLE = 12


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_faults(name: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io")
    place = Place(name, tmp_path)
    content = await content_of(place)
    faults = await plan(place, content)
    for number, fault in enumerate(draws(name).sample(faults, SAMPLE)):
        run = Run(place, content, fault)
        try:
            await run.run()
            if not number and place.checked_by_qemu:
                run.ask_qemu()
        except Exception as error:
            error.add_note(f"python -m interop.faults --scenario {name} --fault {fault}")
            raise
