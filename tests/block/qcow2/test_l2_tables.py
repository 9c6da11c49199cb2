"""L2 entries as a check sees them, by the tables of the specification."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.builder import Data, Image
from pynbd.block.qcow2.entries import Layout, UInt64s
from pynbd.block.qcow2.format import COMPRESSED, COPIED, ZERO
from pynbd.block.qcow2.l2_tables import L2Entries, Tables, l2_tables

K = 1 << 10
AT = 0x50000


@contextmanager
def opened(path: Path) -> Iterator[HostFile]:
    engine = Engine(1)
    file = HostFile.open(engine, str(path), writable=False)
    yield file
    file.close()
    engine.close()


def entries_of(layout: Layout, *words: int) -> L2Entries:
    table = np.zeros(layout.cluster_size // 8, np.uint64)
    table[: len(words)] = words
    return L2Entries(Tables(np.array([AT], np.uint64), table), layout)


def broken(layout: Layout, *words: int) -> list[str]:
    return [rule for rows, rule in entries_of(layout, *words).corruptions() if rows.any()]


PLAIN, EXTENDED = Layout(12), Layout(14, extended=True)
APART = Layout(12, data_file=True)
RESERVED = "reserved bits are set"


@pytest.mark.parametrize(
    "layout, words, rules",
    [
        (PLAIN, [COPIED | 0x5000], []),
        (PLAIN, [ZERO], []),
        (PLAIN, [COPIED | 0x5000 | ZERO], []),
        (PLAIN, [COMPRESSED | 0x5123], []),
        (PLAIN, [COPIED | 0x5000 | 1 << 1], [RESERVED]),
        (PLAIN, [COPIED | 0x5000 | 1 << 8], [RESERVED]),
        (PLAIN, [COPIED | 0x5000 | 1 << 56], [RESERVED]),
        (PLAIN, [1 << 61], [RESERVED]),
        (PLAIN, [COPIED | COMPRESSED | 0x5123], ["COPIED is set, of a compressed cluster"]),
        (PLAIN, [COPIED | 0x5200], ["the host cluster offset is not aligned to a cluster"]),
        (APART, [COPIED], []),
        (
            APART,
            [COMPRESSED | 0x5000],
            ["a compressed cluster, in an image with an external data file"],
        ),
        (EXTENDED, [COPIED | 0x4000, 0x0000FFFF | 0xFFFF0000 << 32], []),
        (EXTENDED, [0, 0xFFFFFFFF << 32], []),
        (EXTENDED, [COPIED | 0x4000, 1 | 1 << 32], ["a subcluster is both allocated and zero"]),
        (
            EXTENDED,
            [0, 1],
            ["a subcluster is allocated in a cluster that has no host offset"],
        ),
        (
            EXTENDED,
            [COMPRESSED | 0x4000, 1 << 40],
            ["a compressed cluster has a subcluster bitmap"],
        ),
    ],
)
def test_rules(layout: Layout, words: list[int], rules: list[str]) -> None:
    assert broken(layout, *words) == rules


def test_only_entries_that_are_not_zero() -> None:
    entries = entries_of(PLAIN, 0, COPIED | 0x5000, 0, ZERO)
    assert entries.index.tolist() == [1, 3]
    assert entries.allocated.tolist() == [True, False]
    assert list(entries.places(entries.allocated)) == [(COPIED | 0x5000, AT + 8)]
    extended = entries_of(EXTENDED, 0, 0, 0, 1 << 32)
    assert extended.index.tolist() == [1]
    assert list(extended.places(~extended.allocated)) == [(0, AT + 16)]


def test_preallocated_clusters_have_no_data() -> None:
    entries = entries_of(PLAIN, COPIED | 0x5000, COPIED | 0x6000 | ZERO)
    assert entries.without_data().tolist() == [False, True]
    extended = entries_of(EXTENDED, COPIED | 0x4000, 1, COPIED | 0x8000, 0xFF << 32)
    assert extended.without_data().tolist() == [False, True]


def test_compressed_ranges() -> None:
    """From the first byte to the end of the last sector: x is 58 with clusters of 4 KiB."""
    entries = entries_of(PLAIN, COMPRESSED | 2 << 58 | 0x5123, COMPRESSED | 0x6000, COPIED | 0x7000)
    offsets, lengths = entries.compressed_ranges()
    assert offsets.tolist() == [0x5123, 0x6000]
    assert lengths.tolist() == [3 * 512 - 0x123, 512]


async def test_tables_come_in_order_and_end_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    span = 64 * 512
    clusters = {at * span: Data(b"x") for at in range(600)}
    written = Image(size=600 * span, cluster_bits=9, clusters=clusters).write(path)
    places = [written.l2_tables[index] for index in range(600)]
    end = path.stat().st_size
    l1: UInt64s = np.array([*places, end, 1 << 50], np.uint64) | np.uint64(COPIED)
    found: list[int] = []
    words: list[int] = []
    steps = 0
    with opened(path) as file:
        async for tables in l2_tables(file, written.header, l1):
            found += tables.offsets.tolist()
            words += tables.words.reshape(-1, 64)[:, 0].tolist()
            steps += 1
    assert found == [*places, end, 1 << 50]
    assert all(words[:600])
    assert words[600:] == [0, 0]
    assert steps > 2
