"""Every difference between pynbd and qemu-nbd that is known, and right: no other is tolerated.

Each has a name, the row of docs/protocol-support.md (or the section of docs/design.md) that says
what pynbd does, and the reason. It applies only where it says that it does, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from interop.differential.answering import DISCONNECTED
from interop.differential.asking import Ask
from interop.differential.changes import Change, History
from tests.conformance.client import Cmd, CmdFlag, Errno, Mode

SECTOR = 512


@dataclass(frozen=True)
class Facts:
    """What the rules have to know: the disk (the smaller one, if they differ), the image, and
    how it is served. ``shared``: a snapshot has clusters of it, too.
    """

    size: int
    cluster_size: int
    subcluster_size: int
    shared: bool
    compressed: bool
    version_2: bool
    raw: bool
    damaged: bool
    writable: bool
    detecting: bool

    @property
    def extended(self) -> bool:
        return self.subcluster_size < self.cluster_size


@dataclass(frozen=True)
class Place:
    """A granule where two maps differ: both disks read the same there, and ``zeroes`` or not."""

    context: str
    ours: int
    theirs: int
    zeroes: bool
    history: History

    @property
    def states(self) -> set[int]:
        return {self.ours, self.theirs}

    @property
    def told(self) -> tuple[str, int, int]:
        return self.context, self.ours, self.theirs

    @property
    def of_zeroes(self) -> bool:
        """Whether it is only about how zeroes are kept."""
        return self.zeroes and self.context in (ALLOCATION, DEPTH)


@dataclass(frozen=True)
class Rule:
    name: str
    row: str
    reason: str


@dataclass(frozen=True)
class OfErrors(Rule):
    """``applies(request, mode, our error, theirs, facts)``; 0 is success."""

    applies: Callable[[Ask, Mode, int, int, Facts], bool]


@dataclass(frozen=True)
class OfStates(Rule):
    """``applies(place, facts)``."""

    applies: Callable[[Place, Facts], bool]


@dataclass(frozen=True)
class OfData(Rule):
    """``applies(history, facts)``: a granule that reads differently after a TRIM."""

    applies: Callable[[History, Facts], bool]


SIZE = OfErrors(
    "512-multiples",
    "F12",
    "qemu-nbd rounds the size of an image to sectors: what lies in between is on one disk only",
    lambda ask, mode, ours, theirs, facts: (
        facts.size < ask.end < facts.size + SECTOR
        and 0 in (ours, theirs)
        and {ours, theirs} & {Errno.EINVAL, Errno.ENOSPC} != set()
    ),
)
ERRORS = [
    SIZE,
    OfErrors(
        "EPERM of a read-only export",
        "W1-W4",
        "qemu-nbd turns every error of validation into EINVAL",
        lambda ask, mode, ours, theirs, facts: (
            ask.changes and not facts.writable and (ours, theirs) == (Errno.EPERM, Errno.EINVAL)
        ),
    ),
    OfErrors(
        "ENOSPC past the end",
        "B2, B3",
        "the same",
        lambda ask, mode, ours, theirs, facts: (
            ask.command in (Cmd.WRITE, Cmd.WRITE_ZEROES)
            and ask.end > facts.size
            and (ours, theirs) == (Errno.ENOSPC, Errno.EINVAL)
        ),
    ),
    OfErrors(
        "FLUSH with an offset or a length",
        "C6",
        "both are reserved and have to be 0; qemu-nbd ignores them",
        lambda ask, mode, ours, theirs, facts: (
            ask.command == Cmd.FLUSH
            and bool(ask.offset or ask.length)
            and (ours, theirs) == (Errno.EINVAL, 0)
        ),
    ),
    OfErrors(
        "CACHE copies",
        "W5",
        "qemu-nbd copies what lies below, and fails where it may not write",
        lambda ask, mode, ours, theirs, facts: (
            ask.command == Cmd.CACHE and not facts.writable and (ours, theirs) == (0, Errno.EPERM)
        ),
    ),
    OfErrors(
        "CACHE is a hint",
        "W5",
        "nothing is told of what cannot be read before somebody reads it",
        lambda ask, mode, ours, theirs, facts: (
            ask.command == Cmd.CACHE and facts.damaged and (ours, theirs) == (0, Errno.EIO)
        ),
    ),
    OfErrors(
        "disconnect after a READ that fails",
        "W12",
        "qemu-nbd closes the connection where it could send an error chunk",
        lambda ask, mode, ours, theirs, facts: (
            ask.command == Cmd.READ
            and facts.damaged
            and mode is not Mode.SIMPLE
            and not ask.flags & CmdFlag.DF
            and (ours, theirs) == (Errno.EIO, DISCONNECTED)
        ),
    ),
    OfErrors(
        "FAST_ZERO",
        "W9",
        "each server knows of itself what is fast",
        lambda ask, mode, ours, theirs, facts: (
            bool(ask.flags & CmdFlag.FAST_ZERO) and {ours, theirs} == {0, Errno.ENOTSUP}
        ),
    ),
]


def _no_hole(change: Change | None) -> bool:
    return change is not None and change.no_hole


ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"
DATA, KNOWN_ZEROES, HOLE = 0, 2, 3

COPIED = OfStates(
    "what a new host cluster is given",
    "docs/design.md",
    "of a cluster that a snapshot shares the subclusters that it has are copied here; there all"
    " between them and the new bytes, also from below",
    lambda place, facts: (
        facts.extended
        and facts.shared
        and place.history.beside_the_first_bytes
        and (
            (place.context == DEPTH and place.ours != 1 and place.theirs == 1)
            or (place.context == ALLOCATION and place.ours != DATA and place.theirs == DATA)
        )
    ),
)

STATES = [
    OfStates(
        "zeroes of less than a granule",
        "W8",
        "as bytes, or together with the rest of the cluster or subcluster if that is zero",
        lambda place, facts: place.of_zeroes and place.history.partly_zeroed,
    ),
    OfStates(
        "NO_HOLE of less than a cluster",
        "W8",
        "subclusters have no space of their own that could be reserved: bytes are written here",
        lambda place, facts: (
            place.of_zeroes and facts.extended and _no_hole(place.history.zeroed_in_a_cluster)
        ),
    ),
    OfStates(
        "zeroes that end in a compressed cluster",
        "W8",
        "it has no subclusters: its part is written as bytes here; there all of the range is, or"
        " only its beginning, and then it has some",
        lambda place, facts: (
            place.of_zeroes
            and facts.extended
            and facts.compressed
            and place.context == ALLOCATION
            and place.states == {DATA, HOLE}
            and place.history.zeroed is not None
            and place.history.zeroed.zeroes_less_than(facts.cluster_size)
        ),
    ),
    OfStates(
        "NO_HOLE in a raw image",
        "W8",
        "of space that was never written the kernel says that it is data once it is in memory",
        lambda place, facts: (
            place.of_zeroes
            and facts.raw
            and place.states == {DATA, HOLE}
            and _no_hole(place.history.zeroed)
        ),
    ),
    OfStates(
        "NO_HOLE in version 2",
        "W8",
        "bytes are written here; there what has nothing below becomes a hole all the same",
        lambda place, facts: (
            place.of_zeroes
            and facts.version_2
            and place.told in ((ALLOCATION, DATA, HOLE), (DEPTH, 1, 0))
            and _no_hole(place.history.zeroed)
        ),
    ),
    OfStates(
        "zeroes of what is zero",
        "W8, W13",
        "what is not there, and has nothing below, stays like that here; there it becomes a zero"
        " cluster",
        lambda place, facts: (
            place.of_zeroes
            and place.context == DEPTH
            and place.ours != 1
            and place.theirs == 1
            and place.history.emptied
        ),
    ),
    OfStates(
        "TRIM of what is not there",
        "W13",
        "with nothing below, it becomes a zero cluster only if it was there before, which the other"
        " rules leave open",
        lambda place, facts: (
            place.of_zeroes and place.told == (DEPTH, 1, 0) and place.history.discarded is not None
        ),
    ),
    OfStates(
        "TRIM of subclusters",
        "W14",
        "they are discarded here, there only whole clusters are",
        lambda place, facts: (
            place.of_zeroes and facts.extended and place.history.discarded_in_a_cluster
        ),
    ),
    COPIED,
    OfStates(
        "holes of the host",
        "X16",
        "under data of an image that seems to be preallocated holes are looked for, and whether it"
        " does depends on when it was looked at; of space that was never written the kernel says"
        " that it is data once it is in memory",
        lambda place, facts: (
            facts.writable
            and place.zeroes
            and place.context == ALLOCATION
            and place.states == {DATA, KNOWN_ZEROES}
            and place.history.zeroed is None
            and (facts.version_2 or place.history.discarded is None)
        ),
    ),
]

SHORTER = Rule(
    "a map that ends sooner",
    "X5-X8",
    "an answer may be shorter than the request; the rest is asked for",
)
DONE_TWICE = Rule(
    "more than one DONE",
    "X15",
    "qemu-nbd ends the reply to a failing BLOCK_STATUS once for each context",
)
HINT = OfData(
    "TRIM is a hint",
    "W13, W14",
    "subclusters are discarded here, there only whole clusters are: all is written anew",
    lambda history, facts: facts.extended and history.discarded_in_a_cluster,
)
STRICTER = Rule(
    "a snapshot table that is cut short",
    "docs/design.md",
    "such an image is refused; qemu-nbd reads zeroes past the end of the file, as for a table",
)
REFUSED_HERE = ("damaged snapshots, their table at the end",)
EVERY = [*ERRORS, *STATES, SHORTER, DONE_TWICE, HINT, STRICTER]
