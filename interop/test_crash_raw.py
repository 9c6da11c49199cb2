"""The crash tests themselves, on the simplest of images: a raw file whose FLUSH is an fdatasync."""

from __future__ import annotations

from random import Random
from unittest.mock import patch

import pytest

from interop.soak.crashes import Crash, Variant, crash_run
from interop.soak.plans import RAW
from interop.soak.recording import Change, Sync, Timeline
from interop.soak.replay import Epoch, epochs, images
from pynbd.block.engine import HostFile


async def no_flush(file: HostFile) -> None:
    """A file that is never asked to bring anything onto stable storage."""


@pytest.mark.parametrize("variant", Variant)
async def test_a_raw_file_loses_nothing(variant: Variant) -> None:
    counts = await crash_run(RAW, 1, variant=variant)
    assert counts["prefix"] > 50
    assert counts["subset"] > 5
    assert counts["torn"] > 5


async def test_a_flush_that_does_nothing_is_found() -> None:
    with patch.object(HostFile, "flush", no_flush), pytest.raises(Crash, match="allowed"):
        await crash_run(RAW, 1)


def left(epoch: Epoch) -> set[tuple[bytes, ...]]:
    """The contents of the files that a crash can leave in an epoch, by many seeds."""
    return {
        tuple(bytes(content) for content in contents.values())
        for seed in range(60)
        for _, contents in images(epoch, Random(seed), 3)
    }


def test_what_a_crash_can_leave() -> None:
    def write(file: str, begin: int, end: int | None, sector: int, byte: bytes) -> Change:
        return Change(file, begin, sector * 512, 512, data=byte * 512, end=end)

    timeline = Timeline(
        changes=[
            write("a", 1, 2, 0, b"1"),  # before the sync of its file
            write("b", 3, 4, 0, b"2"),  # of the other one, which is not synced
            write("a", 5, 7, 1, b"3"),  # under way when the sync begins
        ],
        syncs=[Sync("a", begin=6, end=8)],
        now=8,
    )
    files = {"a": b"." * 1024, "b": b"." * 512}
    first, second = [
        {(a[::512], b[::512]) for a, b in left(epoch)} for epoch in epochs(timeline, files)
    ]
    assert first == {
        (one + three, two) for one in (b".", b"1") for two in (b".", b"2") for three in (b".", b"3")
    }
    assert second == {(b"1" + three, two) for two in (b".", b"2") for three in (b".", b"3")}


def test_sectors_go_forward_only() -> None:
    """The second write of a sector comes with the first one; other sectors are on their own."""
    timeline = Timeline(
        changes=[
            Change("a", 1, 0, 256, data=b"1" * 256, end=2),
            Change("a", 3, 256, 768, data=b"2" * 768, end=4),
        ],
        now=4,
    )
    (found,) = [left(epoch) for epoch in epochs(timeline, {"a": b"." * 1024})]
    starts = {(b"." * 512), (b"1" * 256 + b"." * 256), (b"1" * 256 + b"2" * 256)}
    ends = {b"." * 512, b"2" * 512}
    possible = {(start + end,) for start in starts for end in ends}
    assert found <= possible
    assert len(found) >= len(possible) - 1
