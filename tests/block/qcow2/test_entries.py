"""L1 and L2 entries against the bit layouts of the specification.

`reference` reads one subcluster at a time, straight from the specification's tables, and knows
nothing of runs: whatever `decode` makes of a table must say the same of every subcluster.
"""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, NO_HOST, UNALLOCATED, ZERO, Runs
from pynbd.block.qcow2.entries import (
    Layout,
    compressed_entry,
    compressed_range,
    decode,
    explain,
    l2_table_offset,
)
from pynbd.errors import CorruptImage

K64 = 1 << 16
COPIED = 1 << 63


def rows(runs: Runs) -> list[tuple[int, int, int, int]]:
    """(start, end, kind, host) of each run."""
    return [(start, end, kind, host) for start, end, kind, host, _ in runs]


def table(*entries: int, of: int = 8192) -> np.ndarray:
    words = np.zeros(of, np.uint64)
    words[: len(entries)] = entries
    return words


def standard(*entries: int, guest_offset: int = 0, first: int = 0, **layout: object) -> list:
    how = Layout(16, **layout)
    return rows(decode(table(*entries), first, len(entries) - first, how, guest_offset))


def extended(*entries: tuple[int, int], guest_offset: int = 0, **layout: object) -> list:
    words = table(*(word for entry in entries for word in entry))
    how = Layout(16, extended=True, **layout)
    return rows(decode(words, 0, len(entries), how, guest_offset))


def test_neighbours_on_the_host_are_one_run() -> None:
    assert standard(0x50000 | COPIED, 0x60000 | COPIED, 0x70000) == [(0, 3 * K64, DATA, 0x50000)]


def test_neighbours_elsewhere_are_not() -> None:
    assert standard(0x50000, 0x70000, 0x60000, 0x60000) == [
        (0, K64, DATA, 0x50000),
        (K64, 2 * K64, DATA, 0x70000),
        (2 * K64, 3 * K64, DATA, 0x60000),
        (3 * K64, 4 * K64, DATA, 0x60000),
    ]


def test_every_kind() -> None:
    compressed = 1 << 62 | 3 << 54 | 0x123456  # with 64 KiB clusters x = 54
    another = compressed + 512
    assert standard(0, 0, 1, 1, 0x90001 | COPIED, 0x20000, compressed, another) == [
        (0, 2 * K64, UNALLOCATED, NO_HOST),
        (2 * K64, 4 * K64, ZERO, NO_HOST),
        (4 * K64, 5 * K64, ZERO, 0x90000),
        (5 * K64, 6 * K64, DATA, 0x20000),
        (6 * K64, 7 * K64, COMPRESSED, 3 << 54 | 0x123456),
        (7 * K64, 8 * K64, COMPRESSED, 3 << 54 | 0x123656),
    ]


def test_neighbours_with_the_same_compressed_data_are_one_run() -> None:
    # As the parts of one cluster are; whoever reads them goes cluster by cluster.
    entry = 1 << 62 | K64
    assert standard(entry, entry) == [(0, 2 * K64, COMPRESSED, K64)]


def test_a_host_offset_behind_unallocated_clusters_starts_a_run() -> None:
    # The difference to the neighbour is one cluster, but the neighbour has no host cluster.
    assert standard(0, K64) == [(0, K64, UNALLOCATED, NO_HOST), (K64, 2 * K64, DATA, K64)]
    assert standard(1, K64 | 1) == [(0, K64, ZERO, NO_HOST), (K64, 2 * K64, ZERO, K64)]


def test_preallocated_zeroes_go_on_like_data() -> None:
    assert standard(0x50001, 0x60001, 0x80001) == [
        (0, 2 * K64, ZERO, 0x50000),
        (2 * K64, 3 * K64, ZERO, 0x80000),
    ]


def test_a_part_of_a_table() -> None:
    guest = 512 << 20  # the second table of 64 KiB maps from 512 MiB on
    assert standard(0, 7, 0x50000, 0x60000, first=2, guest_offset=guest + 2 * K64) == [
        (guest + 2 * K64, guest + 4 * K64, DATA, 0x50000)
    ]


def test_the_last_descriptor_does_not_go_on_with_the_first_offset() -> None:
    """The two words are a cluster apart, modulo 2^64."""
    expected = [
        (0, K64, COMPRESSED, (1 << 62) - 1),
        (K64, 2 * K64, CORRUPT, NO_HOST),
    ]
    assert standard((1 << 64) - 1, K64 - 1) == expected


