"""Repairs of images: in which order they write, and what a crash in the middle leaves."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from pynbd.block.engine import Buffer, Engine, HostFile
from pynbd.block.qcow2.builder import Bitmap, Data, Image, InternalSnapshot, Written, poke
from pynbd.block.qcow2.check import check
from pynbd.block.qcow2.format import COPIED, Incompatible
from pynbd.block.qcow2.header import Header, parse
from pynbd.block.qcow2.repair import Fix, repair
from pynbd.block.qcow2.report import Report

CLUSTER = 1 << 12
SHARED = {number * CLUSTER: Data(b"shared %d" % number) for number in range(4)}
IMAGE = Image(
    size=1 << 22,
    cluster_bits=12,
    clusters=SHARED | {n * CLUSTER: Data(b"own %d" % n) for n in (5, 6, 700)},
    snapshots=[InternalSnapshot("before", SHARED)],
    bitmaps=[Bitmap("b", granularity=4096, dirty=[(0, 65536)])],
)


class Recorded(HostFile):
    """What is written, in order; None is a flush."""

    log: list[tuple[bytes, int] | None]

    def _write_batch(self, pieces: list[tuple[Buffer, int]]) -> list[OSError | None]:
        self.log += [(bytes(data), offset) for data, offset in pieces]
        return super()._write_batch(pieces)

    def _sync(self) -> None:
        self.log.append(None)
        super()._sync()


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(2)
    yield engine
    engine.close()


def header_of(path: Path) -> Header:
    data = path.read_bytes()
    return parse(data, name=str(path), file_size=len(data))


async def examined(engine: Engine, path: Path) -> Report:
    file = HostFile.open(engine, str(path), writable=False)
    try:
        return await check(file, header_of(path))
    finally:
        file.close()


async def repaired(
    engine: Engine, path: Path, fix: Fix
) -> tuple[Report, list[tuple[bytes, int] | None]]:
    file = Recorded.open(engine, str(path), writable=True)
    assert isinstance(file, Recorded)
    file.log = []
    try:
        return await repair(file, header_of(path), fix=fix), file.log
    finally:
        file.close()


def word(path: Path, offset: int) -> int:
    (value,) = struct.unpack_from(">Q", path.read_bytes(), offset)
    return int(value)


def put(path: Path, offset: int, value: int) -> None:
    poke(path, offset, struct.pack(">Q", value))


def lose_the_block(path: Path, written: Written) -> None:
    put(path, written.header.refcount_table_offset, 0)


def lose_the_refcounts(path: Path, written: Written) -> None:
    poke(path, word(path, written.header.refcount_table_offset), bytes(CLUSTER))


def put_the_block_into_data(path: Path, written: Written) -> None:
    data = word(path, written.entry_offset(5 * CLUSTER)) & ~COPIED
    put(path, written.header.refcount_table_offset, data)


def put_the_table_into_the_header(path: Path, written: Written) -> None:
    put(path, 48, 0)


def raise_all(path: Path, written: Written) -> None:
    block = word(path, written.header.refcount_table_offset)
    poke(path, block, b"\0\3" * 64)


def flip_copied(path: Path, written: Written) -> None:
    for number in (0, 5, 700):
        at = written.entry_offset(number * CLUSTER)
        put(path, at, word(path, at) ^ COPIED)
    put(path, written.header.l1_table_offset, word(path, written.header.l1_table_offset) ^ COPIED)


def share_a_cluster(path: Path, written: Written) -> None:
    put(path, written.entry_offset(5 * CLUSTER), word(path, written.entry_offset(6 * CLUSTER)))


DAMAGES: list[Callable[[Path, Written], None]] = [
    lose_the_block,
    lose_the_refcounts,
    put_the_block_into_data,
    put_the_table_into_the_header,
    raise_all,
    flip_copied,
    share_a_cluster,
]


def too_low(report: Report) -> int:
    """Clusters that a writer would take for free, or for his own."""
    return sum("a corruption" in line or "past the end" in line for line in report.findings)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_crash_leaves_nothing_worse(
    damage: Callable[[Path, Written], None], engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    damage(path, written)
    put(path, 72, Incompatible.DIRTY | Incompatible.CORRUPT)
    before = path.read_bytes()
    found = await examined(engine, path)
    report, log = await repaired(engine, path, Fix.ALL)
    assert report.clean
    assert (await examined(engine, path)).clean
    assert header_of(path).incompatible == Incompatible.NONE
    assert report.corruptions_fixed == found.corruptions
    assert report.leaks_fixed == found.leaks
    after = path.read_bytes()

    crashed = tmp_path / "crashed.qcow2"
    image = bytearray(before)
    for step in log:
        if step is None:
            continue
        data, offset = step
        image.extend(bytes(max(offset + len(data) - len(image), 0)))
        image[offset : offset + len(data)] = data
        crashed.write_bytes(image)
        report = await examined(engine, crashed)
        assert too_low(report) <= too_low(found)
        if header_of(crashed).incompatible == Incompatible.NONE:
            assert report.clean
        report, _ = await repaired(engine, crashed, Fix.ALL)
        assert report.clean
    assert image == after


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_relied_on_is_stable_before(
    damage: Callable[[Path, Written], None], engine: Engine, tmp_path: Path
) -> None:
    """The header's fields are written between flushes; new structures go behind the old end."""
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    damage(path, written)
    put(path, 72, Incompatible.DIRTY)
    end = path.stat().st_size
    blocks = word(path, written.header.refcount_table_offset)
    tables = [word(path, written.header.l1_table_offset + n * 8) & ~COPIED for n in (0, 1)]
    _, log = await repaired(engine, path, Fix.ALL)
    assert log[-1] is None
    for number, step in enumerate(log):
        if step is None:
            continue
        offset = step[1]
        if offset < CLUSTER:
            assert log[number - 1] is None
            assert log[number + 1] is None
        elif offset < end:
            cluster = offset // CLUSTER * CLUSTER
            assert cluster in {blocks, written.header.l1_table_offset, *tables}


