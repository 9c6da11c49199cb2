"""Damaged images, one after the other: each is (image, structure, field, value).

Pure: everything follows from the sound images and a seed. ``every()`` are those of the long form,
``spread(cases, count, seed)`` a few of them over all structures. A case has

* ``name``: "image/structure/field/value", with which one can be had again (`cases_named`);
* ``structure``, ``field``, ``value``: what a run counts by;
* ``harms``: the guest's bytes that the damage may concern; None where that is not known. All others
  are those of ``sound(image).guest``;
* ``place(folder)``: writes the image and what it names into an empty folder; returns the path of
  what is to be opened.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Protocol

from interop.damage import chains, values
from interop.damage.fields import Field, fields
from interop.damage.images import IMAGES, Sound, sound

_BITS_OF_HEADERS = ("plain", "old", "everything", "extended", "data file")
_POKES = 150  # of each image
_LONGEST_POKE = 64
_SEED = 1


class Case(Protocol):
    """A damaged image, or chain of images."""

    @property
    def structure(self) -> str: ...
    @property
    def field(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def harms(self) -> range | None: ...
    def place(self, folder: Path) -> Path: ...


@dataclass(frozen=True)
class Damage:
    """A sound image with some bytes overwritten, and perhaps with another length."""

    image: str
    structure: str
    field: str
    value: str
    changes: tuple[tuple[int, bytes], ...] = ()
    size: int | None = None
    harms: range | None = None

    @property
    def name(self) -> str:
        return f"{self.image}/{self.structure}/{self.field}/{self.value}"

    def content(self) -> bytes:
        content = bytearray(sound(self.image).content)
        for offset, data in self.changes:
            content[offset : offset + len(data)] = data
        if self.size is not None:
            content = content[: self.size].ljust(self.size, b"\0")
        return bytes(content)

    def place(self, folder: Path) -> Path:
        return sound(self.image).place(folder, self.content())


@dataclass(frozen=True)
class Below:
    """A sound overlay of a damaged image."""

    damage: Damage
    harms: range | None = None

    @property
    def structure(self) -> str:
        return "chain"

    @property
    def field(self) -> str:
        return "damaged backing file"

    @property
    def value(self) -> str:
        return self.damage.name

    @property
    def name(self) -> str:
        return f"below/{self.damage.name}"

    def place(self, folder: Path) -> Path:
        return chains.overlay(folder, self.damage.place(folder).name, "qcow2")


@cache
def every(seed: int = _SEED) -> tuple[Case, ...]:
    """All of the long form."""
    found: list[Case] = []
    for name in IMAGES:
        found += image_damages(name, seed)
    headers = [case for case in found if isinstance(case, Damage) and case.image == "plain"]
    found += (Below(damage) for damage in headers[::4])
    found += chains.CHAINS
    return tuple(found)


def cases_named(words: str, seed: int = _SEED) -> list[Case]:
    """Those whose names begin so."""
    return [case for case in every(seed) if case.name.startswith(words)]


def spread(cases: Iterable[Case], count: int, seed: int) -> list[Case]:
    """So many of them, of every structure about as many, and of its fields again."""
    rng = random.Random(seed)
    by_structure: dict[str, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        by_structure[case.structure][case.field].append(case)
    chosen: list[Case] = []
    queues = [_in_turn(list(of_fields.values()), rng) for of_fields in by_structure.values()]
    while queues and len(chosen) < count:
        for queue in list(queues):
            taken = next(queue, None)
            if taken is None:
                queues.remove(queue)
            else:
                chosen.append(taken)
    return chosen[:count]


def _in_turn(lists: Sequence[list[Case]], rng: random.Random) -> Iterator[Case]:
    left = [rng.sample(cases, len(cases)) for cases in lists]
    rng.shuffle(left)
    while left:
        for cases in list(left):
            if cases:
                yield cases.pop()
            else:
                left.remove(cases)


def image_damages(name: str, seed: int = _SEED) -> list[Damage]:
    """Those of one image; two that make the same bytes are one."""
    of = sound(name)
    seen: set[tuple[object, ...]] = set()
    found = []
    for damage in _damages(of, seed):
        changes = tuple((at, data) for at, data in damage.changes if _changes(of, at, data))
        if (changes or damage.size is not None) and (changes, damage.size) not in seen:
            seen.add((changes, damage.size))
            found.append(damage)
    return found


def _changes(of: Sound, at: int, data: bytes) -> bool:
    return of.content[at : at + len(data)] != data


def _damages(of: Sound, seed: int) -> Iterator[Damage]:
    there = fields(of)
    for field in there:
        for value, changes in values.boundaries(field, of):
            yield Damage(of.name, field.structure, field.name, value, changes, None, field.harms)
        if _wants_bits(field, of):
            for value, changes in values.single_bits(field, of):
                yield Damage(
                    of.name, field.structure, field.name, value, changes, None, field.harms
                )
    yield from _truncated(of, there)
    yield from _swapped(of)
    yield from _poked(of, random.Random(f"{of.name} {seed}"))


def _wants_bits(field: Field, of: Sound) -> bool:
    if field.structure.startswith("header"):
        return of.name in _BITS_OF_HEADERS
    return field.bits <= 64


def _truncated(of: Sound, there: Iterable[Field]) -> Iterator[Damage]:
    """The file ends at and around every structure, every field of the header and its own end."""
    ends = {"end": len(of.content), **values.places(of.target)}
    ends |= {f"{field.structure} {field.name}": field.offset for field in there}
    size = of.target.cluster
    for name, at in ends.items():
        for plus in (-size, -1, 0, 1, 8, 512, size // 2, size - 1, size, size + 1):
            if at + plus >= 0 and at + plus != len(of.content):
                yield Damage(of.name, "file", "length", f"{name} {plus:+}", (), at + plus)


def _swapped(of: Sound) -> Iterator[Damage]:
    """Two clusters of metadata, or of data, in each other's place."""
    size = of.target.cluster
    inside = {
        name: at // size * size
        for name, at in values.places(of.target).items()
        if at + size <= len(of.content)
    }
    for (one, here), (other, there) in combinations(inside.items(), 2):
        if here != there:
            a, b = of.content[here : here + size], of.content[there : there + size]
            value = f"{one} and {other}"
            yield Damage(of.name, "file", "swapped", value, ((here, b), (there, a)))


def _poked(of: Sound, rng: random.Random) -> Iterator[Damage]:
    """Random bytes anywhere in metadata, one or many."""
    size = of.target.cluster
    clusters = sorted({at // size * size for at in values.metadata(of.target).values()})
    clusters = [at for at in clusters if at + size <= len(of.content)]
    for number in range(_POKES):
        changes = []
        for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
            start = rng.choice(clusters)
            # The beginnings of tables are where something is.
            at = start + rng.randrange(rng.choice([128, 128, 512, size]))
            length = min(rng.choice([1, 1, 2, 4, 8, _LONGEST_POKE]), start + size - at)
            changes.append((at, rng.randbytes(length)))
        yield Damage(of.name, "file", "random bytes", str(number), tuple(changes))