def test_the_last_host_offset_does_not_carry_into_reserved_bits() -> None:
    last = (1 << 56) - K64
    assert standard(last, last + K64) == [
        (0, K64, DATA, last),
        (K64, 2 * K64, UNALLOCATED, NO_HOST),  # offset 0: bit 56 is reserved
    ]


@pytest.mark.parametrize("bit", [*range(1, 9), *range(56, 62)])
def test_reserved_bits_are_ignored(bit: int) -> None:
    assert standard(0x50000, 0x60000 | 1 << bit) == [(0, 2 * K64, DATA, 0x50000)]


def test_a_misaligned_cluster_is_corrupt_and_its_neighbours_are_not() -> None:
    assert standard(0x50000, 0x60200, 0, 0x61201) == [
        (0, K64, DATA, 0x50000),
        (K64, 2 * K64, CORRUPT, NO_HOST),
        (2 * K64, 3 * K64, UNALLOCATED, NO_HOST),
        (3 * K64, 4 * K64, CORRUPT, NO_HOST),
    ]
    assert "not aligned" in explain(0x60200, 0, Layout(16), K64)
    assert explain(0x60000, 0, Layout(16), K64) == ""


def test_the_zero_flag_is_corrupt_in_version_2() -> None:
    assert standard(1, 0x50001, version=2) == [(0, 2 * K64, CORRUPT, NO_HOST)]
    assert "zero flag" in explain(1, 0, Layout(16, version=2), 0)
    # Bit 0 of a compressed cluster is part of its offset.
    assert standard(1 << 62 | 1, version=2) == [(0, K64, COMPRESSED, 1)]


class TestDataFile:
    def test_offsets_equal_guest_offsets(self) -> None:
        found = standard(COPIED, K64 | COPIED, 2 * K64, 0, 1, data_file=True)
        assert found == [
            (0, 3 * K64, DATA, 0),
            (3 * K64, 4 * K64, UNALLOCATED, NO_HOST),
            (4 * K64, 5 * K64, ZERO, NO_HOST),
        ]

    def test_offset_0_without_copied_is_unallocated(self) -> None:
        assert standard(0, data_file=True) == [(0, K64, UNALLOCATED, NO_HOST)]
        assert standard(COPIED | 1, data_file=True) == [(0, K64, ZERO, NO_HOST)]

    def test_another_offset_is_corrupt(self) -> None:
        found = standard(K64 | COPIED, K64 | COPIED, data_file=True)
        assert found == [(0, K64, CORRUPT, NO_HOST), (K64, 2 * K64, DATA, K64)]
        assert "differs" in explain(K64, 0, Layout(16, data_file=True), 0)
        assert standard(0, COPIED, data_file=True)[1][2] == CORRUPT

    def test_compressed_is_corrupt(self) -> None:
        assert standard(1 << 62 | K64, data_file=True) == [(0, K64, CORRUPT, NO_HOST)]
        assert "compressed" in explain(1 << 62, 0, Layout(16, data_file=True), 0)


