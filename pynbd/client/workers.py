"""Several requests in flight: workers that take piece after piece of a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from pynbd.client.pieces import Piece

REQUESTS = 64
REQUEST_SIZE = 256 << 10

Progress = Callable[[int], object]
"""Hears of each number of bytes that are dealt with; they add up to the size of the disk."""

Next = Callable[[], Coroutine[Any, Any, Piece | None]]


async def in_flight(
    count: int,
    pieces: AsyncGenerator[Piece, None],
    work: Callable[[Next], Coroutine[Any, Any, None]],
) -> None:
    """Let ``count`` workers take pieces until there are no more.

    The first failure ends the others, and is raised.
    """
    turn = asyncio.Lock()  # an asynchronous generator is asked by one at a time

    async def following() -> Piece | None:
        async with turn:
            return await anext(pieces, None)

    try:
        async with aclosing(pieces), asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work(following))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
