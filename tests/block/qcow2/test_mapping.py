"""Mapping: what a step of it costs, where it ends, and holes under preallocated data."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, NO_HOST, UNALLOCATED, ZERO, Runs
from pynbd.block.qcow2 import holes, mapping
from pynbd.block.qcow2.builder import Data, Image, Zero, large_map
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.block.qcow2.preallocation import Usage


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Qcow2Node]:
    node = await open_image(path)
    assert isinstance(node, Qcow2Node)
    yield node
    await node.close()


CLUSTER = 512
TABLE = 64  # entries of an L2 table of 512 bytes
SPAN = TABLE * CLUSTER


async def test_offsets_inside_of_clusters(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    clusters = {0: Data(b"a"), 512: Data(b"b"), 1024: Zero(), 2048: Data(b"c")}
    Image(size=SPAN * 3, cluster_bits=9, clusters=clusters).write(path)
    async with opened(path) as node:
        whole = await node.mapping.runs(0, SPAN * 3)
        assert whole.end == SPAN * 3
        (_, _, _, host, _), *_ = whole
        for start, end in [(0, 1), (100, 1030), (511, 513), (1500, 2049), (SPAN - 1, SPAN + 1)]:
            part = await node.mapping.runs(start, end - start)
            assert list(part) == list(whole.since(start).clip(end))
        assert list(await node.mapping.runs(100, 900)) == [(100, 1000, DATA, host + 100, 1)]


async def test_what_is_not_in_the_l1_table_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    Image(size=SPAN * 4000, cluster_bits=9, clusters={SPAN * 2000: Data(b"x")}).write(path)
    async with opened(path) as node:
        assert [row[:3] for row in await node.mapping.runs(0, node.size)] == [
            (0, SPAN * 2000, UNALLOCATED),
            (SPAN * 2000, SPAN * 2000 + CLUSTER, DATA),
            (SPAN * 2000 + CLUSTER, node.size, UNALLOCATED),
        ]
        assert node.mapping.tables.lookups == 1
        await node.mapping.runs(0, SPAN * 2000)
        await node.mapping.runs(SPAN * 2001, SPAN)
        assert node.mapping.tables.lookups == 1


async def test_past_the_l1_table_is_unallocated(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    Image(size=SPAN * 4, cluster_bits=9, clusters={SPAN: Data(b"x")}).write(path)
    async with opened(path) as node:
        node.mapping.l1 = node.mapping.l1[:1]
        assert [row[:3] for row in await node.mapping.runs(5, SPAN * 4 - 5)] == [
            (5, SPAN * 4, UNALLOCATED)
        ]


async def test_a_step_is_bounded_in_tables(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    clusters = {SPAN * index: Data(b"x") for index in range(600)}
    Image(size=SPAN * 600, cluster_bits=9, clusters=clusters).write(path)
    async with opened(path) as node:
        at, steps = 0, 0
        while at < node.size:
            loads = node.mapping.tables.loads
            at = (await node.mapping.runs(at, node.size - at)).end
            assert node.mapping.tables.loads - loads <= mapping.TABLES_PER_STEP
            steps += 1
        assert steps == 3
        assert node.mapping.tables.loads == 600


async def test_the_map_of_a_tebibyte(tmp_path: Path) -> None:
    """2 Mi extents. No step returns more than it should, nor holds the loop for long."""
    path = tmp_path / "disk"
    large_map(path)
    async with opened(path) as node:
        at, total, longest = 0, 0, 0.0
        before = time.process_time()
        while at < node.size:
            begin = time.thread_time()
            runs = await node.map(at, node.size - at, want_zero=False)
            longest = max(longest, time.thread_time() - begin)
            assert len(runs) <= mapping.RUNS_PER_STEP
            total += len(runs)
            at = runs.end
        assert total == 1 << 21
        # Ten times and more what it takes on an idle machine.
        assert time.process_time() - before < 2
        assert longest < 0.05


async def test_a_misaligned_l2_table_fails_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk"
    Image(size=1024 * 128 * 3, cluster_bits=10, clusters={0: Data(b"a")}).write(path)
    async with opened(path) as node:
        node.mapping.l1[1] = 0x200
        for _ in range(2):
            assert [row[:3] for row in await node.mapping.runs(0, node.size)] == [
                (0, 1024, DATA),
                (1024, 131072, UNALLOCATED),
                (131072, 262144, CORRUPT),
                (262144, 393216, UNALLOCATED),
            ]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "guest offset 0x20000" in record.getMessage()
    assert "0x0000000000000200" in record.getMessage()


async def test_only_those_who_ask_for_zeroes_look_for_preallocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    guess = Usage.metadata_preallocated

    async def counted(self: Usage) -> bool:
        nonlocal asked
        asked += 1
        return await guess(self)

    monkeypatch.setattr(Usage, "metadata_preallocated", counted)
    path = tmp_path / "disk"
    Image(size=SPAN, cluster_bits=9, clusters={0: Data(b"x")}).write(path)
    async with opened(path) as node:
        await node.map(0, SPAN, want_zero=False)
        await node.pread(0, SPAN)
        assert asked == 0
        await asyncio.gather(*(node.map(0, SPAN) for _ in range(20)))
        await node.map(0, SPAN)
        assert asked == 1


# Holes of the file under the data

PAGE = 4096
FILE_PAGES = 24

rows = st.one_of(
    st.tuples(st.integers(1, 5), st.just(DATA), st.integers(0, FILE_PAGES)),
    st.tuples(st.integers(1, 5), st.sampled_from([ZERO, UNALLOCATED]), st.just(NO_HOST)),
    st.tuples(st.integers(1, 5), st.just(COMPRESSED), st.just(5)),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=FILE_PAGES, max_size=FILE_PAGES),
    st.lists(rows, min_size=1, max_size=20),
    st.integers(0, 7),
)
def test_with_holes(
    tmp_path_factory: pytest.TempPathFactory,
    pages: list[bool],
    table: list[tuple[int, int, int]],
    shift: int,
) -> None:
    """Pages of the file are data or holes as the model says; what follows its end is a hole."""
    path = tmp_path_factory.mktemp("holes") / "file"
    with path.open("wb") as file:
        file.truncate(FILE_PAGES * PAGE)
        for number, is_data in enumerate(pages):
            if is_data:
                file.seek(number * PAGE)
                file.write(b"x" * PAGE)
    scaled = [
        (length * PAGE, kind, host * PAGE + shift * 512 if kind == DATA else host)
        for length, kind, host in table
    ]
    runs = Runs.of(0, scaled)
    model = [*pages, *[False] * 32]

    async def refine() -> list[tuple[int, int, int, int, int]]:
        engine = Engine(1)
        host = HostFile.open(engine, str(path), writable=False)
        found: list[tuple[int, int, int, int, int]] = []
        rest = runs
        while True:
            part = await holes.with_holes(host, rest)
            assert part.offset == rest.offset
            found += part
            if part.end == runs.end:
                break
            rest = rest.since(part.end)
        host.close()
        engine.close()
        return found

    found = asyncio.run(refine())
    assert [start for start, *_ in found] == [0, *(end for _, end, *_ in found[:-1])]
    for start, end, kind, host, _ in found:
        was, hosts, _ = runs.at(np.arange(start, end, 512))
        assert host == hosts[0]
        if was[0] == DATA:
            assert set(was.tolist()) == {DATA}
            assert {model[byte // PAGE] for byte in range(host, host + end - start, 512)} == {
                kind == DATA
            }
        else:
            assert set(was.tolist()) == {kind}
