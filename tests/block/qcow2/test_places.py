"""Places: which clusters hold metadata, by their host offsets, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest

from pynbd.block.qcow2.cache import Table
from pynbd.block.qcow2.entries import UInt64s
from pynbd.block.qcow2.places import Places
from pynbd.errors import CorruptImage

C = 1 << 16


def places(tables: UInt64s | None = None) -> Places:
    known = Places(16)
    known.add(0, C, "header")
    known.add(5 * C, C + 1, "L1 table")
    known.add(9 * C, 0, "nothing")
    if tables is not None:
        known.add_tables("L2 table", lambda: tables)
    known.seal()
    return known


@pytest.mark.parametrize(
    "first, last, held",
    [
        (0, 1, True),
        (C, 5 * C, False),
        (C, 5 * C + 1, True),
        (6 * C, 6 * C + 1, True),  # the rest of a region's last cluster belongs to it
        (7 * C - 1, 7 * C, True),
        (7 * C, 100 * C, False),
        (2 * C, 90 * C, True),
    ],
)
def test_regions(first: int, last: int, held: bool) -> None:
    known = places()
    assert known.hold(first, last - first) is held
    assert bool(known.names(first, last - first)) is held


def test_tables_are_where_the_array_says_now() -> None:
    tables = np.array([0, 20 * C, 30 * C], np.uint64)
    known = places(tables)
    assert known.hold(20 * C, C)
    assert known.names(20 * C, 11 * C) == ["L2 table 1 at 0x140000", "L2 table 2 at 0x1e0000"]
    tables[1] = 40 * C  # it moved: its old place is free, the new one is told
    known.mark(40 * C)
    assert not known.hold(20 * C, C)
    assert known.hold(40 * C + 17, 1)


def test_entry_zero_is_no_place() -> None:
    known = Places(16)
    known.add(5 * C, C, "L1 table")
    known.add_tables("L2 table", lambda: np.zeros(3, np.uint64))
    known.seal()
    assert not known.hold(0, C)


def test_what_is_removed_is_not_there_any_more() -> None:
    known = places()
    known.remove("L1 table")
    assert not known.hold(5 * C, C)
    known.add(50 * C, 3 * C, "L1 table")  # after the seal
    assert known.hold(52 * C, C)
    assert known.names(52 * C) == ["L1 table at 0x320000"]


def test_many_that_came_later_are_put_in_order_with_the_others() -> None:
    count = (1 << 16) + 10
    tables = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2 * C)
    tables[1::2] = 0
    known = places(tables)
    for index in range(1, count, 2):
        tables[index] = (index + 1) * 2 * C
        known.mark(int(tables[index]))
    assert known.hold(int(tables[-1]), C)
    assert known.hold(int(tables[1]), C)
    assert not known.hold(int(tables[-1]) + C, C)


def test_a_range_inside_a_longer_one() -> None:
    known = Places(16)
    known.add(0, 10 * C, "long")
    known.add(2 * C, C, "short")
    known.seal()
    assert known.hold(8 * C, C)
    assert list(known.overlaps()) == ["long at 0x0 and short at 0x20000 overlap"]


def test_neighbours_do_not_overlap() -> None:
    assert list(places().overlaps()) == []


def test_a_region_may_be_very_long() -> None:
    """Of a snapshot whose L1 table claims to have 2^32 - 1 entries, in clusters of 512 bytes."""
    known = Places(9)
    known.add(0, 512, "header")
    known.add(1 << 40, 8 * 0xFFFFFFFF, "L1 table of snapshot '1'")
    known.seal()
    assert known.hold((1 << 40) + (8 << 31), 512)
    assert not known.hold(1 << 39, 512)


def test_tables_that_nobody_changes() -> None:
    known = Places(16)
    known.add_unchanging("L2 table of snapshot '1'", np.array([0, 20 * C, 0, 7 * C], np.uint64))
    known.seal()
    assert known.hold(20 * C, C)
    assert known.names(5 * C, 90 * C) == [
        "L2 table of snapshot '1' 1 at 0x140000",
        "L2 table of snapshot '1' 3 at 0x70000",
    ]


@pytest.mark.parametrize(
    "offset, clusters, alone",
    [(20, 1, True), (21, 1, False), (5, 3, False), (8, 3, True), (30, 1, True)],
)
def test_what_is_not_alone_in_its_place(offset: int, clusters: int, alone: bool) -> None:
    tables = np.array([20, 21, 6, 40], np.uint64) * np.uint64(C)
    known = Places(16)
    known.add(5 * C, 3 * C, "L1 table")
    known.add_tables("L2 table", lambda: tables)
    known.add_unchanging("L2 table of snapshot '1'", np.array([21 * C], np.uint64))
    known.seal()
    table = Table(offset * C, np.zeros(clusters * C // 8, np.uint64))
    if alone:
        known.check(table, "x.qcow2")
        assert table.checked
    else:
        with pytest.raises(CorruptImage, match=r"x.qcow2: L. table .* and L2 table .* in one"):
            known.check(table, "x.qcow2")
