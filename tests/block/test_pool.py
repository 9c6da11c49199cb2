"""The pool makes calls in threads, and wakes the loop once for all that are done."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from pynbd.block.pool import Lane, Pool
from pynbd.block.turns import ASKING


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(2, "test-pool")
    yield pool
    pool.close()


def threads() -> int:
    return sum(thread.name.startswith("test-pool") for thread in threading.enumerate())


async def test_results_and_failures_come_back(pool: Pool) -> None:
    assert await pool.start(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.start(divmod, 7, 0)
    assert await pool.start(threading.get_ident) != threading.get_ident()


async def test_threads_come_when_they_are_needed(pool: Pool) -> None:
    assert threads() == 0
    for _ in range(5):
        await pool.start(int)
    assert threads() == 1
    go_on = threading.Event()
    calls = [pool.start(go_on.wait, 10) for _ in range(3)]
    assert threads() == 2
    go_on.set()
    assert await asyncio.gather(*calls) == [True] * 3


async def test_one_wake_up_delivers_all_that_is_done(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    woken: list[Callable[..., Any]] = []
    wake = loop.call_soon_threadsafe

    def counted(callback: Callable[..., Any], *args: Any, **keywords: Any) -> asyncio.Handle:
        woken.append(callback)
        return wake(callback, *args, **keywords)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    calls = [pool.start(int, number) for number in range(20)]
    last = threading.Event()
    calls += [pool.start(last.set)]  # type: ignore[list-item]
    last.wait(10)  # the loop is held until the threads have done nearly all of it
    assert (await asyncio.gather(*calls))[:20] == list(range(20))
    assert len(woken) <= 2


async def test_a_call_that_is_cancelled_before_it_begins_is_not_made(pool: Pool) -> None:
    go_on, made = threading.Event(), list[int]()
    held = [pool.start(go_on.wait, 10) for _ in range(2)]
    late = pool.start(made.append, 1)
    late.cancel()
    go_on.set()
    await asyncio.gather(*held)
    await pool.start(int)
    assert made == []


async def test_a_call_that_is_cancelled_while_it_runs_goes_on(pool: Pool) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go_on.wait(10)
        made.set()

    running = pool.start(call)
    begun.wait(10)
    running.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert made.wait(10)


async def test_close_waits_for_what_is_under_way_and_drops_the_rest() -> None:
    pool = Pool(1, "test-pool")
    begun, ended, made = threading.Event(), threading.Event(), list[int]()

    def call() -> None:
        begun.set()
        time.sleep(0.05)
        ended.set()

    running, waiting = pool.start(call), pool.start(made.append, 1)
    begun.wait(10)
    pool.close()
    assert ended.is_set()
    assert threads() == 0
    await running
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert made == []
    with pytest.raises(RuntimeError):
        pool.start(int)


def test_two_loops_one_after_the_other() -> None:
    pool = Pool(2, "test-pool")

    async def work() -> int:
        return await pool.start(int, 5)

    assert [asyncio.run(work()), asyncio.run(work())] == [5, 5]
    pool.close()


def test_a_loop_that_is_closed_meanwhile_is_no_trouble() -> None:
    pool = Pool(1, "test-pool")
    begun, go_on = threading.Event(), threading.Event()

    async def leave() -> None:
        pool.start(begun.set)
        pool.start(go_on.wait, 10)
        begun.wait(10)

    asyncio.run(leave())
    go_on.set()
    pool.close()
    assert threads() == 0


async def _asked_by(who: object, ask: Callable[[], Any]) -> Any:
    """``ask()`` on behalf of ``who``, in a context of its own as every Task is."""
    ASKING.set(who)
    return ask()


@pytest.mark.parametrize("in_a_lane", [False, True], ids=["threads", "lane"])
async def test_who_asks_for_much_leaves_the_others_their_turns(in_a_lane: bool) -> None:
    """One thread: after what it is busy with, each gives one call in turn, in his own order."""
    pool, lane, made = Pool(1, "test-pool"), Lane(), list[str]()
    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go_on.wait(10)

    def start(call: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return pool.start_in_lane(lane, call, *args) if in_a_lane else pool.start(call, *args)

    calls = [start(hold)]
    await asyncio.to_thread(begun.wait, 10)
    for who, count in (("a", 50), ("b", 2), ("c", 1)):
        names = [f"{who}{number}" for number in range(count)]
        ask = partial(lambda names: [start(made.append, name) for name in names], names)
        calls += await asyncio.create_task(_asked_by(who, ask))
    go_on.set()
    await asyncio.gather(*calls)
    pool.close()
    assert made == ["a0", "b0", "c0", "a1", "b1", *(f"a{number}" for number in range(2, 50))]


@contextmanager
def no_more_threads() -> Iterator[None]:
    """None can be started: there is no room for their stacks."""
    size = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(size)


async def test_without_any_thread_calls_are_made_all_the_same() -> None:
    pool, lane = Pool(2, "test-pool"), Lane()
    with no_more_threads():
        calls = [pool.start(int, 1), pool.start_in_lane(lane, int, 2), pool.start(int, 3)]
        assert await asyncio.gather(*calls) == [1, 2, 3]
        with pytest.raises(ZeroDivisionError):
            await pool.start(divmod, 7, 0)
    assert (threads(), pool.busy) == (0, 0)
    assert await pool.start(threading.get_ident) != threading.get_ident()
    assert threads() == 1
    pool.close()
    assert threads() == 0


async def test_the_threads_that_there_are_make_all_calls() -> None:
    pool = Pool(4, "test-pool")
    await pool.start(int)
    with no_more_threads():
        calls = [pool.start(int, number) for number in range(8)]
        assert await asyncio.gather(*calls) == list(range(8))
        assert threads() == 1
    pool.close()
    assert threads() == 0
