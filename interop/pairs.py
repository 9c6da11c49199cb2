"""Which qcow2 features a chain combines, and a set of combinations that meets every legal pair.

A `Choice` gives each factor one value. What is legal is decided pair by pair, and every illegal
pair has its reason: a rule of the qcow2 specification, or something that qemu-img refuses.
Pure and seeded: the same seed makes the same choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, product
from random import Random

Choice = dict[str, str]
Value = tuple[str, str]  # a factor and one of its values
Pair = frozenset[Value]

FACTORS: dict[str, list[str]] = {
    "layers": ["1", "2", "3", "4", "5"],
    "cluster": ["512", "4k", "64k", "2M"],
    "version": ["v2", "v3"],
    "compression": ["none", "zlib", "zstd"],
    "extended_l2": ["off", "on"],
    "data_file": ["none", "data_file", "data_file_raw"],
    "backing": ["none", "equal", "short", "long"],
    "ranges": ["none", "zeroed", "discarded", "both"],
    "snapshot": ["no", "yes"],
    "bitmap": ["none", "512", "4k", "64k", "1M"],
}

# "factor=value,value factor=value,value": reason. Every pair of the two sets is illegal.
ILLEGAL = {
    "layers=1 backing=equal,short,long": "a single layer has no backing file",
    "layers=2,3,4,5 backing=none": "an overlay has a backing file",
    "version=v2 extended_l2=on": "extended L2 entries are an incompatible feature of version 3",
    "version=v2 compression=zstd": "a compression type is an incompatible feature of version 3",
    "version=v2 data_file=data_file,data_file_raw": "a data file is a feature of version 3",
    "version=v2 bitmap=512,4k,64k,1M": "bitmaps need the autoclear bits of version 3",
    "extended_l2=on cluster=512,4k": "a subcluster is at least 512 bytes: clusters from 16 KiB on",
    "data_file=data_file,data_file_raw compression=zlib,zstd": "a data file holds no compressed"
    " clusters",
    "data_file=data_file,data_file_raw snapshot=yes": "internal snapshots need refcounted clusters",
    "data_file=data_file_raw backing=equal,short,long": "raw external data has no backing file",
    "data_file=data_file_raw layers=2,3,4,5": "raw external data has no backing file",
}


def spread(text: str) -> list[Value]:
    factor, _, values = text.partition("=")
    return [(factor, value) for value in values.split(",")]


REASONS: dict[Pair, str] = {
    frozenset(pair): reason
    for rule, reason in ILLEGAL.items()
    for pair in product(*map(spread, rule.split()))
}


def every_pair() -> Iterator[Pair]:
    for (a, a_values), (b, b_values) in combinations(FACTORS.items(), 2):
        yield from (frozenset([(a, x), (b, y)]) for x, y in product(a_values, b_values))


LEGAL = [pair for pair in every_pair() if pair not in REASONS]


def pairs(choice: Choice) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(choice.items(), 2)}


def complete(fixed: Iterable[Value], wanted: set[Pair], rng: Random) -> Choice | None:
    """Fill in the other factors in random order, each with the value that meets most wanted pairs.

    None where the values chosen so far leave none for a factor.
    """
    choice = dict(fixed)
    for factor in rng.sample(list(FACTORS), len(FACTORS)):
        if factor in choice:
            continue
        scores: dict[str, tuple[int, float]] = {}
        for value in FACTORS[factor]:
            new = [frozenset([(factor, value), other]) for other in choice.items()]
            if not any(pair in REASONS for pair in new):
                scores[value] = (sum(pair in wanted for pair in new), rng.random())
        if not scores:
            return None
        choice[factor] = max(scores, key=scores.__getitem__)
    return choice


def cover(count: int, rng: Random, tries: int = 8) -> list[Choice]:
    """At least ``count`` choices in which every legal pair meets: greedy, then at random."""
    wanted, chosen = set(LEGAL), list[Choice]()
    while wanted or len(chosen) < count:
        seeds = [pair for pair in LEGAL if pair in wanted] or LEGAL
        drawn = (complete(rng.choice(seeds), wanted, rng) for _ in range(tries))
        best = max(filter(None, drawn), key=lambda choice: len(pairs(choice) & wanted))
        wanted -= pairs(best)
        chosen.append(best)
    rng.shuffle(chosen)
    return chosen


def coverage(choices: Iterable[Choice]) -> str:
    """The table: for each two factors the pairs met and the legal ones; then what is illegal."""
    met = set[Pair]().union(*map(pairs, choices))
    lines = [f"{'factors':28} met / legal"]
    for a, b in combinations(FACTORS, 2):
        legal = [pair for pair in LEGAL if {factor for factor, _ in pair} == {a, b}]
        lines.append(f"{f'{a} x {b}':28} {sum(p in met for p in legal):3} / {len(legal)}")
    lines.append(f"{'all':28} {len(met):3} / {len(LEGAL)}")
    lines += ["", "illegal:", *(f"  {rule}: {reason}" for rule, reason in ILLEGAL.items())]
    return "\n".join(lines)