async def test_leaks_alone(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    raise_all(path, IMAGE.write(path))
    found = await examined(engine, path)
    assert found.leaks
    report, _ = await repaired(engine, path, Fix.LEAKS)
    assert report.clean
    assert report.leaks_fixed == found.leaks


async def test_leaks_alone_raise_nothing(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    lose_the_refcounts(path, written)
    put(path, 72, Incompatible.DIRTY)
    before = path.read_bytes()
    report, log = await repaired(engine, path, Fix.LEAKS)
    assert report.corruptions
    assert report.corruptions_fixed == 0
    assert [step for step in log if step] == []
    assert path.read_bytes() == before


async def test_nothing_to_repair(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    IMAGE.write(path)
    report, log = await repaired(engine, path, Fix.ALL)
    assert report.clean
    assert log == []


@pytest.mark.parametrize("bit", [Incompatible.DIRTY, Incompatible.CORRUPT])
async def test_a_mark_on_a_sound_image_is_taken_away(
    bit: Incompatible, engine: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "disk.qcow2"
    IMAGE.write(path)
    put(path, 72, bit)
    report, log = await repaired(engine, path, Fix.LEAKS)
    assert report.clean
    assert log == [(bytes(8), 72), None]


async def test_what_is_lost_keeps_its_cluster(engine: Engine, tmp_path: Path) -> None:
    """An entry that leads nowhere may have been the reference to what now seems to be a leak; and
    new structures stay out of its way.
    """
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    end = path.stat().st_size
    put(path, written.entry_offset(5 * CLUSTER), COPIED | end + CLUSTER)
    lose_the_block(path, written)
    report, _ = await repaired(engine, path, Fix.ALL)
    header = header_of(path)
    assert header.refcount_table_offset > end + CLUSTER
    assert report.corruptions
    assert path.read_bytes()[end : end + 2 * CLUSTER].strip(b"\0") == b""


async def test_nothing_is_put_where_a_table_goes_on(engine: Engine, tmp_path: Path) -> None:
    """An L1 table whose end is past that of the file: the file becomes no longer."""
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    poke(path, 36, (1 << 14).to_bytes(4, "big"))
    lose_the_block(path, written)
    size = path.stat().st_size
    found = await examined(engine, path)
    for _ in range(2):
        report, _ = await repaired(engine, path, Fix.ALL)
        assert report.corruptions <= found.corruptions
        assert path.stat().st_size == size


async def test_a_table_that_is_guest_data_keeps_its_flags(engine: Engine, tmp_path: Path) -> None:
    """Its cluster has two references then, so COPIED is wrong; but the guest reads it."""
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    table = word(path, written.header.l1_table_offset) & ~COPIED
    put(path, written.entry_offset(5 * CLUSTER), COPIED | table)
    guest_data = path.read_bytes()[table : table + CLUSTER]
    report, _ = await repaired(engine, path, Fix.ALL)
    assert path.read_bytes()[table : table + CLUSTER] == guest_data
    assert word(path, written.header.l1_table_offset) == table
    (finding,) = report.findings
    assert "COPIED contradicts" in finding
    assert (report.corruptions, report.leaks) == (1, 0)


async def test_no_new_place_is_named_in_a_header_that_is_a_table(
    engine: Engine, tmp_path: Path
) -> None:
    """As snapshot table, it has the L1 table of a snapshot where the refcount table is."""
    path = tmp_path / "disk.qcow2"
    written = Image(size=1 << 20, version=2, cluster_bits=12, clusters=SHARED).write(path)
    poke(path, 60, (2).to_bytes(4, "big") + bytes(8))
    lose_the_block(path, written)
    found, before = await examined(engine, path), path.read_bytes()
    for _ in range(3):
        report, _ = await repaired(engine, path, Fix.ALL)
        assert report.corruptions <= found.corruptions
        assert path.read_bytes()[:CLUSTER] == before[:CLUSTER]
        assert path.stat().st_size == len(before)


async def test_what_a_table_may_go_on_with_is_left(engine: Engine, tmp_path: Path) -> None:
    """The L1 table of a snapshot begins where an L2 table is, and ends past the end of the file:
    what is written from there on would be other entries of it.
    """
    path = tmp_path / "disk.qcow2"
    written = IMAGE.write(path)
    table = word(path, written.header.l1_table_offset) & ~COPIED
    put(path, written.header.snapshots_offset, table)
    poke(path, written.header.snapshots_offset + 8, (1 << 20).to_bytes(4, "big"))
    flip_copied(path, written)
    put(path, written.entry_offset(6 * CLUSTER), word(path, written.entry_offset(5 * CLUSTER)))
    found, before = await examined(engine, path), path.read_bytes()
    report, _ = await repaired(engine, path, Fix.ALL)
    assert path.read_bytes()[table:] == before[table:]
    assert report.corruptions <= found.corruptions
