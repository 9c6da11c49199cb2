"""Discards, and writes of nothing but zeroes, found among all writes (``--discard`` and
``--detect-zeroes`` of QEMU's tools).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from pynbd.block.engine import Buffer
from pynbd.block.node import BlockNode


class Discard(StrEnum):
    """What becomes of what clients discard. ``UNMAP``: it is given back; ``IGNORE``: nothing."""

    UNMAP = "unmap"
    IGNORE = "ignore"


class DetectZeroes(StrEnum):
    """What becomes of writes of zeroes. ``OFF``: they are data; ``ON``: zeroes that keep their
    space; ``UNMAP``: holes.
    """

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


async def pwrite_detecting(
    node: BlockNode, pieces: Sequence[tuple[int, Buffer]], detect: DetectZeroes, *, fua: bool
) -> list[OSError | None]:
    """As `BlockNode.pwrite_batch`; pieces that are all zeroes are written as such."""
    zero = [not np.frombuffer(data, np.uint8).any() for _, data in pieces]
    others = [piece for piece, is_zero in zip(pieces, zero, strict=True) if not is_zero]
    errors = iter(await node.pwrite_batch(others, fua=fua) if others else ())
    results: list[OSError | None] = []
    for (offset, data), is_zero in zip(pieces, zero, strict=True):
        if not is_zero:
            results.append(next(errors))
            continue
        try:
            await node.write_zeroes(
                offset, len(data), may_unmap=detect is DetectZeroes.UNMAP, fast=False, fua=fua
            )
        except OSError as error:
            results.append(error)
        else:
            results.append(None)
    return results