class TestExtended:
    ALL = 0xFFFFFFFF

    def test_whole_clusters(self) -> None:
        assert extended(
            (0x50000 | COPIED, self.ALL),
            (0x60000 | COPIED, self.ALL),
            (0, 0),
            (0x70000, 0),  # allocated, but no subcluster is
            (0, self.ALL << 32),
            (0x80000, self.ALL << 32),
            (1 << 62 | 77, 0),
        ) == [
            (0, 2 * K64, DATA, 0x50000),
            (2 * K64, 4 * K64, UNALLOCATED, NO_HOST),
            (4 * K64, 5 * K64, ZERO, NO_HOST),
            (5 * K64, 6 * K64, ZERO, 0x80000),
            (6 * K64, 7 * K64, COMPRESSED, 77),
        ]

    def test_subclusters_from_the_lowest_bit(self) -> None:
        # Subclusters of 2 KiB: 0 allocated, 1-2 zero, 31 allocated, and on into the next cluster.
        assert extended((0x50000, 1 << 31 | 1 | 0b110 << 32), (0x60000, 0b11)) == [
            (0, 2048, DATA, 0x50000),
            (2048, 6144, ZERO, 0x50800),
            (6144, 31 * 2048, UNALLOCATED, NO_HOST),
            (31 * 2048, K64 + 4096, DATA, 0x50000 + 31 * 2048),
            (K64 + 4096, 2 * K64, UNALLOCATED, NO_HOST),
        ]

    def test_bit_0_is_no_zero_flag(self) -> None:
        assert extended((0x50001, self.ALL)) == [(0, K64, DATA, 0x50000)]

    def test_the_bitmap_of_a_compressed_cluster_is_not_looked_at(self) -> None:
        entry = 1 << 62 | 4096
        assert extended((entry, 1 << 32 | 1)) == [(0, K64, COMPRESSED, 4096)]
        assert explain(entry, 1 << 32 | 1, Layout(16, extended=True), 0) == ""

    @pytest.mark.parametrize("bit", range(32))
    def test_allocated_and_zero_is_corrupt(self, bit: int) -> None:
        bitmap = (1 << 32 | 1) << bit
        assert extended((0x50000, bitmap), (0, 0)) == [
            (0, K64, CORRUPT, NO_HOST),
            (K64, 2 * K64, UNALLOCATED, NO_HOST),
        ]
        assert "both" in explain(0x50000, bitmap, Layout(16, extended=True), 0)

    def test_allocated_without_a_cluster_is_corrupt(self) -> None:
        assert extended((0, 1)) == [(0, K64, CORRUPT, NO_HOST)]
        assert "no host offset" in explain(0, 1, Layout(16, extended=True), 0)

    def test_with_a_data_file(self) -> None:
        found = extended((COPIED, 1), (K64 | COPIED, 1 << 32), data_file=True)
        assert found == [
            (0, 2048, DATA, 0),
            (2048, K64, UNALLOCATED, NO_HOST),
            (K64, K64 + 2048, ZERO, K64),
            (K64 + 2048, 2 * K64, UNALLOCATED, NO_HOST),
        ]


def reference(entry: int, bitmap: int, subcluster: int, layout: Layout, guest: int) -> tuple:
    """(kind, host offset of the subcluster or descriptor); ``guest``: offset of the cluster."""
    size = 1 << layout.cluster_bits
    offset = entry & sum(1 << bit for bit in range(9, 56))
    copied, compressed, zero = entry >> 63 & 1, entry >> 62 & 1, entry & 1
    if compressed:
        return (CORRUPT, -1) if layout.data_file else (COMPRESSED, entry & (1 << 62) - 1)
    if not layout.extended and zero and layout.version == 2:
        return CORRUPT, -1
    named = offset != 0 or (layout.data_file and copied and (layout.extended or not zero))
    if named and offset % size:
        return CORRUPT, -1
    if named and layout.data_file and offset != guest:
        return CORRUPT, -1
    if not layout.extended:
        host = offset if named else -1
        return (ZERO, host) if zero else (DATA, host) if named else (UNALLOCATED, -1)
    allocated, zeroes = bitmap & 0xFFFFFFFF, bitmap >> 32
    if allocated & zeroes or (allocated and not named):
        return CORRUPT, -1
    host = offset + subcluster * size // 32 if named else -1
    if zeroes >> subcluster & 1:
        return ZERO, host
    return (DATA, host) if allocated >> subcluster & 1 else (UNALLOCATED, -1)


# Few places, so that neighbours often go on with one another, or nearly so.
offsets = st.integers(0, 6).map(lambda cluster: cluster << 14)
flags = st.sampled_from([0, COPIED, 1, COPIED | 1, 1 << 62, 1 << 9, 1 << 57, 1 << 13])
words = st.tuples(offsets, flags).map(sum)
halves = st.sampled_from([0, 0xFFFFFFFF, 1, 1 << 31, 0xFFFF0000, 0x55555555])
bitmaps = st.tuples(halves, halves).map(lambda pair: pair[0] << 32 | pair[1])
layouts = st.builds(
    Layout,
    st.just(14),
    extended=st.booleans(),
    version=st.sampled_from([2, 3]),
    data_file=st.booleans(),
).filter(lambda layout: layout.version == 3 or not (layout.extended or layout.data_file))


