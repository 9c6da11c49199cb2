"""The shadow of a disk: what each byte of it may hold while many requests are under way.

A byte is a register that several clients write and read at the same time. The NBD specification
("Ordering of messages and writes") orders no two requests that are in flight together, so that:

1. A completed change replaces whatever was there when it was asked for.
2. Of changes that were in flight together any may have come last, byte by byte.
3. A read gives what was there when it was asked for, or any change that was in flight with it.
4. A change that failed, or that the server may ignore, has happened or not, byte by byte.
5. What was read while nothing was in flight is settled from then on.

What is written tells who wrote it, and where: `stamp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_PLACE_BITS = 28  # of the place of a word, in words: 2 GiB
_MULTIPLIERS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_WORD = 1 << 64


def stamp(number: int, offset: int, length: int) -> Bytes:
    """What request ``number`` (from 1 on) writes to a range: each aligned word of eight bytes is
    made of the number and its place, and no two words are alike.
    """
    words = np.arange(offset // 8, -(-(offset + length) // 8), dtype=np.uint64)
    words |= np.uint64(number << _PLACE_BITS)
    for multiplier in _MULTIPLIERS:
        words ^= words >> np.uint64(32)
        words *= np.uint64(multiplier)
    words ^= words >> np.uint64(32)
    return words.view(np.uint8)[offset % 8 :][:length]


def unstamp(word: bytes) -> tuple[int, int]:
    """The number and the offset of an aligned word that `stamp` made."""
    value = int.from_bytes(word, "little")
    for multiplier in reversed(_MULTIPLIERS):
        value ^= value >> 32
        value = value * pow(multiplier, -1, _WORD) % _WORD
    value ^= value >> 32
    return value >> _PLACE_BITS, value % (1 << _PLACE_BITS) * 8


class Mismatch(AssertionError):
    """Bytes that the disk must not hold."""


@dataclass(slots=True, eq=False)
class Piece:
    """What a change left, or may have left, in [offset, end); ``content`` None is zeroes."""

    offset: int
    end: int
    content: Bytes | None

    def part(self, offset: int, end: int) -> Piece:
        content = self.content
        if content is not None:
            content = content[offset - self.offset : end - self.offset]
        return Piece(offset, end, content)

    def without(self, offset: int, end: int) -> Iterator[Piece]:
        if self.offset < offset:
            yield self.part(self.offset, min(self.end, offset))
        if end < self.end:
            yield self.part(max(self.offset, end), self.end)

    def allows(self, got: Bytes) -> Any:
        return got == (0 if self.content is None else self.content)


@dataclass(slots=True, eq=False)
class Change(Piece):
    """A change under way. ``optional``: the server may ignore it."""

    began: int = 0
    optional: bool = False
    ended: int = 0
    refused: bool = False
    rivals: list[Change] = field(default_factory=list)  # those that ended meanwhile


@dataclass(slots=True, eq=False)
class Reading:
    """A read under way: what its bytes were, or may have been, when it began; changes since."""

    offset: int
    end: int
    before: Bytes
    others: list[Piece]
    changes: list[Change]


class Shadow:
    """``content`` is what the disk holds; it is the caller's no more. ``qemu``: it is QEMU that
    serves the disk now, and a write may be seen as zeroes while it is under way, because it zeroes
    what it allocates; and zeroes that it refuses to make fast may have been made in part.
    """

    def __init__(self, content: Bytes) -> None:
        self.content = content
        self.qemu = False
        self._others: list[Piece] = []  # what bytes may hold instead
        self._changes: list[Change] = []
        self._readings: list[Reading] = []
        self._ticks = count(1)

    @property
    def unsettled(self) -> int:
        """Pieces of the disk of which more than one content is possible."""
        return len(self._others)

    def begin(
        self, offset: int, length: int, content: Bytes | None = None, *, optional: bool = False
    ) -> Change:
        """A change is asked for; ``content`` None makes zeroes."""
        change = Change(offset, offset + length, content, next(self._ticks), optional)
        self._changes.append(change)
        for reading in overlapping(self._readings, change):
            reading.changes.append(change)
        return change

    def completed(self, change: Change) -> None:
        if change.optional:
            self.failed(change)
            return
        self._ended(change)
        self._settle(change)
        self.content[change.offset : change.end] = 0 if change.content is None else change.content
        for rival in change.rivals:
            self._others += _last_of(rival, change)

    def failed(self, change: Change) -> None:
        """It happened, or it did not."""
        change.optional = True
        self._ended(change)
        self._others.append(change.part(change.offset, change.end))

    def refused(self, change: Change) -> None:
        """The server answered that it has touched nothing."""
        if self.qemu:
            self.failed(change)
            return
        self._changes.remove(change)
        change.refused = True

    def begin_read(self, offset: int, length: int) -> Reading:
        end = offset + length
        here = Piece(offset, end, None)
        others = [
            other.part(max(offset, other.offset), min(end, other.end))
            for other in overlapping(self._others, here)
        ]
        before = self.content[offset:end].copy()
        changes = list(overlapping(self._changes, here))
        reading = Reading(offset, end, before, others, changes)
        self._readings.append(reading)
        return reading

    def judge(self, reading: Reading, got: Bytes) -> None:
        """What a read gave; raises `Mismatch`."""
        self._readings.remove(reading)
        changes = [change for change in reading.changes if not change.refused]
        right = got == reading.before
        if right.all() and not reading.others:
            return
        for piece in (*reading.others, *changes):
            start, end = max(reading.offset, piece.offset), min(reading.end, piece.end)
            here = slice(start - reading.offset, end - reading.offset)
            right[here] |= piece.part(start, end).allows(got[here])
            if self.qemu and isinstance(piece, Change):
                right[here] |= got[here] == 0
        if not right.all():
            raise Mismatch(self._complaint(reading, got, changes, np.flatnonzero(~right)))
        if not reading.changes:
            self._settle(reading)
            self.content[reading.offset : reading.end] = got

    def judge_zeroes(self, reading: Reading, offset: int, length: int) -> None:
        """The server says of a part of ``reading`` that it reads as zeroes; raises `Mismatch`."""
        start = offset - reading.offset
        part = Reading(
            offset,
            offset + length,
            reading.before[start : start + length],
            [
                piece.part(max(piece.offset, offset), min(piece.end, offset + length))
                for piece in overlapping(reading.others, Piece(offset, offset + length, None))
            ],
            list(overlapping(reading.changes, Piece(offset, offset + length, None))),
        )
        self._readings.append(part)
        self.judge(part, np.zeros(length, np.uint8))

    def forget(self, reading: Reading) -> None:
        """The read gave nothing."""
        self._readings.remove(reading)

    def abandoned(self, content: Bytes) -> None:
        """Nobody waits for an answer any more and the server has ended: what was in flight has
        happened or not, and this is left of it. Raises `Mismatch`.
        """
        self._readings.clear()
        for change in list(self._changes):
            self.failed(change)
        self.judge(self.begin_read(0, len(content)), content)

    def _ended(self, change: Change) -> None:
        self._changes.remove(change)
        change.ended = next(self._ticks)
        for other in overlapping(self._changes, change):
            other.rivals.append(change)

    def _settle(self, here: Piece | Reading) -> None:
        """No byte of the range has a second possible content any more."""
        hit = list(overlapping(self._others, here))
        if hit:
            self._others = [other for other in self._others if other not in hit]
            for other in hit:
                self._others += other.without(here.offset, here.end)

    def _complaint(
        self, reading: Reading, got: Bytes, changes: list[Change], wrong: NDArray[np.intp]
    ) -> str:
        at = int(wrong[0])
        offset = reading.offset + at
        pieces = [piece for piece in (*reading.others, *changes) if piece.offset <= offset]
        possible = [
            "zeroes" if piece.content is None else written_by(piece.content, piece.offset, offset)
            for piece in pieces
            if offset < piece.end
        ]
        return (
            f"a read of {reading.end - reading.offset} bytes at {reading.offset}: {len(wrong)}"
            f" bytes are wrong, of which the first lies at {offset} and the last at"
            f" {reading.offset + int(wrong[-1])}; there is"
            f" {written_by(got, reading.offset, offset)}; expected is"
            f" {written_by(reading.before, reading.offset, offset)}"
            f"{''.join(f', or {text}' for text in possible)}"
        )


def overlapping(pieces: list[Any], here: Any) -> Iterator[Any]:
    """Those that share a byte with ``here``."""
    offset, end = here.offset, here.end
    return (piece for piece in pieces if piece.offset < end and offset < piece.end)


def _last_of(rival: Change, change: Change) -> Iterator[Piece]:
    """Where ``rival``, which ended while ``change`` was under way, may have come last: not where a
    change that was asked for after its end replaced it.
    """
    pieces = [rival.part(max(rival.offset, change.offset), min(rival.end, change.end))]
    for later in change.rivals:
        if later.began > rival.ended and not later.optional:
            pieces = [rest for piece in pieces for rest in piece.without(later.offset, later.end)]
    return iter(pieces)


def written_by(content: Bytes, start: int, offset: int) -> str:
    """Who wrote what ``content``, which begins at ``start``, holds at ``offset``."""
    word = offset // 8 * 8 - start
    if word >= 0 and word + 8 <= len(content):
        number, place = unstamp(content[word : word + 8].tobytes())
        if number < 1 << 24 and place < 1 << 31 and number:
            here = "" if place == word + start else f" for offset {place}"
            return f"{content[offset - start]:#04x} (of request {number}{here})"
    return f"{content[offset - start]:#04x}"
