"""Runs against models that know every single byte."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.extent import (
    COMPRESSED,
    CORRUPT,
    DATA,
    NO_HOST,
    UNALLOCATED,
    ZERO,
    Runs,
    concatenate,
)

Byte = tuple[int, int, int]  # kind, host offset of this byte (or descriptor, or NO_HOST), depth

# Few lengths and host offsets, so that neighbours often are alike or go on where the last ended.
rows = st.one_of(
    st.tuples(st.integers(1, 4), st.sampled_from([DATA, DATA | ZERO]), st.integers(0, 12)),
    st.tuples(st.integers(1, 4), st.just(ZERO), st.sampled_from([NO_HOST, 0, 4, 8])),
    st.tuples(st.integers(1, 4), st.just(COMPRESSED), st.integers(0, 1)),
    st.tuples(st.integers(1, 4), st.sampled_from([UNALLOCATED, CORRUPT]), st.just(NO_HOST)),
)


@st.composite
def runs(draw: st.DrawFn, *, offset: int | None = None, size: int | None = None) -> Runs:
    """Runs of one layer, or of a chain below it, when some depths are greater."""
    table = draw(st.lists(rows, min_size=1, max_size=12))
    made = Runs.of(draw(st.integers(0, 9)) if offset is None else offset, table)
    if size is not None:
        missing = size - (made.end - made.offset)
        if missing > 0:
            made = Runs.of(made.offset, [*table, (missing, UNALLOCATED, NO_HOST)])
        made = made.clip(made.offset + size)
    depths = draw(st.lists(st.integers(0, 2), min_size=len(made), max_size=len(made)))
    made.depth[:] = np.where(made.kind == UNALLOCATED, 0, depths)
    return made


def every_byte(runs: Runs) -> list[Byte]:
    """What runs say, byte by byte."""
    found = []
    for start, end, kind, host, depth in runs:
        moves = host != NO_HOST and kind != COMPRESSED
        found += [(kind, host + n if moves else host, depth) for n in range(end - start)]
    return found


def lawful(runs: Runs) -> bool:
    return bool((runs.lengths > 0).all()) and len(runs) > 0


@given(runs())
def test_of_and_iteration(made: Runs) -> None:
    assert lawful(made)
    assert made.end == made.offset + len(every_byte(made))
    assert [start for start, *_ in made] == made.starts.tolist()


@given(runs())
def test_coalesced_says_the_same_with_the_fewest_runs(made: Runs) -> None:
    merged = made.coalesced()
    bytes_of = every_byte(merged)
    assert bytes_of == every_byte(made)
    assert lawful(merged)
    for at in (merged.ends[:-1] - merged.offset).tolist():
        (kind, host, depth), (next_kind, next_host, next_depth) = bytes_of[at - 1 : at + 1]
        if (kind, depth) == (next_kind, next_depth):
            onward = host if host == NO_HOST or kind == COMPRESSED else host + 1
            assert next_host != onward


@given(runs(), st.data())
def test_clip_and_since_are_slices(made: Runs, data: st.DataObject) -> None:
    end = data.draw(st.integers(made.offset + 1, made.end))
    start = data.draw(st.integers(made.offset, end - 1))
    part = made.since(start).clip(end)
    assert (part.offset, part.end) == (start, end)
    assert every_byte(part) == every_byte(made)[start - made.offset : end - made.offset]
    assert made.clip(end).since(start).ends.tolist() == part.ends.tolist()


@given(st.integers(1, 30), st.data())
def test_over(size: int, data: st.DataObject) -> None:
    upper = data.draw(runs(offset=3, size=size))
    upper.depth[:] = upper.kind != UNALLOCATED
    lower = data.draw(runs(offset=3, size=data.draw(st.integers(1, size))))
    expected = [
        (kind, host, depth + 1 if depth else 0) if top[0] == UNALLOCATED else top
        for top, (kind, host, depth) in zip(every_byte(upper), every_byte(lower), strict=False)
    ]
    merged = upper.over(lower)
    assert lawful(merged)
    assert every_byte(merged) == expected


@given(st.lists(runs(), min_size=1, max_size=4))
def test_concatenate(pieces: list[Runs]) -> None:
    at = 0
    moved = []
    for piece in pieces:
        ends = piece.ends - piece.offset + at
        moved.append(Runs(at, ends, piece.kind, piece.host, piece.depth))
        at = moved[-1].end
    assert every_byte(concatenate(moved)) == [byte for piece in moved for byte in every_byte(piece)]


def test_the_same_descriptor_in_two_layers_stays_two_runs() -> None:
    made = Runs.of(0, [(4, COMPRESSED, 7), (4, COMPRESSED, 7)])
    made.depth[:] = [1, 2]
    assert len(made.coalesced()) == 2
    made.depth[:] = 1
    assert len(made.coalesced()) == 1
