"""Where a rebuild of the refcounts finds room. That the result is right is in test_repair.py and,
by qemu-img check, in interop/test_check_*.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.builder import Data, Image, poke
from pynbd.block.qcow2.check import check, examine
from pynbd.block.qcow2.image import read_header
from pynbd.block.qcow2.rebuild import TrueRefcounts

CLUSTER = 512


@pytest_asyncio.fixture
async def file(tmp_path: Path) -> AsyncIterator[HostFile]:
    """An image of 900 clusters of 512 bytes, in refcount blocks of 256."""
    path = tmp_path / "disk.qcow2"
    clusters = {at * CLUSTER: Data(b"x") for at in range(850)}
    Image(size=1 << 20, cluster_bits=9, clusters=clusters).write(path)
    engine = Engine(1)
    file = HostFile.open(engine, str(path), writable=True)
    yield file
    file.close()
    engine.close()


async def test_nothing_to_place(file: HostFile) -> None:
    header = await read_header(file)
    _, references = await examine(file, header)
    assert not TrueRefcounts(file, header, references).have_no_place()


@pytest.mark.parametrize("lost", [[0], [1], [3], [0, 1, 2, 3]])
async def test_new_structures_are_behind_the_end(file: HostFile, lost: list[int]) -> None:
    """A block for each that was lost, and a table; where they need a block more, that too."""
    header = await read_header(file)
    for index in lost:
        poke(file.path, header.refcount_table_offset + index * 8, bytes(8))
    end = file.size()
    _, references = await examine(file, header)
    refcounts = TrueRefcounts(file, header, references)
    assert refcounts.have_no_place()
    rebuilt = await refcounts.rebuild()
    assert rebuilt == await read_header(file)
    assert rebuilt.refcount_table_offset == end
    assert file.size() == end + (1 + len(lost)) * CLUSTER
    assert (await check(file, rebuilt)).clean


async def test_a_rebuild_may_be_done_again(file: HostFile) -> None:
    """What was the table is free then; the blocks stay where they are."""
    header = await read_header(file)
    _, references = await examine(file, header)
    first = await TrueRefcounts(file, header, references).rebuild()
    end = file.size()
    report, references = await examine(file, first)
    assert report.clean
    second = await TrueRefcounts(file, first, references).rebuild()
    assert second.refcount_table_offset == end
    assert (await check(file, second)).clean
