"""Memory for all connections: everybody's share of it, in a fair order."""

from __future__ import annotations

import asyncio

from pynbd.server.shares import SHORT, TRUST, Share, SharedMemory

LIMIT = 64 << 20
COUNTED = 4 << 20
LONG = COUNTED + SHORT


class Holder:
    """A connection that takes ``wanted`` bytes as soon as it may."""

    def __init__(self, memory: SharedMemory, *, moved: int = 0, wanted: int = LONG) -> None:
        self.moved = moved
        self.wanted = wanted
        self.turns = 0
        self.share = Share(memory, self.take, lambda: self.moved)

    def take(self) -> None:
        self.turns += 1
        if self.share.allows(self.wanted):
            self.share.hold(self.share.held + self.wanted)

    @property
    def held(self) -> int:
        return self.share.held


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def fill(memory: SharedMemory, *, moved: int = 0) -> list[Holder]:
    """Connections that hold as much as they get."""
    holders = [Holder(memory, moved=moved) for _ in range(2 * LIMIT // COUNTED)]
    for holder in holders:
        holder.take()
        if not holder.held:
            holder.share.close()
    return [holder for holder in holders if holder.held]


async def test_strangers_have_half_of_it_and_who_is_proved_all() -> None:
    memory = SharedMemory(LIMIT)
    assert len(fill(memory)) == LIMIT // COUNTED // 2
    assert memory.used == LIMIT // COUNTED // 2 * LONG
    assert len(fill(memory, moved=LONG)) == LIMIT // COUNTED // 2
    assert memory.used == LIMIT // COUNTED * LONG


async def test_who_holds_nothing_has_a_short_one_always() -> None:
    memory = SharedMemory(LIMIT)
    fill(memory, moved=LONG)
    for _ in range(3):
        holder = Holder(memory, wanted=SHORT)
        holder.take()
        assert holder.held == SHORT
        holder.take()
        assert holder.held == SHORT


async def test_all_wait_in_order() -> None:
    memory = SharedMemory(LIMIT)
    holders = fill(memory, moved=LONG)
    waiting = [Holder(memory, moved=LONG) for _ in range(6)]
    for one in waiting:
        one.take()
    for number, one in enumerate(waiting):
        holders[number].share.close()
        late = Holder(memory, moved=LONG)
        late.take()  # before the one who waits has his turn
        assert late.held == 0
        await turns()
        assert one.held == LONG
        late.share.close()
    assert memory.used == LIMIT // COUNTED * LONG


async def test_who_proves_himself_does_not_wait_for_strangers() -> None:
    memory = SharedMemory(LIMIT)
    strangers = fill(memory)
    waiting = [Holder(memory) for _ in range(50)]
    for one in waiting:
        one.take()
    polite = Holder(memory, moved=-(-LONG // TRUST))
    polite.take()
    assert polite.held == LONG
    assert all(stranger.share.in_the_way for stranger in strangers)
    polite.share.hold(0)
    await turns()
    assert [one.held for one in waiting] == [0] * 50


async def test_what_the_proved_hold_is_not_of_the_strangers_half() -> None:
    """They hold more than half for ever, taking turns; who comes is served all the same."""
    memory = SharedMemory(LIMIT)
    busy = fill(memory, moved=LONG)
    assert memory.used == LIMIT // COUNTED * LONG
    stranger = Holder(memory)
    stranger.take()
    assert stranger.held == 0
    for turn in range(4 * len(busy)):
        one = busy[turn % len(busy)]
        one.share.hold(0)
        one.take()  # at once, and it waits if it may not
        await turns()
    assert stranger.held == LONG


async def test_many_who_hold_little_keep_nobody_waiting() -> None:
    """A crowd that leaves and comes again holds more than there is in short requests."""
    memory = SharedMemory(LIMIT)
    crowd = [Holder(memory, wanted=SHORT) for _ in range(2 * LIMIT // SHORT)]
    for one in crowd:
        one.take()
    assert memory.used == 2 * LIMIT
    first = Holder(memory, wanted=32 << 20)
    first.take()
    assert first.held == 32 << 20
    assert not any(one.share.in_the_way for one in crowd)


async def test_short_requests_do_not_add_up_to_a_long_one() -> None:
    """Who has moved enough for one short request has not proved himself for many."""
    memory = SharedMemory(LIMIT)
    fill(memory)
    one = Holder(memory, moved=SHORT, wanted=SHORT)
    for _ in range(2 * TRUST):
        one.take()
    assert one.held == TRUST * SHORT


async def test_all_are_served_in_the_end() -> None:
    """A crowd ten times as large as there is room for, which comes again and again, in which nobody
    leaves before he has to: all who wait have their turn, in order.
    """
    memory = SharedMemory(LIMIT)
    crowd = [Holder(memory, moved=number % 2 * LONG) for number in range(10 * LIMIT // COUNTED)]
    for one in crowd:
        one.take()
    polite = [Holder(memory), Holder(memory, moved=LONG)]
    for one in polite:
        one.take()
    for _ in range(len(crowd)):
        if all(one.held for one in polite):
            break
        holder = next(one for one in crowd if one.share.in_the_way)
        holder.share.close()
        await turns()
        crowd.remove(holder)
        crowd.append(Holder(memory, moved=holder.moved))
        crowd[-1].take()
    assert all(one.held for one in polite)


async def test_who_leaves_waits_no_more() -> None:
    memory = SharedMemory(LIMIT)
    strangers = fill(memory)
    first, second = Holder(memory), Holder(memory)
    first.take()
    second.take()
    first.share.close()
    strangers[0].share.close()
    await turns()
    assert (first.turns, first.held, second.held) == (1, 0, LONG)
    for holder in (*strangers, second):
        holder.share.close()
    assert (memory.used, memory.short) == (0, False)


async def test_without_a_limit_nobody_waits() -> None:
    memory = SharedMemory()
    assert len(fill(memory)) == 2 * LIMIT // COUNTED
    assert not memory.short
