"""Windows of resolved runs against the runs that they were made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.extent import COMPRESSED, DATA, NO_HOST, ZERO, Runs
from pynbd.block.resolved import ResolvedWindows, Window

SPAN = 1 << 20

# More than 64 runs are held in another way than a few.
counts = st.one_of(st.integers(1, 6), st.integers(60, 70))
rows = st.one_of(
    st.tuples(st.integers(1, 9), st.just(DATA), st.integers(0, 1 << 40)),
    st.tuples(st.integers(1, 9), st.just(ZERO), st.sampled_from([NO_HOST, 512])),
    st.tuples(st.integers(1, 9), st.just(COMPRESSED), st.integers(0, 1 << 61)),
)


@given(st.data(), st.sampled_from([0, SPAN]))
def test_rows_are_the_runs(data: st.DataObject, offset: int) -> None:
    count = data.draw(counts)
    runs = Runs.of(offset, data.draw(st.lists(rows, min_size=count, max_size=count)))
    window = Window(runs)
    assert (window.offset, window.end) == (offset, runs.end)
    first = data.draw(st.integers(offset, runs.end - 1))
    last = data.draw(st.integers(first + 1, runs.end))

    expected = [
        (max(start, first), min(end, last), kind, host - start if kind == DATA else host, depth)
        for start, end, kind, host, depth in runs
        if start < last and end > first
    ]
    assert list(window.rows(first, last)) == expected
    for row, (start, end, kind, host, _) in enumerate(runs):
        assert (window.ends[row], window.kinds[row]) == (end, kind)
        if kind == DATA:
            assert start + window.places[row] == host


def window(number: int, runs: int = 1) -> Window:
    length = SPAN // runs
    return Window(
        Runs.of(number * SPAN, [(length, DATA, 2 * at * length) for at in range(runs)]),
    )


def test_a_window_is_found_by_its_number() -> None:
    resolved = ResolvedWindows(SPAN)
    for number in (0, 7):
        resolved.keep(window(number))
    assert set(resolved.windows) == {0, 7}
    assert resolved.windows[7].offset == 7 * SPAN


@pytest.mark.parametrize(
    "offset, end, left",
    [
        (0, 1, {1, 2}),
        (SPAN - 1, SPAN + 1, {2}),
        (SPAN, 2 * SPAN, {0, 2}),
        (0, 3 * SPAN, set()),
        (3 * SPAN, 4 * SPAN, {0, 1, 2}),
    ],
)
def test_whatever_is_touched_is_forgotten(offset: int, end: int, left: set[int]) -> None:
    resolved = ResolvedWindows(SPAN)
    for number in range(3):
        resolved.keep(window(number))
    resolved.forget(offset, end)
    assert set(resolved.windows) == left
    assert resolved.changes == 1


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    fragmented = window(0, 1024).weight
    resolved = ResolvedWindows(SPAN, limit_bytes=3 * fragmented)
    for number in range(100):
        resolved.keep(window(number, 1024))
        assert number in resolved.windows
    assert set(resolved.windows) == {97, 98, 99}


def test_a_window_that_is_kept_again_is_counted_once() -> None:
    resolved = ResolvedWindows(SPAN, limit_bytes=3 * window(0).weight)
    for _ in range(9):
        resolved.keep(window(0))
    resolved.keep(window(1))
    resolved.keep(window(2))
    assert set(resolved.windows) == {0, 1, 2}
