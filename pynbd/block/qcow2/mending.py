"""What a repair changes in L1 and L2 tables; docs/interop/qcow2.rst, "Cluster mapping".

A table is written only where nothing but this table can be: all who refer to its clusters take them
for it, and no table that goes on past the end of the file begins before it. What is between its
first changed entry and its last is written, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.cache import read_table
from pynbd.block.qcow2.entries import Bools, UInt64s
from pynbd.block.qcow2.format import (
    COPIED,
    L1E_OFFSET_MASK,
    L1E_RESERVED_MASK,
    L1E_SIZE,
    L2E_RESERVED_MASK,
    SUBCLUSTERS,
    ZERO,
)
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.l2_tables import L2Entries, Tables, l2_tables
from pynbd.block.qcow2.references import References

_ALL_ZERO = ((1 << SUBCLUSTERS) - 1) << SUBCLUSTERS

Piece = tuple[bytes, int]  # data and where they go in the file
# The words that L2 entries have to have, and their subcluster bitmaps.
L2Rule = Callable[[Tables, L2Entries], tuple[UInt64s, UInt64s | None]]


async def write_all(file: HostFile, pieces: Sequence[Piece]) -> None:
    """Write all ``pieces``. Raises the first ``OSError``."""
    for error in await file.write_batch(pieces) if pieces else ():
        if error:
            error.filename = file.path
            raise error


class Mending:
    """Changes of the tables of the image in ``file``, whose ``references`` were counted."""

    def __init__(self, file: HostFile, header: Header, references: References) -> None:
        self._file = file
        self._header = header
        self._references = references
        # Of each L2 table, how often it is named.
        tables, self._named = references.tables.distinct()
        self._tables = tables.view(np.uint64)
        self._changed = False

    async def entries(self) -> bool:
        """Clear what has to be 0 and no reader looks at, in the tables of all layers: whether there
        was any.

        That is reserved bits; L1 entries without an offset; COPIED and the subcluster bitmap of a
        compressed cluster; the host offset of a cluster that has no data in it, if it is misaligned
        or past the end of the file.
        """
        for layer in self._references.layers:
            await self._layer(layer, _cleared_in_l1, self._cleared)
        return self._changed

    async def copied(self) -> None:
        """Make the COPIED flags of the active layer what the refcounts demand."""
        references = self._references

        def in_l1(l1: UInt64s) -> UInt64s:
            return _flipped(l1, references.wrong_copied_in_l1(l1))

        def in_l2(tables: Tables, entries: L2Entries) -> tuple[UInt64s, UInt64s | None]:
            wrong = references.wrong_copied(tables, entries)
            return _flipped(entries.words, wrong), entries.bitmaps

        await self._layer(references.layers[0], in_l1, in_l2)

    async def _layer(
        self, layer: tuple[int, int], rule: Callable[[UInt64s], UInt64s], l2_rule: L2Rule
    ) -> None:
        offset, size = layer
        l1 = await read_table(self._file, offset, size)
        mended = rule(l1)
        first = offset >> self._header.cluster_bits
        last = (offset + size * L1E_SIZE - 1) >> self._header.cluster_bits
        alone = (self._references.counts[first : last + 1] == 1).all()
        if alone and last < self._references.cut_off_from:
            await self._write(_differences(l1, mended, 0, size, offset))
        async for tables in l2_tables(
            self._file, self._header, l1[l1 & np.uint64(L1E_OFFSET_MASK) != 0]
        ):
            entries = L2Entries(tables, self._header.layout)
            words, bitmaps = l2_rule(tables, entries)
            changed = tables.words.copy()
            if bitmaps is None:
                changed[entries.index] = words
            else:
                changed[entries.index * 2], changed[entries.index * 2 + 1] = words, bitmaps
            length = self._header.cluster_size // 8
            pieces: list[Piece] = []
            for number in np.flatnonzero(self._writable(tables.offsets)).tolist():
                start, at = number * length, int(tables.offsets[number])
                pieces += _differences(tables.words, changed, start, start + length, at)
            await self._write(pieces)

    async def _write(self, pieces: Sequence[Piece] | Iterator[Piece]) -> None:
        pieces = list(pieces)
        self._changed |= bool(pieces)
        await write_all(self._file, pieces)

    def _writable(self, offsets: UInt64s) -> Bools:
        size, counts = self._header.cluster_size, self._references.counts
        clusters = np.minimum(offsets // size, len(counts) - 1)
        named = self._named[np.searchsorted(self._tables, offsets)]
        writable: Bools = (offsets % size == 0) & (counts[clusters] == named)
        writable &= clusters < self._references.cut_off_from
        return writable

    def _cleared(self, tables: Tables, entries: L2Entries) -> tuple[UInt64s, UInt64s | None]:
        words, bitmaps = entries.words.copy(), entries.bitmaps
        words[~entries.compressed] &= ~np.uint64(L2E_RESERVED_MASK)
        words[entries.compressed] &= ~np.uint64(COPIED)
        nothing = entries.misaligned()
        if not self._header.has_data_file:
            nothing |= entries.allocated & (entries.offset >= self._references.file_size)
        nothing &= entries.without_data()
        words[nothing] = ZERO if bitmaps is None else 0
        if bitmaps is not None:
            bitmaps = np.where(entries.compressed, np.uint64(0), bitmaps)
            bitmaps[nothing] &= np.uint64(_ALL_ZERO)
        return words, bitmaps


def _cleared_in_l1(l1: UInt64s) -> UInt64s:
    somewhere = l1 & np.uint64(L1E_OFFSET_MASK) != 0
    return np.where(somewhere, l1 & ~np.uint64(L1E_RESERVED_MASK), np.uint64(0))


def _flipped(entries: UInt64s, wrong: Bools) -> UInt64s:
    return np.where(wrong, entries ^ np.uint64(COPIED), entries)


def _differences(
    old: UInt64s, new: UInt64s, first: int, last: int, host_offset: int
) -> Iterator[Piece]:
    """What to write of entries [first, last) of a table that begins at ``host_offset``."""
    rows = np.flatnonzero(old[first:last] != new[first:last])
    if len(rows):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        data = new[first + start : first + stop].astype(">u8").tobytes()
        yield data, host_offset + start * L1E_SIZE
