"""Copying a disk, or what is dirty of it, onto another.

What the source says reads as zeroes is not read; where the target reads as zeroes from the start,
zeroes are not written. Each worker reads and writes through one buffer of its own, and nothing
else is held. When `copy` returns, all is on stable storage.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from pynbd.block.extent import Runs
from pynbd.client.disk import Disk, Target
from pynbd.client.pieces import Piece, Ranges, cut, mapped, may_have_data
from pynbd.client.workers import REQUEST_SIZE, REQUESTS, Next, Progress, in_flight


async def copy(
    source: Disk,
    target: Target,
    *,
    ranges: Ranges | None = None,
    requests: int = REQUESTS,
    request_size: int = REQUEST_SIZE,
    progress: Progress = lambda _: None,
) -> None:
    """Copy all guest bytes of ``source``, or those in ``ranges``, to the same offsets of
    ``target``, which is at least as large.

    ``requests``: at a time. ``request_size``: the bytes of each, a power of two. ``progress`` hears
    of all of the source, also of what is not in the ranges. Raises `DiskError`.
    """

    async def worker(following: Next) -> None:
        buffer = memoryview(b"")
        while piece := await following():
            length = piece.end - piece.offset
            if piece.kind:
                if not buffer:  # most workers of a small copy never need one
                    buffer = memoryview(bytearray(request_size))
                view = buffer[:length]
                await source.read(piece.offset, view)
                await target.write(piece.offset, view)
            else:
                await target.zero(piece.offset, length)
            progress(length)

    request_size = max(request_size, target.block)
    pieces = _pieces(source, target, ranges or _all(source), request_size, progress)
    await in_flight(requests, pieces, worker)
    await target.flush()


async def _all(source: Disk) -> Ranges:
    yield 0, source.size


async def _pieces(
    source: Disk, target: Target, ranges: Ranges, request_size: int, progress: Progress
) -> AsyncGenerator[Piece, None]:
    done = 0
    runs: Runs | None = None  # a map that reaches on to the ranges that follow
    async for start, end in ranges:
        progress(start - done)
        done = start
        while done < end:
            if runs is None or runs.end <= done:
                runs = await mapped(source, done, source.size, block=target.block)
            here = runs.since(done).clip(end)
            kind = may_have_data(here.kind)
            for piece in cut(done, here.ends, kind, block=target.block, request_size=request_size):
                yield piece
            done = here.end
    progress(source.size - done)
