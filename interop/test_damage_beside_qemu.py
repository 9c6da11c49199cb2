"""Damaged images beside qemu-nbd: who is served by both sees the same, and what is refused here
alone is refused for a rule of the specification, or of `pynbd.block.chain`.
"""

from __future__ import annotations

from collections import Counter

from interop import peers
from interop.damage import generator
from interop.damage.beside_qemu import Verdict, compared

IMAGES, SEED = 24, 4
RULES = (
    "is not recorded",  # the format of a backing file, which is not guessed
    "is not a plain file name",
    "cannot be a file name",
    "not a regular file or a block device",
    "the bitmaps extension is missing",  # "It is an error if this bit is set without [it]"
    "the file ends within its header",
    "the table is cut short",  # of snapshots
    "layers",
)


def test_the_same_bytes() -> None:
    peers.require("qemu-nbd")
    counts = Counter[Verdict]()
    files = [case for case in generator.every() if case.structure != "chain"]
    for one in compared(generator.spread(files, IMAGES, SEED)):
        counts[one.verdict] += 1
        assert one.verdict in (Verdict.ALIKE, Verdict.REFUSED, Verdict.SERVED), one
        if one.verdict is Verdict.REFUSED:
            assert any(rule in one.said for rule in RULES), one
    assert counts[Verdict.ALIKE] > IMAGES * 0.8
