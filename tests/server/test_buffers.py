"""BufferPool and Lease: every buffer has one owner at a time."""

from __future__ import annotations

import random

import pytest

from pynbd.server.buffers import IDLE_MAX, INLINE_SIZE, BufferPool, Lease


@pytest.mark.parametrize("length", [1, 2, 3, 4095, 4096, 4097, 1 << 18, (1 << 18) + 1, 32 << 20])
def test_a_buffer_is_long_enough(length: int) -> None:
    assert length <= len(BufferPool().take(length)) < 2 * length + 1


def test_nobody_shares_a_buffer() -> None:
    rng = random.Random(12)
    pool = BufferPool()
    owned: list[bytearray] = []
    for _ in range(2000):
        if owned and rng.random() < 0.5:
            pool.give(owned.pop(rng.randrange(len(owned))))
        else:
            owned.append(pool.take(rng.choice((1000, 5000, 1 << 18))))
        assert len({id(buffer) for buffer in owned}) == len(owned)


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool()
    buffer = pool.take(5000)
    pool.give(buffer)
    assert pool.take(1000) is not buffer
    assert pool.take(8192) is buffer
    assert pool.take(8192) is not buffer


def test_idle_buffers_are_bounded() -> None:
    pool = BufferPool()
    buffers = [pool.take(1 << 20) for _ in range(40)]
    for buffer in buffers:
        pool.give(buffer)
    again = [pool.take(1 << 20) for _ in buffers]
    kept = {id(buffer) for buffer in buffers} & {id(buffer) for buffer in again}
    assert len(kept) == IDLE_MAX >> 20


def test_the_last_user_gives_it_back() -> None:
    pool = BufferPool()
    buffer = pool.take(4096)
    lease = Lease(buffer, 3, pool)
    for _ in range(2):
        lease.end()
        assert pool.take(4096) is not buffer
    lease.end()
    assert pool.take(4096) is buffer


def test_the_inline_buffer() -> None:
    pool = BufferPool()
    assert len(pool.inline) == len(pool.inline_view) == INLINE_SIZE
    pool.inline_view[:3] = b"abc"
    assert pool.inline[:3] == b"abc"
