"""Coroutines whose first step is taken by hand, on both loops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import pytest

from pynbd.block.steps import Finished, first_step, together

T = TypeVar("T")


async def value(result: T, *waits: Awaitable[object]) -> T:
    for wait in waits:
        await wait
    return result


async def failure(*waits: Awaitable[object]) -> None:
    for wait in waits:
        await wait
    raise KeyError("failed")


async def awaited(step: Awaitable[T]) -> T:
    return await step


def adopted(step: object) -> asyncio.Task[object]:
    assert not isinstance(step, Finished)
    return asyncio.get_running_loop().create_task(awaited(step))  # type: ignore[arg-type]


async def test_what_never_waits_has_ended() -> None:
    assert first_step(value(7)) == Finished(7)
    with pytest.raises(KeyError):
        first_step(failure())


async def test_what_waits_goes_on_in_a_task() -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    later = asyncio.sleep(0.001)
    task = adopted(first_step(value(7, future, asyncio.sleep(0), later)))
    await asyncio.sleep(0.01)
    assert not task.done()
    future.set_result(None)
    assert await task == 7


async def test_a_yield_to_the_loop() -> None:
    """asyncio.sleep(0) yields None, not a future."""
    assert await adopted(first_step(value(7, asyncio.sleep(0), asyncio.sleep(0)))) == 7


async def test_what_waits_may_fail() -> None:
    with pytest.raises(KeyError):
        await adopted(first_step(failure(asyncio.sleep(0.001))))
    future = asyncio.get_running_loop().create_future()
    task = adopted(first_step(value(7, future)))
    future.set_exception(OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        await task


async def test_what_waits_may_be_cancelled() -> None:
    cleaned = []

    async def careful() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned.append(True)

    task = adopted(first_step(careful()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [True]


async def test_the_pool_in_a_first_step() -> None:
    loop = asyncio.get_running_loop()

    async def hop() -> int:
        return await loop.run_in_executor(None, int, "42")

    assert await adopted(first_step(hop())) == 42


async def test_together() -> None:
    loop = asyncio.get_running_loop()
    gates = [loop.create_future() for _ in range(3)]
    all_of_them = asyncio.ensure_future(
        together([value(0), value(1, gates[0]), value(2), value(3, gates[1]), value(4, gates[2])])
    )
    for gate in reversed(gates):
        await asyncio.sleep(0)
        assert not all_of_them.done()
        gate.set_result(None)
    assert await all_of_them == [0, 1, 2, 3, 4]
    assert await together([]) == []


async def test_together_ends_when_none_is_running() -> None:
    gate = asyncio.get_running_loop().create_future()
    ended = []

    async def slow() -> None:
        await gate
        ended.append(True)

    all_of_them = asyncio.ensure_future(
        together([slow(), failure(asyncio.sleep(0)), value(1, asyncio.sleep(0))])
    )
    await asyncio.sleep(0.01)
    assert not all_of_them.done()
    gate.set_result(None)
    with pytest.raises(KeyError):
        await all_of_them
    assert ended == [True]


async def test_together_with_one_that_fails_at_once() -> None:
    ended = []

    async def slow() -> None:
        await asyncio.sleep(0.001)
        ended.append(True)

    with pytest.raises(KeyError):
        await together(work for work in (slow(), failure()))
    assert ended == [True]
