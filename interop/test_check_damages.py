"""pynbd check of damaged images: the verdict, the numbers and the status of qemu-img check; and
what is repaired, so that qemu-img check finds nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import damages, peers
from interop.checking import content, pynbd_check, qemu_check

every_damage = pytest.mark.parametrize("image, damage", damages.every_damage())

# What no repair can mend, QEMU's neither: what was there is not known. Clusters that seem to be
# leaks beside it stay as they are, as somebody may have lost them; QEMU frees them.
LEFT = {
    "plain": {
        "L2 table misaligned",
        "L2 table at the end",
        "L2 table far away",
        "L2 table in data",
        "L2 table in a refcount block",
        "L1 table in data",
        "data misaligned",
        "data at the end",
        "data far away",
        "compressed far away",
        "file ends after the header",
    },
    "narrow": {"data twice"},  # refcounts of one bit cannot say so
    "extended": {
        "a subcluster both allocated and zero",
        "a subcluster allocated nowhere",
        "data misaligned",
    },
    "data file": {"data misaligned", "data that claims to be compressed"},
    "snapshots": {
        "its data misaligned",
        "its data at the end",
        "its L2 table misaligned",
        "its L1 table misaligned",
        "its L1 table too long",
        "less extra data",  # and so all behind it is not where it should be
    },
    "bitmaps": {"bitmap data at the end"},
}
# The file ends before a table: what it named is kept, though nobody refers to it now.
LEAKS_LEFT = {
    "plain": {"L1 table at the end"},
    "snapshots": {"their table at the end", "its L1 table at the end"},
    "bitmaps": {"bitmap table at the end"},
}
# Where the tables of the snapshots or of bitmaps are not known, neither are their references: there
# is no check, and no repair. (Of the first one QEMU throws extra data away.)
NOT_CHECKED = {
    "snapshots": {"too much extra data", "their table misaligned"},
    "bitmaps": {
        "directory entry of an unknown type",
        "directory entry, unknown flags",
        "bitmap table misaligned",
        "bitmap table in data",
        "bitmap table of another size",
        "bitmap data misaligned",
        "bitmap table entry, bit 3",
    },
}


def test_there_are_enough() -> None:
    assert len(damages.every_damage()) >= 100


@every_damage
def test_same_verdict(image: str, damage: str, tmp_path: Path) -> None:
    peers.require("qemu-img")
    path = damages.damaged(image, damage, tmp_path)
    before = path.read_bytes()
    assert pynbd_check(path) == qemu_check(path)
    assert path.read_bytes() == before


@every_damage
def test_repair(image: str, damage: str, tmp_path: Path) -> None:
    peers.require("qemu-img")
    path = damages.damaged(image, damage, tmp_path)
    before = content(path)
    found = qemu_check(path)
    done = pynbd_check(path, "-r", "all")
    left = qemu_check(path)
    if damage in NOT_CHECKED.get(image, ()):
        assert done.status == left.status == 1
    elif damage in LEFT.get(image, ()):
        assert found.report
        assert left.report
        assert done.status == left.status == 2
        assert left.report["corruptions"] <= found.report["corruptions"]
    else:
        assert done.status == left.status == (3 if damage in LEAKS_LEFT.get(image, ()) else 0)
        assert incompatible(path) & 3 == 0
    assert before is None or content(path) == before


@pytest.mark.parametrize("image", damages.DAMAGES)
def test_repair_of_leaks_alone(image: str, tmp_path: Path) -> None:
    """As far as QEMU goes: refcounts that are too low, and flags beside them, stay."""
    peers.require("qemu-img")
    for damage in damages.DAMAGES[image]:
        path = damages.damaged(image, damage, tmp_path)
        found = qemu_check(path)
        if not found.report or damage in LEFT.get(image, ()):
            continue
        done = pynbd_check(path, "-r", "leaks")
        left = qemu_check(path)
        assert left.report, damage
        assert done.status == left.status, damage
        assert left.report.get("corruptions", 0) <= found.report.get("corruptions", 0), damage
        if found.report.get("corruptions", 0) == 0:
            assert left.status == 0, damage


def incompatible(path: Path) -> int:
    fields = path.read_bytes()[:80]
    return int.from_bytes(fields[72:80], "big") if fields[7] >= 3 else 0
