"""L2 entries of every layout, many at once (docs/interop/qcow2.rst, "L2 table entry", "Standard
Cluster Descriptor", "Compressed Clusters Descriptor", "Extended L2 Entries").

Nothing is allowed: an entry that breaks a rule is a run of kind CORRUPT. What `decode` says of each
subcluster is what the specification says of its entry, read here for itself, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, NO_HOST, UNALLOCATED, ZERO
from pynbd.block.qcow2.entries import Layout, compressed_range, decode, explain
from tests.fuzz.taking import Taking

ALLOWED = ()
MAX_LEN = 2048
DICTIONARY = (
    *(b"\x80\0\0\0\0\x05\0\0", b"\x80\0\0\0\0\x05\x40\0", b"\0\0\0\0\0\0\0\1"),
    *(b"\x40\0\0\0\0\x05\0\x77", b"\xff\xff\xff\xff\0\0\0\0", b"\0\0\0\0\xff\xff\xff\xff"),
)


def seeds() -> Iterable[bytes]:
    words = (0, 1 << 63 | 0x50000, 1 << 63 | 0x54000, 1, 0x58001, 1 << 62 | 0x60123, 0x5C200, 2)
    standard = b"".join(word.to_bytes(8, "big") for word in words)
    bitmaps = (0, 0xFFFFFFFF, 0xFF, 0xFFFFFFFF << 32, 0xF0 << 32 | 0xF, 3, 1, 0xFF << 32)
    extended = b"".join(
        word.to_bytes(8, "big") + bitmap.to_bytes(8, "big")
        for word, bitmap in zip(words, bitmaps, strict=True)
    )
    for flags in range(8):
        for bits in (0, 5, 12):
            yield bytes([flags, bits, 0]) + (extended if flags & 1 else standard)


def one_input(data: bytes) -> None:
    taking = Taking(data)
    flags = taking.number(1)
    extended, version, data_file = bool(flags & 1), 2 if flags & 2 else 3, bool(flags & 4)
    if version == 2:
        extended = data_file = False  # there are no feature bits
    lowest = 14 if extended else 9
    bits = lowest + taking.below(22 - lowest)
    layout = Layout(bits, extended, version, data_file)
    start = taking.below(4) << bits
    rest = taking.rest()
    each = 16 if extended else 8
    count = min(len(rest) // each, layout.l2_entries)
    if not count:
        return
    table = np.frombuffer(rest, ">u8", count * each // 8).astype(np.uint64)
    runs = decode(table, 0, count, layout, start)
    size, parts = 1 << bits, 32 if extended else 1
    part = size // parts
    said: list[tuple[int, int]] = []
    at = start
    for first, end, kind, host, depth in runs:
        assert first == at < end
        assert (end - first) % part == 0
        assert depth == (kind != UNALLOCATED)
        at = end
        for piece in range(first, end, part):
            place = host + piece - first if host != NO_HOST and kind != COMPRESSED else host
            said.append((kind, place))
    assert at == start + count * size
    for number in range(count):
        word = int(table[number * each // 8])
        bitmap = int(table[number * 2 + 1]) if extended else 0
        guest = start + number * size
        expected = meaning(word, bitmap, layout, guest)
        assert said[number * parts : (number + 1) * parts] == expected, (hex(word), hex(bitmap))
        assert bool(explain(word, bitmap, layout, guest)) == (expected[0][0] == CORRUPT)


def meaning(word: int, bitmap: int, layout: Layout, guest: int) -> list[tuple[int, int]]:
    """(kind, host) of each subcluster. Reserved bits are looked at by nobody."""
    size, parts = layout.cluster_size, 32 if layout.extended else 1
    corrupt = [(CORRUPT, NO_HOST)] * parts
    if word >> 62 & 1:  # "0 for standard clusters, 1 for compressed clusters"
        if layout.data_file:
            return corrupt
        descriptor = word & (1 << 62) - 1
        _range(descriptor, layout.cluster_bits)
        return [(COMPRESSED, descriptor)] * parts
    offset = word & 0x00FFFFFFFFFFFE00  # bits 9 - 55
    reads_as_zero = bool(word & 1) and not layout.extended
    # "offset may only be 0 with bit 63 set (indicating a host cluster offset of 0) when an external
    # data file is used"
    there = bool(offset) or (layout.data_file and bool(word >> 63) and not reads_as_zero)
    if there and offset % size:
        return corrupt
    if reads_as_zero and layout.version == 2:
        return corrupt
    # "This field [...] must be the guest offset" with an external data file.
    if there and layout.data_file and offset != guest:
        return corrupt
    if not layout.extended:
        if reads_as_zero:
            return [(ZERO, offset if there else NO_HOST)]
        return [(DATA, offset)] if there else [(UNALLOCATED, NO_HOST)]
    allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
    if (there and allocated & zero) or (allocated and not there):
        return corrupt
    pieces: list[tuple[int, int]] = []
    for n in range(parts):
        place = offset + n * (size // parts) if there else NO_HOST
        if zero >> n & 1:
            pieces.append((ZERO, place))
        elif allocated >> n & 1:
            pieces.append((DATA, place))
        else:
            pieces.append((UNALLOCATED, NO_HOST))
    return pieces


def _range(descriptor: int, cluster_bits: int) -> None:
    """ "x = 62 - (cluster_bits - 8)": host offset below, additional 512-byte sectors from there."""
    x = 62 - (cluster_bits - 8)
    offset = descriptor % (1 << x)
    end = (offset // 512 + 1 + (descriptor >> x)) * 512
    assert compressed_range(descriptor, cluster_bits) == (offset, end - offset)
    assert 0 < end - offset <= 2 << cluster_bits
