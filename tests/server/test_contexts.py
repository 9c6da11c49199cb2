"""Metadata contexts: what an answer may look like, and what it may cost.

That the answers agree with QEMU's, image by image, is the business of interop.
"""

from __future__ import annotations

import asyncio
import errno
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.chain import open_image
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, NO_HOST, UNALLOCATED, ZERO, Runs
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Bitmap, Compressed, Data, Image, Zero
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.server.contexts import (
    MAX_EXTENTS_PER_REPLY,
    Context,
    block_status,
    standard_contexts,
)
from tests.server.session import (
    BLOCK_STATUS,
    EINVAL,
    EIO,
    READ,
    REQ_ONE,
    Mode,
    talking,
)

T = TypeVar("T")
K, M = 1 << 10, 1 << 20

# NBD_STATE_HOLE | NBD_STATE_ZERO by what a layer says ("base:allocation metadata context").
STATES = {DATA: 0, COMPRESSED: 0, ZERO: 3, UNALLOCATED: 3, ZERO | DATA: 2}


class ModelNode(BlockNode):
    """A node that knows its runs by heart and answers at most ``step`` bytes at a time."""

    name = "model"
    format = "model"
    read_only = True

    def __init__(self, rows: list[tuple[int, int]], step: int) -> None:
        super().__init__()
        host = [0 if kind & DATA else NO_HOST for _, kind in rows]
        self.runs = Runs.of(0, [(*row, at) for row, at in zip(rows, host, strict=True)])
        self.size = self.runs.end
        self.step = step
        self.asked: list[tuple[int, int, bool]] = []

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        assert 0 < length <= self.size - offset
        self.asked.append((offset, length, want_zero))
        return self.runs.since(offset).clip(offset + min(length, self.step))


Answers = dict[int, list[tuple[int, int]]]


async def asked(
    node: BlockNode, contexts: dict[str, Context], offset: int, length: int, *, one: bool = False
) -> Answers:
    answers = await block_status(node, dict(enumerate(contexts.values())), offset, length, one=one)
    return {
        number: list(zip(lengths.tolist(), states.tolist(), strict=True))
        for number, (lengths, states) in answers.items()
    }


def merged(states: list[int]) -> list[tuple[int, int]]:
    return [(len(list(equal)), state) for state, equal in groupby(states)]


# What an answer looks like -----------------------------------------------------------------------

rows = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([DATA, ZERO, UNALLOCATED, COMPRESSED, 3])),
    min_size=1,
    max_size=12,
)


