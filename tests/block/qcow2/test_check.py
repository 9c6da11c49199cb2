"""Checks of images: what is wrong, where, and what a check costs. That the numbers are QEMU's, over
many damages, is in interop/test_check_*.py.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.builder import (
    Bitmap,
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Written,
    Zero,
    large_map,
    poke,
)
from pynbd.block.qcow2.check import check
from pynbd.block.qcow2.format import COPIED
from pynbd.block.qcow2.image import read_header
from pynbd.block.qcow2.references import Named
from pynbd.block.qcow2.report import MAX_FINDINGS, Report
from pynbd.errors import CorruptImage, ImageError
from tests.block.qcow2.writing import report_on, writable

K = 1 << 10
CLUSTER = 4 * K


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(2)
    yield engine
    engine.close()


async def checked(engine: Engine, path: Path) -> Report:
    file = HostFile.open(engine, str(path), writable=False)
    try:
        return await check(file, await read_header(file))
    finally:
        file.close()


def write(path: Path) -> Written:
    """Four clusters that are allocated, the second of which does not follow the first, and two in
    one host cluster.
    """
    clusters = {
        0: Data(b"a"),
        2 * CLUSTER: Data(b"b"),
        3 * CLUSTER: Zero(),
        4 * CLUSTER: Compressed(b"c" * CLUSTER),
        5 * CLUSTER: Compressed(b"d" * CLUSTER),
    }
    return Image(size=1 << 20, cluster_bits=12, clusters=clusters).write(path)


async def test_nothing_wrong(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    write(path)
    report = await checked(engine, path)
    assert report == Report(
        image_end_offset=path.stat().st_size,
        total_clusters=256,
        allocated_clusters=4,
        fragmented_clusters=2,  # compressed ones are, always
        compressed_clusters=2,
    )
    assert report.clean


async def test_findings_name_the_place(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = write(path)
    at = written.entry_offset(2 * CLUSTER)
    entry = COPIED | 0xFE000
    poke(path, at, entry.to_bytes(8, "big"))
    report = await checked(engine, path)
    assert (report.corruptions, report.leaks) == (2, 1)
    size = path.stat().st_size
    rule = "COPIED contradicts the refcount of its cluster"
    assert report.findings == [
        f"L1 table: the cluster at 0xfe000 is past the end of the file, {size:#x}",
        f"L1 table: L2 entry {entry:#018x} at {at:#x}: {rule}",
        "cluster 3: the refcount is 1, with 0 references: a leak",
    ]
    assert not report.clean


async def test_all_are_counted_and_some_are_told(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 4096 * 512
    written = Image(
        size=size, cluster_bits=9, clusters={at: Data(b"x") for at in range(0, size, 512)}
    ).write(path)
    table = written.header.refcount_table_offset
    poke(path, table, bytes(8 * 16))
    report = await checked(engine, path)
    assert report.corruptions > 2 * MAX_FINDINGS
    assert len(report.findings) == MAX_FINDINGS


async def test_refcounts_that_cannot_be_read(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = write(path)
    poke(path, written.header.refcount_table_offset, (512).to_bytes(8, "big"))
    report = await checked(engine, path)
    assert report.check_errors == path.stat().st_size // CLUSTER
    assert report.corruptions == 1
    assert "is not aligned to a cluster" in report.findings[0]


async def test_bitmaps_that_cannot_be_found(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = Image(size=1 << 20, cluster_bits=12, bitmaps=[Bitmap("b")]).write(path)
    assert written.header.bitmaps is not None
    poke(path, written.header.bitmaps.directory_offset, bytes(8))
    with pytest.raises(CorruptImage, match="bitmap 'b'"):
        await checked(engine, path)


async def test_too_many_clusters(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = Image(size=1 << 20, cluster_bits=9).write(path)
    os.truncate(path, (1 << 31) * 512)
    file = HostFile.open(engine, str(path), writable=False)
    with pytest.raises(ImageError, match="too many to check"):
        await check(file, written.header)
    file.close()


async def test_a_large_image_does_not_hold_the_loop(engine: Engine, tmp_path: Path) -> None:
    """A TiB with a million clusters that are allocated."""
    path = tmp_path / "large.qcow2"
    written = large_map(path)
    file = HostFile.open(engine, str(path), writable=False)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    began = time.process_time()
    report = await check(file, written.header)
    assert time.process_time() - began < 10
    task.cancel()
    file.close()
    assert report.clean
    assert report.allocated_clusters == 1 << 20
    assert report.fragmented_clusters == 0
    assert turns > 20


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - CLUSTER])
async def test_a_snapshot_whose_l1_table_no_file_can_hold(tmp_path: Path, offset: int) -> None:
    """It is past the end of the file, as others are."""
    path = tmp_path / "x.qcow2"
    written = Image(
        size=CLUSTER, cluster_bits=12, snapshots=[InternalSnapshot("s", {0: Data(b"a")})]
    ).write(path)
    poke(path, written.header.snapshots_offset, offset.to_bytes(8, "big"))
    report = await report_on(path)
    assert any(f"{offset:#x} is past the end of the file" in line for line in report.findings)
    async with writable(path) as node:
        assert await node.pread(0, CLUSTER) == bytes(CLUSTER)


def test_what_is_named_again_and_again() -> None:
    """All entries of many tables may name the same clusters: they take memory once."""
    named, numbers = Named(), np.arange(1 << 18)
    tracemalloc.start()
    try:
        for number in range(64):
            named.add(numbers.copy() if number else numbers[:5])
        every, times = named.distinct()
        assert tracemalloc.get_traced_memory()[1] < 96 << 20  # of 128 MiB that were named
    finally:
        tracemalloc.stop()
    assert (every == numbers).all()
    assert times[:6].tolist() == [64, 64, 64, 64, 64, 63]


async def test_findings_are_short_whatever_a_snapshot_is_called(
    engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "x.qcow2"
    clusters = {n * CLUSTER: Data(b"%d" % n) for n in range(CLUSTER // 8)}
    snapshot = InternalSnapshot("s", clusters, id="\x01" * 0xFFFF)
    written = Image(size=1 << 21, cluster_bits=12, snapshots=[snapshot]).write(path)
    (l1,) = struct.unpack_from(">Q", path.read_bytes(), written.header.snapshots_offset)
    (l2,) = struct.unpack_from(">Q", path.read_bytes(), l1)
    poke(path, l2 & ~COPIED, b"\0\xff" * (CLUSTER // 2))
    report = await checked(engine, path)
    assert len(report.findings) > CLUSTER // 8
    assert max(map(len, report.findings)) < 500
