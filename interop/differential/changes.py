"""What requests have made of a place of the disk, and what the specification leaves open there.

"Request types" of the NBD specification: TRIM is a hint, WRITE_ZEROES may make a hole, NO_HOLE
forbids it. A granule is what has a state of its own: a cluster, or a subcluster with extended L2.
What covers all of it leaves nothing open; neither do bytes that are written, wherever in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from interop.differential.asking import Ask
from tests.conformance.client import Cmd, CmdFlag


class Effect(Enum):
    BYTES = "they are written"
    ZEROES = "wherever they come from"
    DISCARD = "of what is whole"


class Range(NamedTuple):
    """Bytes [start, end) of the disk."""

    start: int
    end: int

    def meets(self, other: Range) -> bool:
        return self.start < other.end and other.start < self.end

    def within(self, other: Range) -> Range:
        """What of this lies in the other one, which it meets."""
        return Range(max(self.start, other.start), min(self.end, other.end))

    def holds(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True)
class Change:
    """A request that both servers have carried out."""

    ask: Ask
    effect: Effect
    range: Range

    @property
    def no_hole(self) -> bool:
        return bool(self.ask.flags & CmdFlag.NO_HOLE)

    def zeroes_less_than(self, unit: int) -> bool:
        """Whether zeroes begin or end inside a unit of so many bytes."""
        ends = self.range.start % unit or self.range.end % unit
        return self.effect is Effect.ZEROES and ends != 0


def change(ask: Ask, *, detecting: bool) -> Change:
    """``detecting``: zeroes that are written are turned into WRITE_ZEROES."""
    if ask.command == Cmd.TRIM:
        effect = Effect.DISCARD
    elif ask.command == Cmd.WRITE_ZEROES or (detecting and not any(ask.payload)):
        effect = Effect.ZEROES
    else:
        effect = Effect.BYTES
    return Change(ask, effect, Range(ask.offset, ask.end))


@dataclass(frozen=True)
class History:
    """What has happened to a cluster, in this order, and to one granule of it."""

    granule: Range
    cluster: Range
    changes: tuple[Change, ...]

    @property
    def last(self) -> Change | None:
        """Who has decided about the granule. A discard of less of it does nothing."""
        for each in reversed(self.changes):
            acts = each.range.holds if each.effect is Effect.DISCARD else each.range.meets
            if acts(self.granule):
                return each
        return None

    def _decided_by(self, effect: Effect) -> Change | None:
        return self.last if self.last and self.last.effect is effect else None

    @property
    def zeroed(self) -> Change | None:
        """The same, if zeroes."""
        return self._decided_by(Effect.ZEROES)

    @property
    def discarded(self) -> Change | None:
        """The same, if a discard."""
        return self._decided_by(Effect.DISCARD)

    @property
    def partly_zeroed(self) -> bool:
        """As bytes, or with the rest of the granule, if that is zero as well."""
        return self.zeroed is not None and not self.zeroed.range.holds(self.granule)

    @property
    def zeroed_in_a_cluster(self) -> Change | None:
        """Who has made the granule zero, but not the whole cluster."""
        last = self.zeroed
        return last if last and not last.range.holds(self.cluster) else None

    @property
    def discarded_in_a_cluster(self) -> bool:
        return self.discarded is not None and not self.discarded.range.holds(self.cluster)

    @property
    def emptied(self) -> bool:
        """Whether the granule was made zero as a whole, and needs no space."""
        last = self.zeroed or self.discarded
        return last is not None and last.range.holds(self.granule) and not last.no_hole

    @property
    def beside_the_first_bytes(self) -> bool:
        """Whether the granule was left out by who was the first to write bytes to the cluster (as
        the ends of zeroes are), and not touched since.
        """
        for index, each in enumerate(self.changes):
            if each.zeroes_less_than(self.granule.end - self.granule.start):
                index += each.range.holds(self.granule)
            elif each.effect is not Effect.BYTES:
                continue
            return History(self.granule, self.cluster, self.changes[index:]).last is None
        return False


def histories(
    place: Range, granule: int, cluster: int, size: int, changes: Iterable[Change]
) -> Iterator[History]:
    """That of each granule of a place, on a disk of ``size`` bytes."""
    found = [each for each in changes if each.range.meets(_around(place, cluster, size))]
    for start in range(place.start // granule * granule, place.end, granule):
        at = Range(start, min(start + granule, size))
        whole = _around(at, cluster, size)
        yield History(at, whole, tuple(each for each in found if each.range.meets(whole)))


def _around(place: Range, unit: int, size: int) -> Range:
    return Range(place.start // unit * unit, min(-(-place.end // unit) * unit, size))