@given(rows, st.data(), st.integers(1, 30), st.booleans())
def test_answers(rows: list[tuple[int, int]], data: st.DataObject, step: int, one: bool) -> None:
    """Coalesced, inside the request, never empty; one extent only is followed to its end."""
    node = ModelNode(rows, step)
    offset = data.draw(st.integers(0, node.size - 1))
    length = data.draw(st.integers(1, node.size - offset))
    bitmap = DirtyBitmap("b", node.size, 4)
    for start, count in data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 20)))):
        bitmap.mark(min(start, node.size), min(count, node.size - min(start, node.size)))
    contexts = standard_contexts(depth=True, bitmaps=[bitmap])
    answers = asyncio.run(asked(node, contexts, offset, length, one=one))
    kinds = [kind for size, kind in rows for _ in range(size)]
    expected = [
        [STATES[kind] for kind in kinds],
        [int(kind != UNALLOCATED) for kind in kinds],
        [bitmap.bits[at // 4] for at in range(node.size)],
    ]
    assert sorted(answers) == [0, 1, 2]
    for number, extents in answers.items():
        want = merged(expected[number][offset : offset + length])
        assert all(size > 0 for size, _ in extents)
        assert all(a[1] != b[1] for a, b in pairwise(extents))
        if one:
            assert extents == want[:1]
        else:
            total = sum(size for size, _ in extents)
            assert 0 < total <= length
            assert extents == merged(expected[number][offset : offset + total])
            if number == 2 or step >= length:
                assert total == length


async def test_one_step_is_an_answer() -> None:
    """Rule 3: short without REQ_ONE, however much was asked for."""
    node = ModelNode([(100, DATA), (100, ZERO), (800, DATA)], 150)
    contexts = standard_contexts(depth=True, bitmaps=[])
    assert await asked(node, contexts, 0, 1000) == {0: [(100, 0), (50, 3)], 1: [(150, 1)]}
    assert len(node.asked) == 1


async def test_one_map_serves_all() -> None:
    node = ModelNode([(100, DATA), (100, ZERO), (800, DATA)], 150)
    contexts = standard_contexts(depth=True, bitmaps=[DirtyBitmap("b", 1000, 512)])
    answers = await asked(node, contexts, 10, 990, one=True)
    assert answers == {0: [(90, 0)], 1: [(990, 1)], 2: [(990, 0)]}
    # Once the first is answered, nobody asks for zeroes any more.
    assert node.asked[:2] == [(10, 990, True), (160, 840, False)]


async def turns_during(work: Awaitable[T]) -> tuple[T, int]:
    """The result of ``work``, and how often others had their turn meanwhile."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(others())
    result = await work
    ticking.cancel()
    return result, turns


async def test_a_long_uniform_range_does_not_hold_the_loop() -> None:
    node = ModelNode([(1000, DATA)], 10)
    contexts = standard_contexts(depth=False, bitmaps=[])
    answers, turns = await turns_during(asked(node, contexts, 0, 1000, one=True))
    assert answers == {0: [(1000, 0)]}
    assert turns >= 99


@pytest.mark.parametrize("one", [False, True])
async def test_many_contexts_do_not_hold_the_loop(one: bool) -> None:
    """Each of them may be worth a millisecond."""
    node = ModelNode([(1000, DATA)], 1000)
    bitmaps = [DirtyBitmap(str(number), 1000, 512) for number in range(20)]
    contexts = standard_contexts(depth=True, bitmaps=bitmaps)
    answers, turns = await turns_during(asked(node, contexts, 0, 1000, one=one))
    assert len(answers) == 22
    assert turns >= 20


class LongNode(ModelNode):
    """Data and compressed clusters by turns, which all have one status, a thousand at a time."""

    def __init__(self) -> None:
        super().__init__([(1_000_000, DATA)], 1000)

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        rows = [(1, DATA, 0), (1, COMPRESSED, 0)] * 500
        return Runs.of(offset, rows[: min(length, self.step)])


async def test_one_extent_keeps_nothing_of_what_it_passed() -> None:
    """A million runs, in 1000 steps: what they take is not more than what one step takes."""
    contexts = standard_contexts(depth=True, bitmaps=[])
    tracemalloc.start()
    try:
        answers = await asked(LongNode(), contexts, 0, 1_000_000, one=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answers == {0: [(1_000_000, 0)], 1: [(1_000_000, 1)]}
    assert peak < 1 << 20


async def test_a_long_map_takes_few_answers() -> None:
    """Two million extents of a bitmap: 131072 in each answer, as many as a reply may hold; and of
    what they go through on their way there are not three copies.
    """
    bitmap = DirtyBitmap("b", 1 << 40, 1 << 16)
    bitmap.bits[:] = bitarray(b"\xff\x00" * (1 << 20), endian="little")
    node = ModelNode([(1 << 40, DATA)], 1 << 40)
    contexts = dict(enumerate(standard_contexts(depth=False, bitmaps=[bitmap]).values()))
    del contexts[0]
    at = answers = 0
    tracemalloc.start()
    try:
        while at < node.size:
            status = await block_status(node, contexts, at, node.size - at, one=False)
            lengths, states = status[1]
            assert (lengths == 1 << 19).all()
            assert (states == np.arange(1, len(states) + 1) % 2).all()
            at += int(lengths.sum())
            answers += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answers == 16
    assert peak < 131072 * 8 * 4
    assert node.asked == []


async def test_extents_are_counted() -> None:
    """Row X8: 131072 in one reply, as many as QEMU gives of one context."""
    assert MAX_EXTENTS_PER_REPLY == 131072
    node = ModelNode([(1, kind) for kind in (DATA, ZERO)] * 100_000, 1 << 30)
    answers = await asked(node, standard_contexts(depth=False, bitmaps=[]), 0, node.size)
    assert len(answers[0]) == 131072


async def test_contexts_share_the_extents_of_a_reply() -> None:
    """What one leaves over is for those after it."""
    size = 512 * 200_000
    node = ModelNode([(size, DATA)], size)
    bitmaps = [DirtyBitmap(str(number), size, 512) for number in range(4)]
    for bitmap in bitmaps[1:]:
        bitmap.bits[::2] = True
    answers = await asked(node, standard_contexts(depth=False, bitmaps=bitmaps), 0, size)
    counts = [len(extents) for extents in answers.values()]
    assert counts[:2] == [1, 1]
    assert counts[2:] == [(131072 - 2) // 3] * 3


@pytest.mark.parametrize("one", [False, True])
async def test_damage_is_no_answer(one: bool) -> None:
    node = ModelNode([(100, DATA), (10, CORRUPT), (100, DATA)], 1 << 30)
    contexts = standard_contexts(depth=True, bitmaps=[])
    with pytest.raises(OSError, match="corrupt metadata") as caught:
        await asked(node, contexts, 0, 210, one=one)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "model")
    assert await asked(node, contexts, 0, 100, one=one) == {0: [(100, 0)], 1: [(100, 1)]}
    assert await asked(node, contexts, 110, 100, one=one) == {0: [(100, 0)], 1: [(100, 1)]}


async def test_damage_behind_an_only_extent_is_not_in_the_answer() -> None:
    node = ModelNode([(100, DATA), (50, ZERO), (10, CORRUPT), (100, DATA)], 1 << 30)
    contexts = standard_contexts(depth=False, bitmaps=[])
    assert await asked(node, contexts, 0, 260, one=True) == {0: [(100, 0)]}
    with pytest.raises(OSError, match="corrupt metadata"):
        await asked(node, contexts, 100, 160, one=True)


def test_names_and_their_order() -> None:
    bitmaps = [DirtyBitmap("b1", 10, 512), DirtyBitmap("a:b", 10, 512)]
    assert list(standard_contexts(depth=True, bitmaps=bitmaps)) == [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:b1",
        "qemu:dirty-bitmap:a:b",
    ]
    assert list(standard_contexts(depth=False, bitmaps=[])) == ["base:allocation"]


# What an answer costs ----------------------------------------------------------------------------


class Chain:
    """An overlay with two bitmaps on a backing image, and counts of what is looked up in them."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self.contexts = standard_contexts(depth=True, bitmaps=node.bitmaps())

    @property
    def tables(self) -> int:
        layers = [node for node in self.node.chain() if isinstance(node, Qcow2Node)]
        return sum(node.mapping.tables.lookups for node in layers)

    @property
    def bitmaps(self) -> int:
        """How many were read."""
        data = self.node._persistent.data
        assert data is not None
        return data.reads.loads


@asynccontextmanager
async def image(tmp_path: Path) -> AsyncIterator[Chain]:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    Image(size=2 * M, clusters={0: Data(b"base"), 512 * K: Data(b"base")}).write(base)
    Image(
        size=2 * M,
        clusters={64 * K: Data(b"top"), 512 * K: Zero(), M: Compressed(b"top")},
        backing_file="base.qcow2",
        backing_format="qcow2",
        bitmaps=[
            Bitmap("first", granularity=65536, dirty=[(64 * K, 64 * K)]),
            Bitmap("second", granularity=65536, dirty=[(0, M)]),
        ],
    ).write(top)
    node = await open_image(top)
    assert isinstance(node, Qcow2Node)
    try:
        yield Chain(node)
    finally:
        await node.close()


BASE = [(128 * K, 0), (896 * K, 3), (64 * K, 0), (960 * K, 3)]
DEPTH = [
    *((64 * K, 2), (64 * K, 1), (384 * K, 0), (64 * K, 1)),
    *((448 * K, 0), (64 * K, 1), (960 * K, 0)),
]
FIRST = [(64 * K, 0), (64 * K, 1), (M * 2 - 128 * K, 0)]
SECOND = [(M, 1), (M, 0)]


def filter_of(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


async def test_what_is_filtered_out_costs_nothing(tmp_path: Path) -> None:
    """Only what the payload names is looked up: that is what the payload is for."""
    async with (
        image(tmp_path) as it,
        talking(it.node, Mode.EXTENDED, contexts=it.contexts) as talk,
    ):
        client = talk.client

        async def status(*ids: int) -> Answers:
            reply = await client.ask(BLOCK_STATUS, 0, payload=filter_of(2 * M, *ids))
            assert not reply.error, reply
            return reply.status

        assert await status(2) == {2: FIRST}
        assert (it.tables, it.bitmaps) == (0, 1)
        assert await status(0) == {0: BASE}
        assert it.tables == 2
        assert it.bitmaps == 1
        assert await status(1) == {1: DEPTH}
        assert await status(3, 0) == {0: BASE, 3: SECOND}
        assert it.bitmaps == 2
        before = it.tables
        assert await status(3, 2) == {2: FIRST, 3: SECOND}
        assert it.tables == before
        reply = await client.ask(BLOCK_STATUS, 0, 2 * M)
        assert reply.status == {0: BASE, 1: DEPTH, 2: FIRST, 3: SECOND}


async def test_only_base_allocation_touches_no_bitmap(tmp_path: Path) -> None:
    async with (
        image(tmp_path) as it,
        talking(it.node, Mode.EXTENDED, contexts=it.contexts) as talk,
    ):
        reply = await talk.client.ask(BLOCK_STATUS, 0, payload=filter_of(2 * M, 0))
        assert reply.status == {0: BASE}
        assert it.bitmaps == 0


@pytest.mark.parametrize(
    "payload",
    [
        filter_of(M),
        filter_of(M, 9),
        filter_of(M, 0, 0),
        filter_of(M, 0, 0xFFFFFFFF),
        filter_of(0, 0),
        filter_of(2 * M + 1, 0),
        filter_of(2**64 - 1, 0),
        filter_of(M, 0)[:-1],
        filter_of(M, 0, 1, 2, 3, 4),
        b"\0",
    ],
    ids=bytes.hex,
)
async def test_a_bad_filter_costs_nothing(tmp_path: Path, payload: bytes) -> None:
    """Rows P2 to P10: refused before anything is looked up."""
    async with (
        image(tmp_path) as it,
        talking(it.node, Mode.EXTENDED, contexts=it.contexts) as talk,
    ):
        assert (await talk.client.ask(BLOCK_STATUS, 0, payload=payload)).error == EINVAL
        assert (it.tables, it.bitmaps) == (0, 0)
        reply = await talk.client.ask(BLOCK_STATUS, 0, payload=filter_of(2 * M, 3))
        assert reply.status == {3: SECOND}


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED], ids=lambda mode: mode.value)
async def test_one_extent_of_each(tmp_path: Path, mode: Mode) -> None:
    """Row X6."""
    async with image(tmp_path) as it, talking(it.node, mode, contexts=it.contexts) as talk:
        reply = await talk.client.ask(BLOCK_STATUS, 100, 2 * M - 100, flags=REQ_ONE)
        assert reply.status == {
            0: [(128 * K - 100, 0)],
            1: [(64 * K - 100, 2)],
            2: [(64 * K - 100, 0)],
            3: [(M - 100, 1)],
        }


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED], ids=lambda mode: mode.value)
async def test_damage_in_an_image(
    tmp_path: Path, mode: Mode, caplog: pytest.LogCaptureFixture
) -> None:
    """EIO once, for all contexts (row X15); the bitmaps, and what is whole, are still served."""
    path = tmp_path / "damaged.qcow2"
    written = Image(
        size=2 * M,
        clusters={0: Data(b"whole"), M: Data(b"lost")},
        bitmaps=[Bitmap("first", granularity=65536, dirty=[(64 * K, 64 * K)])],
    ).write(path)
    with path.open("r+b") as file:  # a host offset that is not aligned to a cluster
        file.seek(written.entry_offset(M))
        file.write(struct.pack(">Q", 1 << 63 | 0x50200))
    node = await open_image(path)
    contexts = standard_contexts(depth=True, bitmaps=node.bitmaps())
    async with talking(node, mode, contexts=contexts) as talk:
        client = talk.client
        reply = await client.ask(BLOCK_STATUS, 0, 2 * M)
        assert (reply.error, reply.status) == (EIO, {})
        assert (await client.ask(BLOCK_STATUS, 0, M)).status[0] == [(64 * K, 0), (M - 64 * K, 3)]
        assert (await client.ask(READ, M, 512)).error == EIO
        assert (await client.ask(READ, 0, 5)).data(0, 5) == b"whole"
        if mode is Mode.EXTENDED:
            reply = await client.ask(BLOCK_STATUS, 0, payload=filter_of(2 * M, 2))
            assert reply.status == {2: FIRST}
    await node.close()
    assert any("damaged.qcow2" in record.getMessage() for record in caplog.records)
