"""Every difference between pynbd and qemu-nbd that is known, and right: no other is tolerated.

Each has a name, the row of docs/protocol-support.md (or the section of docs/design.md) that says
what pynbd does, and the reason. It applies only where it says that it does, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from interop.differential.answering import DISCONNECTED
from interop.differential.asking import Ask
from tests.conformance.client import Cmd, CmdFlag, Errno, Mode

SECTOR = 512


@dataclass(frozen=True)
class Facts:
    """What the rules have to know: the disk (the smaller one, if they differ), and how it is
    served.
    """

    size: int
    cluster_size: int
    writable: bool
    damaged: bool


@dataclass(frozen=True)
class Place:
    """Where two maps differ: both disks read the same there, and ``zeroes`` or not; the requests
    that have changed anything in these clusters.
    """

    context: str
    ours: int
    theirs: int
    zeroes: bool
    changed_by: tuple[Ask, ...]

    @property
    def states(self) -> set[int]:
        return {self.ours, self.theirs}

    @property
    def zeroed(self) -> bool:
        """Whether anybody has written zeroes there, in any way."""
        return any(
            ask.command == Cmd.WRITE_ZEROES or ask.kind == "blank" for ask in self.changed_by
        )

    @property
    def trimmed(self) -> bool:
        return any(ask.command == Cmd.TRIM for ask in self.changed_by)


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

ALLOCATION, DEPTH = "base:allocation", "qemu:allocation-depth"
DATA, KNOWN_ZEROES, HOLE = 0, 2, 3

STATES = [
    OfStates(
        "how zeroes are kept",
        "W8",
        "of less than a cluster, or with NO_HOLE: as bytes, or as a zero cluster; the disk reads"
        " the same",
        lambda place, facts: place.zeroes and place.zeroed and place.context in (ALLOCATION, DEPTH),
    ),
    OfStates(
        "how much of a TRIM is done",
        "W13, W14",
        "subclusters are discarded here; the disk reads the same",
        lambda place, facts: (
            place.zeroes and place.trimmed and place.context in (ALLOCATION, DEPTH)
        ),
    ),
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
            and place.states in ({DATA, KNOWN_ZEROES}, {KNOWN_ZEROES, HOLE})
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
HINT = Rule(
    "TRIM is a hint",
    "W13, W14",
    "what was discarded may read as anything afterwards: it is written anew",
)
STRICTER = Rule(
    "a snapshot table that is cut short",
    "docs/design.md",
    "such an image is refused; qemu-nbd reads zeroes past the end of the file, as for a table",
)
REFUSED_HERE = ("damaged snapshots, their table at the end",)
EVERY = [*ERRORS, *STATES, SHORTER, DONE_TWICE, HINT, STRICTER]
