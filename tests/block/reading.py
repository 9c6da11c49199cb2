"""What the tests of images have in common: everything a node says, and everything qemu-img says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from interop import peers
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, ZERO
from pynbd.block.node import BlockNode

# (start, end, zero, data, host offset of data, depth from 0), as `qemu-img map` has it
Row = tuple[int, int, bool, bool, int | None, int]


async def contents(node: BlockNode, piece: int = 1 << 20) -> bytes:
    """All guest bytes, read in pieces."""
    pieces = [await node.pread(at, min(piece, node.size - at)) for at in range(0, node.size, piece)]
    return b"".join(pieces)


def qemu_contents(path: Path, *options: str) -> bytes:
    """All guest bytes, as qemu-img converts them to raw."""
    raw = path.with_name(path.name + ".raw")
    peers.run("qemu-img", "convert", *options, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


async def rows(node: BlockNode) -> list[Row]:
    """The whole map, as rows of `qemu-img map`."""
    found: list[Row] = []
    at = 0
    while at < node.size:
        runs = await node.map(at, node.size - at)
        for start, end, kind, host, depth in runs:
            assert kind != CORRUPT
            place = host if kind & DATA and kind != COMPRESSED else None
            found.append((start, end, bool(kind & ZERO), bool(kind & DATA), place, depth - 1))
        at = runs.end
    return merged(found)


def qemu_rows(path: Path) -> list[Row]:
    """The whole map, as qemu-img says it. Where nothing is present the depth is -1, as ours is."""
    said = json.loads(peers.run("qemu-img", "map", "--output=json", path).stdout)
    return merged(
        [
            (
                row["start"],
                row["start"] + row["length"],
                row["zero"],
                row["data"],
                row.get("offset") if row["data"] else None,
                row["depth"] if row["present"] else -1,
            )
            for row in said
        ]
    )


def merged(found: list[Row]) -> list[Row]:
    """Neighbours that say the same, and go on at the next host offset, as one row."""
    result: list[Row] = []
    for start, end, zero, data, host, depth in found:
        if result:
            first, last, *flags, place, level = result[-1]
            onward = None if place is None else place + last - first
            if last == start and flags == [zero, data] and (onward, level) == (host, depth):
                result[-1] = (first, end, zero, data, place, depth)
                continue
        result.append((start, end, zero, data, host, depth))
    return result


async def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until the host has done what it was asked to do."""
    for _ in range(5000):
        if is_so():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not within five seconds")
