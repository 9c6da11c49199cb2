"""A map, row by row: what several metadata contexts say of the same bytes, side by side (pure but
for the asking).

A disk may have millions of extents, so rows come as columns, a piece of the disk at a time, and
nothing is kept. Neighbours of equal status are one row, wherever the pieces were cut.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Statuses = Mapping[str, tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]


class Source(Protocol):
    """A disk that can be asked for block status."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    async def status(self, offset: int, length: int) -> Statuses:
        """Lengths and status of the extents from ``offset``, by context, as BLOCK_STATUS answers:
        perhaps of a shorter range.
        """
        ...


@dataclass(slots=True, eq=False)
class Rows:
    """Consecutive rows: guest bytes ``edges[i]`` to ``edges[i + 1]`` have status
    ``status[context, i]``.
    """

    edges: Int64s
    status: UInt64s

    @classmethod
    def side_by_side(
        cls, offset: int, answers: Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]
    ) -> Rows:
        """From (lengths, status) of each context, from guest byte ``offset`` on; as far as all of
        them know.
        """
        ends = [np.cumsum(lengths.astype(np.int64)) + offset for lengths, _ in answers]
        stop = min(int(known[-1]) for known in ends)
        edges = np.unique(np.concatenate([np.array([offset, stop], np.int64), *ends]))
        edges = edges[: np.searchsorted(edges, stop) + 1]
        columns = [
            status[np.searchsorted(known, edges[:-1], "right")].astype(np.uint64)
            for known, (_, status) in zip(ends, answers, strict=True)
        ]
        return cls(edges, np.stack(columns))

    @property
    def end(self) -> int:
        return int(self.edges[-1])

    @property
    def offsets(self) -> Int64s:
        return self.edges[:-1]

    @property
    def lengths(self) -> Int64s:
        return np.diff(self.edges)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def followed_by(self, other: Rows) -> Rows:
        """These rows and those that begin where they end, equal neighbours merged."""
        status = np.concatenate((self.status, other.status), axis=1)
        changes = np.append(True, (status[:, 1:] != status[:, :-1]).any(axis=0))
        edges = np.concatenate((self.edges[:-1], other.edges))
        return Rows(edges[np.append(changes, True)], status[:, changes])

    def split(self, count: int) -> tuple[Rows, Rows]:
        """The first ``count`` rows, and the others."""
        return (
            Rows(self.edges[: count + 1], self.status[:, :count]),
            Rows(self.edges[count:], self.status[:, count:]),
        )

    def combinations(self) -> tuple[list[tuple[int, ...]], npt.NDArray[np.intp]]:
        """The different columns of ``status``, ascending, and which of them each row has."""
        if len(self.status) == 1:
            values, which = np.unique(self.status[0], return_inverse=True)
            return [(value,) for value in values.tolist()], which
        columns, which = np.unique(self.status, axis=1, return_inverse=True)
        return list(zip(*columns.tolist(), strict=True)), which.reshape(-1)


async def rows_of(source: Source, contexts: Sequence[str]) -> AsyncIterator[Rows]:
    """The map of a whole disk, in pieces; no two neighbouring rows are equal."""
    held = Rows(np.zeros(1, np.int64), np.zeros((len(contexts), 0), np.uint64))
    while held.end < source.size:
        answers = await source.status(held.end, source.size - held.end)
        piece = Rows.side_by_side(held.end, [answers[context] for context in contexts])
        # The last row is held back: what comes next may continue it.
        held = held.followed_by(piece)
        complete, held = held.split(len(held) - 1)
        yield complete
    yield held
