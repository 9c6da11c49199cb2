"""Coroutines whose first step is taken by hand.

Most requests need no disk, and a coroutine that never waits needs no Task: creating one costs more
than all the rest. So the first step is taken directly, and only a coroutine that waits is given to
a Task. During that first step there is no current task: no `asyncio.timeout` and no `TaskGroup`
there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from types import coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finished(Generic[T]):
    """The coroutine ended at its first step, with ``value``."""

    value: T


def first_step(work: Coroutine[Any, Any, T]) -> Finished[T] | Awaitable[T]:
    """Take the first step of ``work``: its result, or the rest of it, to be awaited in a Task."""
    try:
        waiting = work.send(None)
    except StopIteration as stop:
        return Finished(stop.value)
    return _rest(work, waiting)


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of ``works``, which wait for their disks at the same time.

    The first failure is raised, once none of them is running any more.
    """
    works = list(works)
    if len(works) == 1:
        return [await works[0]]  # in the Task of the one who asks
    results: list[T | asyncio.Task[T]] = []
    waiting: list[asyncio.Task[T]] = []
    failure: Exception | None = None
    for work in works:
        try:
            step = first_step(work)
        except Exception as error:
            failure = error
            break
        if isinstance(step, Finished):
            results.append(step.value)
        else:
            task = asyncio.get_running_loop().create_task(awaited(step))
            waiting.append(task)
            results.append(task)
    if waiting:
        # Not cancelled if one fails: a task that never began could not end what its first step did.
        await asyncio.gather(*waiting, return_exceptions=True)
    if failure:
        for work in works:
            work.close()  # those that never began
        raise failure
    return [result.result() if isinstance(result, asyncio.Task) else result for result in results]


async def awaited(step: Awaitable[T]) -> T:
    """``step``, for whoever wants a coroutine."""
    return await step


@coroutine
def _rest(work: Coroutine[Any, Any, T], waiting: Any) -> Generator[Any, Any, T]:
    """Go on with ``work``, which has yielded ``waiting`` to whoever took its first step."""
    while True:
        try:
            try:
                value = yield waiting
            except BaseException as error:
                waiting = work.throw(error)
            else:
                waiting = work.send(value)
        except StopIteration as stop:
            result: T = stop.value
            return result
