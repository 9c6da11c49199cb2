"""Holes of the host file under the data of an image that was preallocated with metadata only.

There every cluster is allocated, but the host file is a hole where nothing was written yet. QEMU
looks for such holes if the refcounts tell of more clusters than the host has allocated, and says
that they are data which reads as zeroes (BDRV_BLOCK_RECURSE in ``block/qcow2.c``); so do we.
"""

from __future__ import annotations

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.extent import DATA, ZERO, Int64s, Runs, concatenate
from pynbd.block.qcow2.entries import Bools

# One step asks the file so often, and for so many pieces each time: neighbours in the guest mostly
# are neighbours in the file, so that one look serves very many runs.
_LOOKS_PER_STEP = 8
_PIECES_PER_LOOK = 1024


async def with_holes(file: HostFile, runs: Runs) -> Runs:
    """``runs``, or the first of them, with DATA | ZERO where DATA is a hole in ``file``."""
    done: list[Runs] = []
    for _ in range(_LOOKS_PER_STEP):
        data = runs.kind == DATA
        if not data.any():
            return concatenate([*done, runs])
        first = int(runs.host[np.argmax(data)])
        last = int((runs.host + runs.lengths)[data].max())
        pieces = await file.data_runs(first, last - first, _PIECES_PER_LOOK)
        lengths = np.array([length for length, _ in pieces], np.int64)
        is_data = np.array([state for _, state in pieces])
        known = _prefix(runs, first, first + int(lengths.sum()))
        done.append(_split(known, first + np.cumsum(lengths), is_data))
        if known.end == runs.end:
            break
        runs = runs.since(known.end)
    return concatenate(done)


def _prefix(runs: Runs, first: int, last: int) -> Runs:
    """The runs up to the first data outside of host bytes [first, last), where the first data
    begins."""
    outside = (runs.kind == DATA) & ((runs.host < first) | (runs.host + runs.lengths > last))
    if not outside.any():
        return runs
    index = int(np.argmax(outside))
    start, host = int(runs.starts[index]), int(runs.host[index])
    return runs.clip(start + last - host if first <= host < last else start)


def _split(runs: Runs, piece_ends: Int64s, is_data: Bools) -> Runs:
    """Cut data where a piece of the file ends inside it, and mark what lies in a hole."""
    rows = np.flatnonzero(runs.kind == DATA)
    host = runs.host[rows]
    piece = np.searchsorted(piece_ends, host, "right")
    cuts = np.searchsorted(piece_ends, host + runs.lengths[rows], "left") - piece
    if cuts.any():
        # For each cut: its row, and which of the row's cuts it is.
        row = np.repeat(np.arange(len(rows)), cuts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        new_ends = piece_ends[piece[row] + nth] + (runs.starts[rows] - host)[row]
        ends = np.sort(np.concatenate((runs.ends, new_ends)))
        starts = np.concatenate((np.array([runs.offset], np.int64), ends[:-1]))
        runs = Runs(runs.offset, ends, *runs.at(starts))
        rows = np.flatnonzero(runs.kind == DATA)
        piece = np.searchsorted(piece_ends, runs.host[rows], "right")
    kind = runs.kind.copy()
    kind[rows[~is_data[piece]]] |= ZERO
    return Runs(runs.offset, runs.ends, kind, runs.host, runs.depth)