@settings(max_examples=400, deadline=None)
@given(
    layouts,
    st.lists(st.tuples(words, bitmaps), min_size=1, max_size=12),
    st.integers(0, 3),
    st.sampled_from([0, 1 << 25]),
)
# In a data file offset 0 is a place: the second of these is wrong, not more of the first.
@example(Layout(14, data_file=True), [(COPIED, 0), (COPIED, 0)], 0, 0)
def test_every_subcluster_is_what_the_specification_says(
    layout: Layout, entries: list[tuple[int, int]], before: int, guest_offset: int
) -> None:
    stored = np.full(2048, 0xDEAD0001, np.uint64)
    used = [word for entry in entries for word in entry[: layout.entry_words]]
    stored[before * layout.entry_words :][: len(used)] = used
    runs = decode(stored, before, len(entries), layout, guest_offset)

    granule = (1 << 14) // (32 if layout.extended else 1)
    expected = []
    for index, (entry, bitmap) in enumerate(entries):
        cluster = guest_offset + (index << 14)
        for subcluster in range(32 if layout.extended else 1):
            answer = reference(entry, bitmap, subcluster, layout, cluster)
            expected.append((cluster + subcluster * granule, *answer))
            broken = explain(entry, bitmap if layout.extended else 0, layout, cluster)
            assert bool(broken) == (answer[0] == CORRUPT)

    found = []
    for start, end, kind, host, depth in runs:
        assert end > start
        assert depth == (kind != UNALLOCATED)
        for at in range(start, end, granule):
            moved = host + at - start if kind in (DATA, ZERO) and host >= 0 else host
            found.append((at, kind, moved))
    assert found == expected
    # Coalesced: no run could have gone on.
    for left, right in zip(rows(runs), rows(runs)[1:], strict=False):
        onward = left[3] + left[1] - left[0] if left[3] >= 0 else NO_HOST
        assert left[2] != right[2] or onward != right[3] or left[2] == COMPRESSED


def test_l1_entries() -> None:
    assert l2_table_offset(0, Layout(16)) == 0
    assert l2_table_offset(COPIED | 0x40000, Layout(16)) == 0x40000
    assert l2_table_offset(0x7F000000000001FF, Layout(16)) == 0  # reserved bits only
    with pytest.raises(CorruptImage, match=r"0x0000000000040200.*not aligned"):
        l2_table_offset(0x40200, Layout(16))


@pytest.mark.parametrize(
    "descriptor, cluster_bits, expected",
    [
        # x = 62 - (16 - 8) = 54: sectors in bits 54-61.
        (0x50000, 16, (0x50000, 512)),
        (0x50001, 16, (0x50001, 511)),
        (0x501FF, 16, (0x501FF, 1)),
        (2 << 54 | 0x50001, 16, (0x50001, 3 * 512 - 1)),
        (0xFF << 54 | 0x50000, 16, (0x50000, 256 * 512)),
        # x = 61: one bit for sectors.
        (1 << 61 | 0x201, 9, (0x201, 1023)),
        # x = 49: thirteen bits.
        (0x1FFF << 49 | (1 << 49) - 1, 21, ((1 << 49) - 1, 8191 * 512 + 1)),
        # Bits 62 and 63 do not belong to the descriptor.
        (3 << 62 | 0x50000, 16, (0x50000, 512)),
    ],
)
def test_compressed_range(descriptor: int, cluster_bits: int, expected: tuple[int, int]) -> None:
    assert compressed_range(descriptor, cluster_bits) == expected


@given(st.integers(9, 21), st.integers(0, 1 << 40), st.data())
def test_compressed_entries_reach_the_end_of_the_last_sector(
    cluster_bits: int, offset: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, 1 << cluster_bits))
    entry = compressed_entry(offset, length, cluster_bits)
    assert entry >> 62 == 1
    found, reach = compressed_range(entry, cluster_bits)
    assert found == offset
    assert (offset + reach) % 512 == 0
    assert length <= reach < length + 512


def test_a_table_of_few_runs_is_fast() -> None:
    words = np.zeros(8192, np.uint64)
    words[100:8000] = np.arange(7900, dtype=np.uint64) * K64 + np.uint64(0x50000 | COPIED)
    layout = Layout(16)

    def once() -> float:
        start = time.perf_counter()
        decode(words, 0, 8192, layout, 0)
        return time.perf_counter() - start

    assert len(decode(words, 0, 8192, layout, 0)) == 3
    # About 80 us; entry by entry in Python it would be 5 ms and more.
    assert min(once() for _ in range(200)) < 1e-3
