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
from interop.differential.changes import Change, History, Range, change, histories
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
    changes: list[Change] = field(default_factory=list)

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
        if ask.changes and ask.length and not ours.error and not theirs.error:
            self._findings.changes.append(change(ask, detecting=self.facts.detecting))
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
            (history,) = self._histories(Range(ask.offset + at, ask.offset + at + 1))
            self._findings.differs(said + _told(history.changes))
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
                start = ask.offset + offset
                self._explain(context, a, b, Range(start, start + part))

    def _explain(self, context: str, ours: int, theirs: int, differing: Range) -> None:
        for history in self._histories(differing):
            part = differing.within(history.granule)
            place = Place(context, ours, theirs, self._zeroes(part), history)
            for rule in STATES:
                if rule.applies(place, self.facts):
                    self._findings.rules[rule] += 1
                    break
            else:
                said = f"{part.end - part.start} bytes at {part.start}: "
                said += f"{context} is {ours} here, {theirs} there"
                said += ", of zeroes" if place.zeroes else ""
                self._findings.differs(said + _told(history.changes))

    def _zeroes(self, place: Range) -> bool:
        """Whether both disks read as zeroes in a place."""
        return all(data == bytes(len(data)) for data in self._read(place))

    def _histories(self, place: Range) -> Iterator[History]:
        facts = self.facts
        units = facts.subcluster_size, facts.cluster_size, facts.size
        return histories(place, *units, self._findings.changes)

    def _alike(self, trim: Ask) -> None:
        """Write anew what a TRIM has left different, where it may."""
        trimmed = Range(trim.offset, trim.end)
        ours, theirs = self._read(trimmed)
        if ours == theirs:
            return
        for history in self._histories(trimmed):
            part = trimmed.within(history.granule)
            cut = slice(part.start - trim.offset, part.end - trim.offset)
            if ours[cut] != theirs[cut] and not HINT.applies(history, self.facts):
                said = (
                    f"{part.end - part.start} bytes at {part.start}: the data differ after {trim}"
                )
                self._findings.differs(said + _told(history.changes))
        self._findings.rules[HINT] += 1
        self._ask([Ask("write", Cmd.WRITE, trim.offset, trim.length, payload=ours)])

    def _read(self, place: Range) -> tuple[bytes, bytes]:
        """What either disk reads as."""
        ask = Ask("read", Cmd.READ, place.start, place.end - place.start)
        ours, theirs = self.ours.ask(ask), self.theirs.ask(ask)
        assert not ours.error, f"{ask}: {ours} here"
        assert not theirs.error, f"{ask}: {theirs} there"
        return ours.data, theirs.data

    def all_of_it(self) -> None:
        """Compare the whole disk, and all maps of it."""
        step = 1 << 20
        for offset in range(0, self.facts.size, step):
            length = min(step, self.facts.size - offset)
            asks = [Ask("read", Cmd.READ, offset, length)]
            if self.ours.ids:
                asks.append(Ask("status", Cmd.BLOCK_STATUS, offset, length))
            self._ask(asks)


def _told(changes: Iterable[Change]) -> str:
    return "".join(f"\n  after {each.ask}" for each in changes)


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
