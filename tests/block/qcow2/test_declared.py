"""The structures that are read by the thousand are those that are declared."""

from __future__ import annotations

import random

from pynbd.block.qcow2 import bitmaps, snapshots
from pynbd.block.qcow2.format import BITMAP_DIRECTORY_ENTRY, SNAPSHOT_ENTRY, SNAPSHOT_EXTRA


def test_they_read_the_same() -> None:
    rng = random.Random(40)
    for fast, declared in (
        (bitmaps.ENTRY, BITMAP_DIRECTORY_ENTRY),
        (snapshots.ENTRY, SNAPSHOT_ENTRY),
        (snapshots.EXTRA, SNAPSHOT_EXTRA),
    ):
        assert fast.size == declared.sizeof()
        for _ in range(20):
            data = rng.randbytes(fast.size)
            values = [value for name, value in declared.parse(data).items() if name != "_io"]
            assert list(fast.unpack(data)) == values
    fields = [field.name for field in BITMAP_DIRECTORY_ENTRY.subcons]
    assert list(bitmaps.DirectoryEntry._fields) == fields
