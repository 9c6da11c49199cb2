"""The law has teeth: each rule of the order of writes is switched off, and the crash tests notice.

A `Mutation` breaks one rule in the code, by a patch, and names a run that finds an image which
breaks a promise. docs/design.md, "The order of writes", lists rule and failure.

``python -m interop.soak.mutations`` prints what each of them leads to.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from random import Random
from unittest.mock import patch

from interop.soak.crashes import Crash, crash_run, folders, quiet
from interop.soak.plans import PLANS, build, is_corrupt
from interop.soak.recording import SteppedEngine, recorded
from interop.soak.replay import epochs, images
from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.chain import open_image
from pynbd.block.engine import Buffer, HostFile
from pynbd.block.qcow2 import commit
from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.commit import Commits, Rule
from pynbd.block.qcow2.cow import CopyOnWrite
from pynbd.block.qcow2.format import COPIED, L1E_OFFSET_MASK, BitmapFlags, Incompatible
from pynbd.block.qcow2.in_flight import InFlight
from pynbd.block.qcow2.links import Links
from pynbd.block.qcow2.tracking import Tracking
from pynbd.block.qcow2.writer import Writer

Patch = AbstractContextManager[object]

PLAN = {plan.name: plan for plan in PLANS}


@dataclass(frozen=True)
class Mutation:
    """``patch`` breaks ``rule`` (``how``); the run of ``plan`` with ``seed`` shows it, or with one
    of the next seeds.
    """

    rule: Rule | str
    how: str
    patch: Callable[[], Patch]
    plan: str = ""  # that of `damage_run`
    seed: int = 1

    def __str__(self) -> str:
        return f"{getattr(self.rule, 'name', self.rule)}: {self.how}"


def without_barrier(rule: Rule) -> Patch:
    barrier = Commits.barrier

    async def some(commits: Commits, asked: Rule) -> None:
        if asked is not rule:
            await barrier(commits, asked)

    return patch.object(Commits, "barrier", some)


def without_flush_of_data_file() -> Patch:
    flush = HostFile.flush

    async def some(file: HostFile) -> None:
        if not file.path.endswith(".data"):
            await flush(file)

    return patch.object(HostFile, "flush", some)


def reuse_at_once() -> Patch:
    whole = Commits.commit

    async def early(commits: Commits) -> None:
        freed, commits._freed = commits._freed, []
        await commits.release(freed)
        await whole(commits)

    return patch.object(Commits, "commit", early)


def links_before_refcounts() -> Patch:
    inner = Commits._commit

    async def swapped(commits: Commits) -> None:
        blocks, commits._blocks = commits._blocks, {}
        await inner(commits)
        commits._blocks |= blocks
        await inner(commits)

    return patch.object(Commits, "_commit", swapped)


def late_pins() -> Patch:
    """A write in place waits between its map and its pin."""
    in_place = Writer._in_place

    async def late(writer: Writer, writes: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        for _ in range(1000):
            await asyncio.sleep(0)
        return await in_place(writer, writes)

    return patch.object(Writer, "_in_place", late)


def no_copy() -> Patch:
    return patch.object(CopyOnWrite, "_gaps", lambda cow, cluster: iter(()))


def nobody_waits() -> Patch:
    return patch.object(InFlight, "overlap", lambda *_: False)


def shared_tables_in_place() -> Patch:
    new = Links._new_table

    async def changed(links: Links, l1_index: int, shared: Table | None) -> Table:
        return shared or await new(links, l1_index, shared)

    return patch.object(Links, "_new_table", changed)


def unmarked() -> Patch:
    return patch.object(DirtyBitmap, "mark", lambda bitmap, offset, length: None)


def never_dirty() -> Patch:
    async def nothing(commits: Commits) -> None:
        pass

    return patch.object(Commits, "_mark_dirty", nothing)


def clean_before_refcounts() -> Patch:
    finish = Commits.finish

    async def early(commits: Commits) -> None:
        await commits._fields.set_incompatible(Incompatible.DIRTY, on=False)
        await finish(commits)

    return patch.object(Commits, "finish", early)


def stored_before_bits() -> Patch:
    store = Tracking.store

    async def early(tracking: Tracking) -> None:
        await tracking._set_flags(BitmapFlags.NONE)
        await store(tracking)

    return patch.object(Tracking, "store", early)


def dirty_without_barrier() -> Patch:
    """Lazy refcounts are written with every commit, so that DIRTY has something to come before."""
    stack = ExitStack()
    stack.enter_context(patch.object(commit, "MAX_LAZY_BLOCKS", -1))
    stack.enter_context(without_barrier(Rule.DIRTY))
    return stack


async def damage_run(seed: int) -> None:
    """A write meets an entry that leads into a refcount block. Raises `Crash` if an image that a
    crash can leave after its failure was told is not marked corrupt.
    """
    plan = PLANS[0]
    with folders() as (folder, _), recorded() as timeline:
        image = build(plan, folder)
        content = bytearray(image.read_bytes())
        (l1_table, refcount_table) = struct.unpack_from(">QQ", content, 40)
        (l2_table,), (block,) = (
            struct.unpack_from(">Q", content, table) for table in (l1_table, refcount_table)
        )
        struct.pack_into(">Q", content, l2_table & L1E_OFFSET_MASK, block | COPIED)
        image.write_bytes(content)
        async with await open_image(image, read_only=False, engine=SteppedEngine(seed)) as node:
            (error,) = await node.pwrite_batch([(0, bytes(512))])
            assert error
            told = timeline.tick()
    for epoch in epochs(timeline, {image.name: bytes(content)}):
        for kind, left in images(epoch, Random(seed), 3):
            if epoch.end > told and not is_corrupt(left[image.name]):
                raise Crash(f"a write has failed, and an image ({kind}) is not marked corrupt")


MUTATIONS = (
    Mutation(Rule.REFERENCED, "no barrier", partial(without_barrier, Rule.REFERENCED), "plain"),
    Mutation(Rule.REFERENCED, "refcounts after links", links_before_refcounts, "small"),
    Mutation(Rule.REFERENCED, "data file not flushed", without_flush_of_data_file, "apart"),
    Mutation(Rule.COUNTED, "no barrier", partial(without_barrier, Rule.COUNTED), "blocks", 4),
    Mutation(Rule.FREED, "no barrier", partial(without_barrier, Rule.FREED), "plain"),
    Mutation(Rule.FREED, "given back before the commit", reuse_at_once, "tiny"),
    Mutation(Rule.DIRTY, "no barrier", dirty_without_barrier, "lazy", 4),
    Mutation(Rule.DIRTY, "never set", never_dirty, "lazy"),
    Mutation(Rule.CLEAN, "cleared before the last commit", clean_before_refcounts, "lazy"),
    Mutation(Rule.IN_USE, "no barrier", partial(without_barrier, Rule.IN_USE), "bitmaps", 3),
    Mutation(Rule.IN_USE, "changes are not recorded", unmarked, "bitmaps"),
    Mutation(Rule.STORED, "cleared before the bits are written", stored_before_bits, "bitmaps"),
    Mutation(Rule.AUTOCLEAR, "no barrier", partial(without_barrier, Rule.AUTOCLEAR), "unknown"),
    Mutation(Rule.CORRUPT, "no barrier", partial(without_barrier, Rule.CORRUPT)),
    Mutation("pins", "taken too late", late_pins, "tiny", 17),
    Mutation("copy on write", "nothing is copied", no_copy, "overlay"),
    Mutation("copy on write", "shared L2 tables are changed", shared_tables_in_place, "two-bit"),
    Mutation("overlapping changes wait", "they do not", nobody_waits, "tiny"),
)


async def find(mutation: Mutation, seeds: int = 10) -> str:
    """What the mutation leads to, with one of some seeds; "" if nothing was found."""
    for seed in range(mutation.seed, mutation.seed + seeds):
        with mutation.patch():
            try:
                if mutation.plan:
                    await crash_run(PLAN[mutation.plan], seed, count=40, peer_every=1 << 30)
                else:
                    await damage_run(seed)
            except Crash as found:
                return str(found)
    return ""


def main() -> None:
    """Print what each mutation leads to."""
    quiet()
    for mutation in MUTATIONS:
        print(f"{mutation}: {asyncio.run(find(mutation)) or 'NOTHING'}")


if __name__ == "__main__":
    main()
