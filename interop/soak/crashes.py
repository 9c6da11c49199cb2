"""Every image that a crash can leave, of many seeded runs: `main` for long, `crash_run` for one.

A run opens an image, changes it with requests that meet in flight, flushes now and then, closes it
and begins again; everything that its files were told is on a `Timeline`. Then the images of every
epoch of that timeline are built and judged.

``python -m interop.soak.crashes --plan growing --seed 7`` repeats one run and tells what is wrong.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from random import Random
from unittest.mock import patch

import click

from interop.soak.cells import CELL, Request
from interop.soak.judging import Before, Broken, Judge
from interop.soak.plans import PLANS, RAW, Files, Plan, build, is_dirty, requests
from interop.soak.recording import SteppedEngine, Timeline, recorded
from interop.soak.replay import KINDS, epochs, images
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine
from pynbd.block.node import BlockNode
from pynbd.errors import PynbdError

REQUESTS = 60  # of a session, between an opening and a closing
SESSIONS = 2
OTHERS = 3  # subsets, and torn images, of an epoch
REPAIRS = 3  # images of a run that are repaired under record
PEER_EVERY = 30  # one in so many images is shown to qemu-img


class Variant(StrEnum):
    """What is special about a run."""

    PLAIN = "plain"
    THREADS = "threads"  # calls are made in threads, as in a server: never the same way twice
    STEPS = "steps"  # all that is bounded by a size that small images do not reach, at little ones
    FAULTS = "faults"  # some writes fail, with a part of them written


_LITTLE = {
    "commit.MAX_CHANGED_PAGES": 2,
    "commit.MAX_LAZY_BLOCKS": 1,
    "writer.CLUSTERS_PER_STEP": 3,
    "zeroing._ENTRIES_PER_STEP": 4,
    "zeroing._CLUSTERS_RESERVED_PER_STEP": 2,
    "refcounts._MAX_HOLES": 4,
    "refcounts._STEPS_PER_SEARCH": 1,
    "refcounts._MIN_GROWTH": 4096,
}


class Crash(AssertionError):
    """An image that breaks a promise; how to build it again."""


async def perform(
    plan: Plan, image: Path, seed: int, count: int, variant: Variant
) -> tuple[Timeline, list[Request]]:
    """Change an image; what its files were told, and what they were told for."""
    rng = Random(seed)
    asked: list[Request] = []
    failures = (OSError, PynbdError) if variant is Variant.FAULTS else ()
    with ExitStack() as stack:
        timeline = stack.enter_context(recorded(Random(seed) if failures else None))
        if variant is Variant.STEPS:
            for name, value in _LITTLE.items():
                stack.enter_context(patch(f"pynbd.block.qcow2.{name}", value))
        engine = Engine() if variant is Variant.THREADS else SteppedEngine(seed)
        stack.callback(engine.close)
        # A session that cannot be ended well is the last one: it may have lost what it kept.
        with suppress(*failures):
            for _ in range(SESSIONS):
                node = await open_image(image, format=plan.format, read_only=False, engine=engine)
                try:
                    await _session(plan, node, rng, count, timeline, asked, failures)
                finally:
                    await node.close()
    return timeline, asked


async def _session(
    plan: Plan,
    node: BlockNode,
    rng: Random,
    count: int,
    timeline: Timeline,
    asked: list[Request],
    failures: tuple[type[Exception], ...],
) -> None:
    """One group of requests after the other, up to a number of them at the same time."""
    under_way: set[asyncio.Task[None]] = set()
    at_once = rng.choice((1, 2, 4, 8, 16))
    for group in requests(plan, rng, count, len(asked)):
        asked += group
        under_way.add(asyncio.create_task(timed(group, timeline, _ask(node, group, rng.random()))))
        while len(under_way) >= at_once:
            done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                with suppress(*failures):
                    task.result()
    for task in under_way:
        with suppress(*failures):
            await task


async def timed(group: Sequence[Request], timeline: Timeline, answer: Awaitable[None]) -> None:
    """Note when a group of requests begins, and when it was answered."""
    begin = timeline.tick()
    for request in group:
        request.begin = begin
    await answer
    end = timeline.tick()
    for request in group:
        request.end = end


async def _ask(node: BlockNode, group: Sequence[Request], choice: float) -> None:
    head = group[0]
    offset, length = head.first * CELL, (head.last - head.first) * CELL
    if head.kind == "write":
        pieces = [(r.first * CELL, r.payload.tobytes()) for r in group if r.payload is not None]
        for error in await node.pwrite_batch(pieces, fua=head.fua):
            if error:
                raise error
    elif head.kind == "zeroes":
        unmap, no_hole = choice < 0.6, choice > 0.8
        await node.write_zeroes(
            offset, length, may_unmap=unmap, fast=False, fua=head.fua, no_hole=no_hole
        )
    elif head.kind == "discard":
        await node.discard(offset, length, fua=head.fua)
    else:
        await node.flush()


@contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    """One for the run, on a file system with a disk; one for the images that are judged."""
    memory = Path("/dev/shm")
    fast = memory if memory.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="pynbd-crash-") as run,
        tempfile.TemporaryDirectory(prefix="pynbd-crash-", dir=fast) as judged,
    ):
        yield Path(run), Path(judged)


async def crash_run(
    plan: Plan,
    seed: int,
    *,
    count: int = REQUESTS,
    variant: Variant = Variant.PLAIN,
    peer_every: int = PEER_EVERY,
    keep: Path | None = None,
) -> Counter[str]:
    """One run with ``count`` requests a session, and all of its images; how many there were, by
    kind. Of those that are marked dirty some are repaired, and that may crash, too.

    ``keep``: a folder for an image that breaks a promise. Raises `Crash`.
    """
    counts: Counter[str] = Counter()
    with folders() as (folder, judged):
        image = build(plan, folder)
        before = await Before.of(plan, image)
        below = {path.name: path.read_bytes() for path in folder.glob("base.*")}
        for name, content in below.items():
            (judged / name).write_bytes(content)
        timeline, asked = await perform(plan, image, seed, count, variant)
        judge = Judge(plan, judged, before, asked)
        dirty: list[Files] = []
        try:
            async for left in _judged(judge, timeline, before.files, seed, counts, peer_every):
                if plan.lazy and len(dirty) < REPAIRS and counts.total() % 16 == 0:
                    dirty += [left] * is_dirty(left[image.name])
            if variant is not Variant.FAULTS:
                await judge.closed({name: (folder / name).read_bytes() for name in plan.files})
            for left in dirty:
                for name, content in left.items():
                    (folder / name).write_bytes(content)
                before = await Before.of(plan, image)
                timeline, _ = await perform(plan, image, seed, 0, variant)
                judge = Judge(plan, judged, before, [])
                async for _ in _judged(judge, timeline, left, seed, counts, peer_every):
                    counts["crashes of a repair"] += 1
        except Broken as problem:
            if keep:
                shutil.copytree(judged, keep, dirs_exist_ok=True)
            raise Crash(
                f"--plan {plan.name} --seed {seed} --count {count} --variant {variant}: image"
                f" {images_of(counts)}: {problem}"
            ) from problem
        for name, content in below.items():
            assert (folder / name).read_bytes() == content, f"{name} was written to"
    return counts


async def _judged(
    judge: Judge,
    timeline: Timeline,
    files: Files,
    seed: int,
    counts: Counter[str],
    peer_every: int,
) -> AsyncIterator[Files]:
    """Every image that a crash can leave, after it was judged. Raises `Broken`."""
    rng = Random(seed)
    for epoch in epochs(timeline, files):
        judge.advance(epoch.end)
        for kind, left in images(epoch, rng, OTHERS):
            counts[kind] += 1
            peer = images_of(counts) % peer_every == 0
            counts["shown to qemu-img"] += peer
            try:
                await judge.judge(left, peer=peer)
            except Broken as problem:
                raise Broken(f"{kind} before moment {epoch.end}: {problem}") from problem
            yield {name: bytes(content) for name, content in left.items()}


def main(wanted: int = 20_000, seed: int = 1) -> Counter[str]:
    """Runs of all plans until ``wanted`` images were judged; prints how many, by kind."""
    quiet()
    counts: Counter[str] = Counter()
    started = time.monotonic()
    for number in itertools.count(seed):
        variant = list(Variant)[number % len(Variant)]
        print(
            f"  {images_of(counts)} images so far; runs with seed {number}: {variant}", flush=True
        )
        for plan in (*PLANS, RAW):
            counts += asyncio.run(crash_run(plan, number, variant=variant))
            counts["runs"] += 1
            if images_of(counts) >= wanted:
                took = time.monotonic() - started
                print(f"{images_of(counts)} images of crashes in {took:.0f} s: {told(counts)}")
                return counts
    raise AssertionError


def quiet() -> None:
    """Images are repaired by the thousand: nobody needs to be told."""
    logging.getLogger("pynbd").setLevel(logging.ERROR)


def images_of(counts: Counter[str]) -> int:
    return sum(counts[kind] for kind in KINDS)


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


@click.command()
@click.option("--plan", "name", type=click.Choice([p.name for p in (*PLANS, RAW)]), required=True)
@click.option("--seed", default=1, show_default=True, help="What decides about everything.")
@click.option("--count", default=REQUESTS, show_default=True, help="Requests of a session.")
@click.option(
    "--variant", type=click.Choice([*map(str, Variant)]), default="plain", show_default=True
)
@click.option("--keep", type=click.Path(path_type=Path), help="A folder for what is broken.")
def repeat(name: str, seed: int, count: int, variant: str, keep: Path | None) -> None:
    """Repeat one run, and say what is wrong with the first image that breaks a promise."""
    quiet()
    (plan,) = (plan for plan in (*PLANS, RAW) if plan.name == name)
    try:
        counts = asyncio.run(
            crash_run(plan, seed, count=count, variant=Variant(variant), keep=keep)
        )
    except Crash as problem:
        sys.exit(str(problem))
    print(told(counts))


if __name__ == "__main__":
    repeat()
