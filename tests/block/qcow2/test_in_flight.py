"""InFlight: who overlaps waits, and nobody else."""

from __future__ import annotations

import asyncio

import pytest

from pynbd.block.qcow2.in_flight import InFlight, ranges_of


@pytest.mark.parametrize(
    "numbers, ranges",
    [
        ([], []),
        ([5], [(5, 6)]),
        ([0, 1, 2, 4, 6, 7], [(0, 3), (4, 5), (6, 8)]),
    ],
)
def test_numbers_as_ranges(numbers: list[int], ranges: list[tuple[int, int]]) -> None:
    assert ranges_of(numbers) == ranges


class Steps:
    """Tasks that are each inside a block until they are told to leave it."""

    def __init__(self) -> None:
        self.flight = InFlight()
        self.inside: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}

    def start(self, name: str, *ranges: tuple[int, int]) -> asyncio.Task[None]:
        self.leave[name] = asyncio.Event()
        return asyncio.create_task(self._enter(name, ranges))

    async def _enter(self, name: str, ranges: tuple[tuple[int, int], ...]) -> None:
        async with self.flight.alone(ranges):
            self.inside.append(name)
            await self.leave[name].wait()
            self.inside.remove(name)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


async def test_who_overlaps_waits_others_do_not() -> None:
    steps = Steps()
    tasks = [
        steps.start("a", (0, 4)),
        steps.start("overlaps", (3, 5)),
        steps.start("touches", (4, 5)),
        steps.start("apart", (9, 10)),
    ]
    await steps.settle()
    assert steps.inside == ["a", "touches", "apart"]
    steps.leave["a"].set()
    await steps.settle()
    assert steps.inside == ["touches", "apart"]
    steps.leave["touches"].set()
    await steps.settle()
    assert steps.inside == ["apart", "overlaps"]
    steps.leave["apart"].set()
    steps.leave["overlaps"].set()
    await asyncio.gather(*tasks)


async def test_all_ranges_are_entered_at_once() -> None:
    """Two that want the same ranges in another order never wait for each other."""
    steps = Steps()
    tasks = [steps.start("one", (0, 1), (5, 6)), steps.start("two", (5, 6), (0, 1))]
    await steps.settle()
    assert steps.inside == ["one"]
    steps.leave["two"].set()
    steps.leave["one"].set()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


async def test_who_is_cancelled_leaves_nothing_behind() -> None:
    steps = Steps()
    tasks = [steps.start("one", (0, 9)), steps.start("waits", (0, 1)), steps.start("next", (0, 1))]
    await steps.settle()
    tasks[1].cancel()
    tasks[0].cancel()
    await asyncio.wait(tasks[:2])
    await steps.settle()
    assert steps.inside[-1] == "next"
    steps.leave["next"].set()
    await tasks[2]


async def test_an_error_inside_lets_others_in() -> None:
    flight = InFlight()

    async def fails() -> None:
        async with flight.alone([(0, 1)]):
            raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        await fails()
    async with asyncio.timeout(5), flight.alone([(0, 1)]):
        pass
