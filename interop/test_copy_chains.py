"""pynbd copy of generated chains: what qemu-img convert makes of them, and what their bitmaps call
dirty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from interop import generator, peers, samples
from interop.generator import Chain, ChainPlan
from interop.transferring import compared, copied


@pytest.mark.parametrize("plan", generator.plan()[::3], ids=lambda plan: plan.id)
def test_chain(plan: ChainPlan, built_chain: Callable[[ChainPlan], Chain], tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    chain = built_chain(plan)
    theirs, ours = tmp_path / "theirs.raw", tmp_path / "ours.raw"
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", chain.top, theirs)
    copied(chain.top, ours)
    content = theirs.read_bytes()
    assert ours.read_bytes() == content
    # The file system counts what it needs itself to remember many extents.
    assert samples.allocated(ours) <= samples.allocated(theirs) + 2 * 4096
    assert compared(chain.top, theirs).difference is None
    for name in chain.bitmaps:
        context = f"qemu:dirty-bitmap:{name}"
        with peers.qemu_nbd(chain.top, "-r", "-f", "qcow2", "-B", name) as uri:
            rows = json.loads(peers.run("nbdinfo", f"--map={context}", "--json", uri).stdout)
            expected = bytearray(b"\xee" * len(content))
            for row in rows:
                if row["type"] == 1:
                    end = row["offset"] + row["length"]
                    expected[row["offset"] : end] = content[row["offset"] : end]
            for source in str(chain.top), uri:
                ours.write_bytes(b"\xee" * len(content))
                copied(source, ours, bitmap=name)
                assert ours.read_bytes() == expected
