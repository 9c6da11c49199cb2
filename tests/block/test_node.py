"""BlockNode: chains of model layers against a model that knows every byte of every layer."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pynbd.block.engine import Engine, HostFile
from pynbd.block.extent import CORRUPT, DATA, NO_HOST, UNALLOCATED, ZERO, Runs
from pynbd.block.node import BlockNode

T = TypeVar("T")
Row = tuple[int, int, int]

HOST = bytes(range(1, 65))  # what every layer's file holds, no zero among it

rows = st.one_of(
    st.tuples(st.integers(1, 6), st.just(DATA), st.integers(0, 48)),
    st.tuples(st.integers(1, 6), st.sampled_from([ZERO, UNALLOCATED]), st.just(NO_HOST)),
)
layers = st.lists(rows, min_size=1, max_size=8)


class ModelNode(BlockNode):
    """A format that knows its runs by heart and answers at most ``step`` bytes at a time."""

    format = "model"
    read_only = True

    def __init__(self, file: HostFile, table: list[Row], step: int, window: int) -> None:
        super().__init__()
        self.name = file.path
        self.file = file
        self.runs = Runs.of(0, table)
        self.size = self.runs.end
        self.step = step
        self.window = window
        self.questions = 0

    async def layer(self, offset: int, length: int, *, want_zero: bool) -> Runs:
        assert length > 0
        assert offset + length <= self.size
        self.questions += 1
        return self.runs.since(offset).clip(offset + min(length, self.step))


def chain(file: HostFile, tables: list[list[Row]], step: int, window: int) -> ModelNode:
    nodes = [ModelNode(file, table, step, window) for table in tables]
    for node, below in pairwise(nodes):
        node.backing = below
    return nodes[0]


def expected(tables: list[list[Row]]) -> list[tuple[int, int, int]]:
    """(kind, host offset, depth) of each byte of the chain."""
    flat = [
        [
            (kind, host + n if kind == DATA else NO_HOST)
            for length, kind, host in table
            for n in range(length)
        ]
        for table in tables
    ]
    found = []
    for at in range(len(flat[0])):
        answer = (ZERO, NO_HOST, 0)
        for depth, layer in enumerate(flat, 1):
            if at >= len(layer):  # it is the short layer that decides
                answer = (ZERO, NO_HOST, depth)
                break
            if layer[at][0] != UNALLOCATED:
                answer = (*layer[at], depth)
                break
        found.append(answer)
    return found


@pytest.fixture
def host_path(tmp_path: Path) -> Path:
    path = tmp_path / "host"
    path.write_bytes(HOST)
    return path


@contextmanager
def opened(path: Path) -> Iterator[HostFile]:
    engine = Engine(1)
    file = HostFile.open(engine, str(path), writable=False)
    try:
        yield file
    finally:
        file.close()
        engine.close()


def run(path: Path, work: Callable[[HostFile], Awaitable[T]]) -> T:
    async def main() -> T:
        with opened(path) as file:
            return await work(file)

    return asyncio.run(main())


every_chain = given(st.lists(layers, min_size=1, max_size=4), st.integers(1, 50), st.data())
few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@every_chain
def test_map(host_path: Path, tables: list[list[Row]], step: int, data: st.DataObject) -> None:
    model = expected(tables)
    start = data.draw(st.integers(0, len(model) - 1))

    async def whole(file: HostFile) -> list[tuple[int, int, int]]:
        node = chain(file, tables, step, 64)
        found: list[tuple[int, int, int]] = []
        at = start
        while at < node.size:
            runs = await node.map(at, node.size - at)
            assert runs.offset == at < runs.end <= node.size
            for first, last, kind, host, depth in runs:
                moving = kind == DATA
                found += [(kind, host + n if moving else host, depth) for n in range(last - first)]
            at = runs.end
        return found

    assert run(host_path, whole) == model[start:]


@few
@every_chain
def test_pread(host_path: Path, tables: list[list[Row]], step: int, data: st.DataObject) -> None:
    model = bytes(HOST[host] if kind == DATA else 0 for kind, host, _ in expected(tables))
    window = data.draw(st.integers(1, 20))
    ranges = st.tuples(st.integers(0, len(model)), st.integers(0, len(model)))
    asked = [sorted(pair) for pair in data.draw(st.lists(ranges, min_size=1, max_size=5))]

    async def read(file: HostFile) -> list[bytes]:
        node = chain(file, tables, step, window)
        return [bytes(await node.pread(first, last - first)) for first, last in asked]

    assert run(host_path, read) == [model[first:last] for first, last in asked]


async def test_what_was_resolved_is_not_asked_again(host_path: Path) -> None:
    with opened(host_path) as file:
        node = chain(file, [[(8, UNALLOCATED, NO_HOST)], [(8, DATA, 0)]], 64, 64)
        assert await node.pread(0, 8) == HOST[:8]
        below = node.backing
        assert isinstance(below, ModelNode)
        assert (node.questions, below.questions) == (1, 1)
        assert await node.pread(3, 4) == HOST[3:7]
        assert (node.questions, below.questions) == (1, 1)


async def test_a_backing_layer_is_asked_only_where_it_can_matter(host_path: Path) -> None:
    with opened(host_path) as file:
        node = chain(file, [[(8, DATA, 0)], [(8, DATA, 8)]], 64, 64)
        await node.map(0, 8)
        below = node.backing
        assert isinstance(below, ModelNode)
        assert below.questions == 0


async def test_a_deep_chain_does_not_hold_the_loop(host_path: Path) -> None:
    """A layer takes 0.2 ms to look up and 0.2 ms to merge; the loop has its turn every 2 ms."""
    with opened(host_path) as file:
        tables = [[(200, UNALLOCATED, NO_HOST)] for _ in range(200)]
        tables[-1] = [(150, DATA, 0), (50, UNALLOCATED, NO_HOST)]
        node = chain(file, tables, 200, 200)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(others())
        runs = await node.map(0, 200)
        ticking.cancel()
        assert list(runs) == [(0, 150, DATA, 0, 200), (150, 200, ZERO, NO_HOST, 0)]
        assert turns >= 2 * 200 // 10


async def test_a_shallow_chain_is_mapped_in_one_step(host_path: Path) -> None:
    """What waits needs a Task, which costs more than the map of a few layers."""
    with opened(host_path) as file:
        node = chain(file, [[(8, UNALLOCATED, NO_HOST)]] * 3 + [[(8, DATA, 0)]], 64, 64)
        with pytest.raises(StopIteration) as ended:
            node.map(0, 8).send(None)
        assert list(ended.value.value) == [(0, 8, DATA, 0, 4)]


async def test_corrupt_metadata_fails_only_those_who_touch_it(host_path: Path) -> None:
    with opened(host_path) as file:
        node = chain(file, [[(4, DATA, 0), (4, CORRUPT, NO_HOST), (4, DATA, 8)]], 64, 64)
        assert await node.pread(0, 4) == HOST[:4]
        assert await node.pread(8, 4) == HOST[8:12]
        with pytest.raises(OSError, match="guest offset 0x4") as caught:
            await node.pread(3, 2)
        assert caught.value.errno == errno.EIO


async def test_past_the_end_of_the_file_are_zeroes(
    host_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That is told, once."""
    with opened(host_path) as file:
        node = chain(file, [[(8, DATA, len(HOST) - 4)]], 64, 64)
        assert await node.pread(0, 8) == HOST[-4:] + bytes(4)
        for sparse in (False, True):
            read = await node.read_plain(file, len(HOST) - 4, 8, sparse=sparse)
            assert read == HOST[-4:] + bytes(4)
            assert await node.read_plain(file, len(HOST) + 4, 8, sparse=sparse) == bytes(8)
    (told,) = caplog.messages
    assert "cut short" in told


async def test_a_read_only_node_refuses_changes(host_path: Path) -> None:
    with opened(host_path) as file:
        node = chain(file, [[(8, DATA, 0)]], 64, 64)
        (refused,) = await node.pwrite_batch([(0, b"x")])
        assert refused is not None
        assert refused.errno == errno.EROFS
        with pytest.raises(OSError, match="read-only"):
            await node.write_zeroes(0, 8, may_unmap=False, fast=False)
        with pytest.raises(OSError, match="read-only"):
            await node.discard(0, 8)
