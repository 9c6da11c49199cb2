"""What a crash can leave: from the changes and syncs of a `Timeline` to the contents of the files.

The host keeps what had returned before an fdatasync of that file began which has succeeded, and of
what began since any part, by sectors: each sector is as it was at some moment since (the page cache
takes a write as a whole, the disk a sector). A sync of one file says nothing of the others.

An *epoch* lies between two syncs. All its images are what it began with and some of what is
pending: every prefix of it in the order in which it began; seeded subsets, in any order in which it
may have happened; and torn ones, of whose changes only some sectors arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from interop.soak.recording import Change, Timeline

SECTOR = 512

KINDS = "prefix", "subset", "torn"

Contents = dict[str, bytearray]


@dataclass(slots=True)
class Epoch:
    """``base``: what is on stable storage, lent until the next epoch; ``pending``: what may be.

    Of these changes none is known to have arrived at any moment until ``end``.
    """

    end: int
    base: Contents
    pending: Sequence[Change]


def epochs(timeline: Timeline, files: Mapping[str, bytes]) -> Iterator[Epoch]:
    """The epochs of a timeline, from the contents of the files at its beginning."""
    base = {name: bytearray(content) for name, content in files.items()}
    coming = sorted(timeline.changes, key=lambda change: change.begin)
    pending: list[Change] = []
    for sync in sorted(timeline.syncs, key=lambda sync: sync.end):
        while coming and coming[0].begin < sync.end:
            pending.append(coming.pop(0))
        yield Epoch(sync.end, base, pending)
        rest: list[Change] = []
        for change in pending:
            if change.file == sync.file and change.end is not None and change.end < sync.begin:
                apply(change, base[change.file])
            else:
                rest.append(change)
        pending = rest
    yield Epoch(timeline.now + 1, base, pending + coming)


def apply(change: Change, content: bytearray) -> None:
    """Let a change happen to the whole content of its file."""
    end = change.offset + change.length
    if change.size is not None:
        end = change.size
        del content[end:]
    if end > len(content):
        content.extend(bytes(end - len(content)))
    if change.size is None:
        content[change.offset : end] = change.data or bytes(change.length)


def images(epoch: Epoch, rng: Random, others: int) -> Iterator[tuple[str, Contents]]:
    """(kind, contents) of the different images of an epoch: every prefix, and for each pending
    change, up to ``others``, one subset and one torn image. Contents are lent until the next one.
    """
    seen: set[bytes] = set()
    contents = {name: bytearray(content) for name, content in epoch.base.items()}
    for change in [None, *epoch.pending]:
        if change:
            apply(change, contents[change.file])
        if _is_new(epoch, contents, seen):
            yield "prefix", contents
    for _ in range(min(others, len(epoch.pending) - 1)):
        for kind in "subset", "torn":
            contents = _some(epoch, rng, torn=kind == "torn")
            if _is_new(epoch, contents, seen):
                yield kind, contents


def _is_new(epoch: Epoch, contents: Contents, seen: set[bytes]) -> bool:
    """Whether no image of the epoch was like this one: they differ in what is pending only."""
    digest = blake2b(digest_size=16)
    for content in contents.values():
        digest.update(len(content).to_bytes(8, "big"))
    for change in epoch.pending:
        digest.update(contents[change.file][change.offset : change.offset + change.length])
    new = digest.digest() not in seen
    seen.add(digest.digest())
    return new


def _some(epoch: Epoch, rng: Random, *, torn: bool) -> Contents:
    """A random part of what is pending has arrived."""
    # A change took place at some moment between its beginning and its end.
    forever = epoch.end
    order = sorted(epoch.pending, key=lambda c: rng.uniform(c.begin, c.end or forever))
    all_of_it = {name: bytearray(content) for name, content in epoch.base.items()}
    arrived = {name: bytearray(content) for name, content in epoch.base.items()}
    share = rng.choice((0.15, 0.5, 0.85))
    for change in order:
        whole, content = all_of_it[change.file], arrived[change.file]
        apply(change, whole)
        if rng.random() >= share:
            continue
        if change.size is not None:
            apply(change, content)
            continue
        # A sector arrives as it is by then, with what was written to its other bytes before.
        for first, last in _sectors(change, rng, torn=torn):
            last = min(last, len(whole))
            if last > len(content):
                content.extend(bytes(last - len(content)))
            content[first:last] = whole[first:last]
    return arrived


def _sectors(change: Change, rng: Random, *, torn: bool) -> Iterator[tuple[int, int]]:
    """(first, last) byte of the parts of a change that arrive, by whole sectors."""
    first = change.offset // SECTOR * SECTOR
    last = -(-(change.offset + change.length) // SECTOR) * SECTOR
    if not torn:
        yield first, last
        return
    cuts = sorted(rng.randrange(first, last + 1, SECTOR) for _ in range(rng.randrange(1, 5)))
    arrives = rng.random() < 0.5
    for begin, end in zip([first, *cuts], [*cuts, last], strict=True):
        if arrives:
            yield begin, end
        arrives = not arrives
