"""What two servers have answered to the same requests, held against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from interop.differential.answering import (
    DISCONNECTED,
    Answer,
    Connection,
    Map,
    complete,
    covered,
)
from interop.differential.asking import Ask, after
from interop.differential.differences import (
    DONE_TWICE,
    ERRORS,
    HINT,
    SHORTER,
    STATES,
    Facts,
    Place,
    Rule,
)
from tests.conformance.client import Cmd, CmdFlag, Extent

_ENOUGH = 12
"""Differences after which one run is not worth going on."""


class Differs(AssertionError):
    """What no rule explains."""


@dataclass
class Findings:
    """``counts``: requests by kind; ``rules``: how often each was applied; ``unknown``: what no
    rule explains; ``changes``: those that were made, so that a difference can say what was.
    """

    counts: Counter[str] = field(default_factory=Counter)
    rules: Counter[Rule] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    changes: list[Ask] = field(default_factory=list)

    def differs(self, text: str) -> None:
        self.unknown.append(text)
        if len(self.unknown) == _ENOUGH:
            self.judge()

    def judge(self) -> None:
        """Raise `Differs` if there is anything that no rule explains."""
        if self.unknown:
            raise Differs("\n".join(self.unknown))


class Pair:
    """A connection to pynbd, and one like it to qemu-nbd."""

    def __init__(
        self, ours: Connection, theirs: Connection, facts: Facts, findings: Findings
    ) -> None:
        self.ours = ours
        self.theirs = theirs
        self.facts = facts
        self._findings = findings

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        assert not self.ours.done_twice
        self._findings.rules[DONE_TWICE] += self.theirs.done_twice

    def exchange(self, asks: Sequence[Ask]) -> None:
        """Ask both, and compare; where both may do as they like, make the disks alike again."""
        self._ask(asks)
        if self.facts.writable:
            again = list(after(asks))
            if again:
                self._ask(again)
            for ask in asks:
                if ask.kind == "trim" and 0 < ask.length <= self.facts.size - ask.offset:
                    self._alike(ask)

    def _ask(self, asks: Sequence[Ask]) -> None:
        self.ours.send(asks)
        self.theirs.send(asks)
        for ask, ours, theirs in zip(asks, self.ours.receive(), self.theirs.receive(), strict=True):
            self._findings.counts[ask.kind] += 1
            self._compare(ask, ours, theirs)

    def _compare(self, ask: Ask, ours: Answer, theirs: Answer) -> None:
        if ask.changes and not ours.error and not theirs.error:
            self._findings.changes.append(ask)
        if ours.error != theirs.error or ours.error == DISCONNECTED:
            mode = self.ours.mode
            for rule in ERRORS:
                if rule.applies(ask, mode, ours.error, theirs.error, self.facts):
                    self._findings.rules[rule] += 1
                    return
            self._findings.differs(f"{mode.value}: {ask}: {ours} here, {theirs} there")
        elif ours.data != theirs.data:
            pairs = enumerate(zip(ours.data, theirs.data, strict=True))
            at = next(index for index, (a, b) in pairs if a != b)
            said = f"{ask}: the data differ from {ask.offset + at} on"
            self._findings.differs(said + _told(self._changed(ask.offset + at, 1)))
        else:
            for context in ours.status:
                self._compare_maps(ask, context, ours.status[context], theirs.status[context])

    def _compare_maps(self, ask: Ask, context: str, ours: Map, theirs: Map) -> None:
        length = max(covered(ours), covered(theirs))
        if covered(ours) != covered(theirs):
            self._findings.rules[SHORTER] += 1
            ours = complete(self.ours, ask, context, ours, length)
            theirs = complete(self.theirs, ask, context, theirs, length)
        if ask.flags & CmdFlag.REQ_ONE and len({flags for _, flags in (*ours, *theirs)}) == 1:
            return
        for offset, part, a, b in side_by_side(ours, theirs):
            if a != b:
                self._explain(context, a, b, ask.offset + offset, part)

    def _explain(self, context: str, ours: int, theirs: int, offset: int, length: int) -> None:
        here = tuple(self._changed(offset, length))
        place = Place(context, ours, theirs, self._zeroes(offset, length), here)
        for rule in STATES:
            if rule.applies(place, self.facts):
                self._findings.rules[rule] += 1
                return
        said = f"{length} bytes at {offset}: {context} is {ours} here, {theirs} there"
        said += ", of zeroes" if place.zeroes else ""
        self._findings.differs(said + _told(here))

    def _zeroes(self, offset: int, length: int) -> bool:
        """Whether both disks read as zeroes in a place."""
        step = 1 << 20
        for start in range(offset, offset + length, step):
            ask = Ask("read", Cmd.READ, start, min(step, offset + length - start))
            if any(disk.ask(ask).data != bytes(ask.length) for disk in (self.ours, self.theirs)):
                return False
        return True

    def _changed(self, offset: int, length: int) -> Iterator[Ask]:
        """Who has changed the clusters of a place."""
        unit = self.facts.cluster_size
        start, end = offset // unit * unit, -(-(offset + length) // unit) * unit
        return (ask for ask in self._findings.changes if ask.offset < end and start < ask.end)

    def _alike(self, trim: Ask) -> None:
        read = Ask("after a trim", Cmd.READ, trim.offset, trim.length)
        ours, theirs = self.ours.ask(read), self.theirs.ask(read)
        assert not ours.error, f"{read}: {ours}"
        assert not theirs.error, f"{read}: {theirs}"
        if ours.data != theirs.data:
            self._findings.rules[HINT] += 1
            self._ask([Ask("write", Cmd.WRITE, trim.offset, trim.length, payload=ours.data)])

    def all_of_it(self) -> None:
        """Compare the whole disk, and all maps of it."""
        step = 1 << 20
        for offset in range(0, self.facts.size, step):
            length = min(step, self.facts.size - offset)
            asks = [Ask("read", Cmd.READ, offset, length)]
            if self.ours.ids:
                asks.append(Ask("status", Cmd.BLOCK_STATUS, offset, length))
            self._ask(asks)


def _told(changes: Iterable[Ask]) -> str:
    return "".join(f"\n  after {ask}" for ask in changes)


def side_by_side(ours: Map, theirs: Map) -> Iterator[tuple[int, int, int, int]]:
    """Offset, length and the flags of both, cut at each other's edges; both cover the same."""
    left, right = iter(ours), iter(theirs)
    a, b = next(left, None), next(right, None)
    offset = 0
    while a and b:
        length = min(a.length, b.length)
        yield offset, length, a.flags, b.flags
        offset += length
        a = Extent(a.length - length, a.flags) if a.length > length else next(left, None)
        b = Extent(b.length - length, b.flags) if b.length > length else next(right, None)
