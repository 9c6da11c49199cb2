"""What a guest asks of an image that it writes to, and what it then has to read.

Everything follows from a seed. `Model` knows of each byte whether it is as it was before, as it was
written last, or open: after a request that failed, and after a TRIM.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from interop.damage.guest import Guest, ranges
from interop.damages import EMPTY, FIRST, KEPT, OTHER_TABLE, PACKED, PACKED_TOO, PIECES, SECOND
from tests.conformance.client import Cmd, CmdFlag

_REQUESTS = 24
_LARGEST_CLUSTER = 1 << 16
# Guest clusters that damage may concern, and others.
_NEAR = (FIRST, SECOND, PACKED, PACKED_TOO, EMPTY, KEPT, PIECES, 7, 10, OTHER_TABLE)
_OPEN, _BEFORE, _WRITTEN = range(3)

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """A request that may change the disk. ``fill``: each byte of what is written."""

    command: Cmd
    offset: int = 0
    length: int = 0
    flags: int = 0
    fill: int = 0

    @property
    def payload(self) -> bytes:
        return bytes([self.fill]) * self.length if self.command is Cmd.WRITE else b""


def changes(rng: random.Random, size: int, cluster: int) -> Iterator[Change]:
    """Those of one run, on a disk of ``size`` bytes; the last one is a FLUSH."""
    cluster = min(cluster, _LARGEST_CLUSTER)
    starts = [at for at, _ in ranges(size)]
    for number in range(_REQUESTS if size else 0):
        first = rng.choice(
            [
                rng.choice(_NEAR) * cluster,
                rng.randrange(cluster // 8 + 2) * cluster,
                cluster // 8 * cluster - cluster,
                rng.choice(starts),
            ]
        )
        offset = min(first + rng.choice([0, 0, 0, 1, 512, cluster - 1]), size - 1)
        most = rng.choice([1, 512, cluster, cluster, 3 * cluster])
        length = min(most if rng.random() < 0.8 else rng.randrange(most) + 1, size - offset)
        match rng.randrange(8):
            case 0:
                yield Change(Cmd.TRIM, offset, length)
            case 1 | 2:
                flags = rng.choice([0, 0, CmdFlag.NO_HOLE, CmdFlag.FUA])
                yield Change(Cmd.WRITE_ZEROES, offset, length, flags)
            case 3:
                yield Change(Cmd.FLUSH)
            case _:
                flags = CmdFlag.FUA if rng.random() < 0.2 else 0
                yield Change(Cmd.WRITE, offset, length, flags, 0x80 + number)
    yield Change(Cmd.FLUSH)


class Model:
    """The bytes of the ranges that `guest.ranges` gives; ``before`` is what was read of them."""

    def __init__(self, before: Guest) -> None:
        self._parts: list[tuple[int, Bytes, Bytes]] = []
        for offset, length in ranges(before.size):
            content, there = _laid_out(before, offset, length)
            self._parts.append((offset, content, np.where(there, _BEFORE, _OPEN).astype(np.uint8)))

    def change(self, change: Change, *, done: bool) -> None:
        """``done``: it was acknowledged."""
        told = done and change.command in (Cmd.WRITE, Cmd.WRITE_ZEROES)
        for start, content, state in self._parts:
            first = max(change.offset - start, 0)
            last = max(change.offset + change.length - start, first)
            content[first:last] = change.fill
            state[first:last] = _WRITTEN if told else _OPEN

    def differences(self, after: Guest) -> tuple[Offsets, Offsets]:
        """The guest offsets of bytes that were written, and of those that were not, which are not
        what they have to be.
        """
        found: dict[int, list[Offsets]] = {_WRITTEN: [], _BEFORE: []}
        for start, content, state in self._parts:
            now, there = _laid_out(after, start, len(content))
            wrong = (now != content) | ~there
            for kind, offsets in found.items():
                offsets.append(np.flatnonzero(wrong & (state == kind)) + start)
        nothing = np.zeros(0, np.int64)
        written, unwritten = (np.concatenate([nothing, *each]) for each in found.values())
        return written, unwritten


def _laid_out(guest: Guest, offset: int, length: int) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """What was read of a range, and where something was."""
    content, there = np.zeros(length, np.uint8), np.zeros(length, np.bool_)
    for start, data in guest.pieces.items():
        first, last = max(start, offset), min(start + len(data), offset + length)
        if first < last:
            content[first - offset : last - offset] = np.frombuffer(data, np.uint8)[
                first - start : last - start
            ]
            there[first - offset : last - offset] = True
    return content, there
