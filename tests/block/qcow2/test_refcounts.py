"""Refcounts: what is allocated, found again, counted and given back; both judges agree each time.

docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.qcow2 import refcounts
from pynbd.block.qcow2.builder import Compressed, Data, Image, InternalSnapshot, poke
from pynbd.block.qcow2.format import COPIED
from pynbd.errors import CorruptImage
from tests.block.devices import loop_device
from tests.block.qcow2.images import compressed
from tests.block.qcow2.writing import (
    KiB,
    MiB,
    allocated,
    bytes_of,
    create,
    header_of,
    report_on,
    sound,
    watched,
    writable,
    write,
    zero,
)
from tests.block.reading import contents, qemu_contents

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

WIDTHS = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("bits", WIDTHS)
async def test_growth_and_holes_with_every_width(tmp_path: Path, bits: int) -> None:
    """Small clusters: many blocks, and the table grows; half is given back, and used again."""
    path = create(tmp_path / "x.qcow2", 2 * MiB, f"cluster_size=512,refcount_bits={bits}")
    rng = random.Random(bits)
    disk = bytearray(2 * MiB)
    before = await header_of(path)
    async with writable(path) as node:
        for offset in range(0, len(disk), 64 * KiB):
            disk[offset : offset + 64 * KiB] = data = rng.randbytes(64 * KiB)
            await write(node, offset, data)
        await node.flush()
        for offset in range(0, len(disk), 2 * KiB):
            disk[offset : offset + KiB] = bytes(KiB)
            await zero(node, offset, KiB)
        await node.flush()
        end = node.metadata_file.size()
        for offset in range(0, len(disk), 4 * KiB):
            disk[offset : offset + KiB] = data = rng.randbytes(KiB)
            await write(node, offset, data)
        assert node.metadata_file.size() == end  # there were holes enough
    after = await header_of(path)
    if bits == 64:  # 4096 clusters and more, 64 of them counted by a block: 64 and more blocks
        assert after.refcount_table_clusters > before.refcount_table_clusters
        assert after.refcount_table_offset != before.refcount_table_offset
    await sound(path)
    assert qemu_contents(path) == disk


async def test_several_growths_without_a_commit_between(tmp_path: Path) -> None:
    """One batch needs more than a table's worth of blocks; nothing is flushed before the end."""
    path = create(tmp_path / "x.qcow2", 8 * MiB, "cluster_size=512,refcount_bits=64")
    data = random.Random(1).randbytes(8 * MiB)
    with watched() as host:
        async with writable(path) as node:
            for at in range(0, len(data), 512 * KiB):
                await write(node, at, data[at : at + 512 * KiB])
            assert host.count("sync") == 0
    await sound(path)
    assert qemu_contents(path) == data


async def test_the_place_of_the_old_table_is_used_again(tmp_path: Path) -> None:
    """A table of one cluster of 512 bytes has 64 blocks of 64 clusters: 2 MiB of the file."""
    path = create(tmp_path / "x.qcow2", 4 * MiB, "cluster_size=512,refcount_bits=64")
    before = (await header_of(path)).refcount_table_offset
    async with writable(path) as node:
        await write(node, 0, b"a" * 2 * MiB)
        await node.flush()
        await write(node, 2 * MiB, b"b" * 512 * KiB)
    await sound(path)
    assert (await header_of(path)).refcount_table_offset != before
    assert any(bytes_of(path)[before : before + 512])


async def test_a_hole_is_found_in_the_middle_of_the_file(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    async with writable(path) as node:
        await write(node, 0, b"a" * 2 * MiB)
    async with writable(path) as node:
        await zero(node, MiB, 256 * KiB)
    size = len(bytes_of(path))
    async with writable(path) as node:
        await write(node, 4 * MiB, b"b" * 256 * KiB)
    assert len(bytes_of(path)) == size
    await sound(path)


async def test_nothing_is_handed_out_twice(tmp_path: Path) -> None:
    """Overwritten, given back and written again, with commits here and there."""
    path = create(tmp_path / "x.qcow2", MiB, "cluster_size=4k,refcount_bits=1")
    rng = random.Random(7)
    disk = bytearray(MiB)
    async with writable(path) as node:
        for number in range(400):
            offset = rng.randrange(0, MiB, 4 * KiB)
            length = min(rng.choice([4, 8, 64]) * KiB, MiB - offset)
            if rng.random() < 0.4:
                disk[offset : offset + length] = bytes(length)
                await zero(node, offset, length)
            else:
                disk[offset : offset + length] = data = rng.randbytes(length)
                await write(node, offset, data)
            if number % 7 == 0:
                await node.flush()
        assert await contents(node) == disk
    await sound(path)
    assert qemu_contents(path) == disk


# Given back ---------------------------------------------------------------------------------------


async def test_clusters_that_a_snapshot_shares_keep_its_reference(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    shared = {number << 16: Data(bytes([number + 1]) * 65536) for number in range(8)}
    Image(size=MiB, clusters=shared, snapshots=[InternalSnapshot("s", shared)]).write(path)
    before = qemu_contents(path, "-l", "s")
    async with writable(path) as node:
        await write(node, 65536, b"new" * 100)
        await zero(node, 2 << 16, 2 << 16)
        await node.flush()
        await write(node, 2 << 16, b"again")
    await sound(path)
    assert qemu_contents(path, "-l", "s") == before


@pytest.mark.parametrize("bits", [8, 16])
async def test_compressed_clusters_that_share_a_host_cluster(tmp_path: Path, bits: int) -> None:
    """All but the last reference fall first, then the last one: the cluster is free only then."""
    path = tmp_path / "x.qcow2"
    packed = {number << 16: Compressed(bytes([number + 1]) * 9000) for number in range(8)}
    Image(size=MiB, clusters=packed, refcount_bits=bits).write(path)
    async with writable(path) as node:
        for number in range(7):
            await zero(node, number << 16, 1 << 16)
        await node.flush()
        assert bytes(await node.pread(7 << 16, 4)) == b"\x08" * 4
        await zero(node, 7 << 16, 1 << 16)
        await node.flush()
        end = node.metadata_file.size()
        await write(node, 8 << 16, b"x" * 65536)
        assert node.metadata_file.size() == end
    await sound(path)


async def test_what_is_given_back_is_a_hole_of_the_host_file(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 16 * MiB)
    async with writable(path) as node:
        await write(node, 0, b"a" * 8 * MiB)
        await node.flush()
        full = allocated(path)
        await node.discard(0, 8 * MiB)
        await node.flush()
        assert full - allocated(path) >= 8 * MiB
    await sound(path)


@pytest.mark.parametrize("discard", [False, True])
async def test_a_cluster_that_is_in_use_has_a_refcount(tmp_path: Path, discard: bool) -> None:
    """A refcount of 0 where the last reference goes: the image is not changed any more."""
    path = tmp_path / "x.qcow2"
    written = Image(size=MiB, clusters={0: Data(b"a" * 65536), 65536: Data(b"b")}).write(path)
    entry = written.entry_offset(0)
    host = int.from_bytes(bytes_of(path)[entry : entry + 8], "big") & ~COPIED
    header = written.header
    table = bytes_of(path)[header.refcount_table_offset :][:8]
    block = int.from_bytes(table, "big")
    poke(path, block + 2 * (host >> 16), b"\0\0")
    async with writable(path) as node:
        if discard:
            await node.discard(0, 65536)
        else:
            await zero(node, 0, 65536)
        await node.flush()
        with pytest.raises(OSError, match="turned read-only") as caught:
            await write(node, 65536, b"more")
        assert caught.value.errno == errno.EROFS
    assert "corrupt: true" in peers.run("qemu-img", "info", path).stdout


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, fits", [(700_000, True), ((1 << 20) - 64, True), (1 << 20, False)]
)
async def test_the_refcount_table_has_a_longest_length(
    tmp_path: Path, entries: int, fits: bool
) -> None:
    """8 MiB; up to there it grows, in whatever steps. The host file is sparse."""
    path = tmp_path / "x.qcow2"
    written = Image(size=MiB, cluster_bits=12, refcount_bits=64).write(path)
    header = written.header
    size = 4096
    clusters = entries * 8 // size
    # A longer table behind everything, whose last block counts itself in its last entry.
    table = 1 << 24
    last = (entries * 512 - 1) * size
    values = np.zeros(clusters * size // 8, ">u8")
    values[0] = int.from_bytes(bytes_of(path)[header.refcount_table_offset :][:8], "big")
    values[-1] = last
    poke(path, table, values.tobytes())
    poke(path, last, bytes(4096 - 8) + (1).to_bytes(8, "big"))
    poke(path, 48, table.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
    async with writable(path) as node:
        parts = node._writer._refcounts  # type: ignore[union-attr]
        parts._searched = parts._end  # as if there were no holes below
        (error,) = await node.pwrite_batch([(0, b"x" * 4096)])
    if fits:
        assert error is None
        assert (await header_of(path)).refcount_table_clusters > clusters
    else:
        assert error is not None
        assert error.errno == errno.ENOSPC
        assert (await header_of(path)).refcount_table_clusters == clusters


async def test_no_cluster_is_beyond_what_an_entry_can_name(tmp_path: Path) -> None:
    """Bits 9 to 55 of an L2 entry are the host offset."""
    path = create(tmp_path / "x.qcow2", 16 * MiB, "cluster_size=2M,refcount_bits=1")
    async with writable(path) as node:
        parts = node._writer._refcounts  # type: ignore[union-attr]
        end, parts._end = parts._end, (1 << 56 - 21) - 1
        parts._searched = parts._end
        (error,) = await node.pwrite_batch([(0, b"x")])
        assert error is not None
        assert error.errno == errno.ENOSPC
        parts._end = end
        await write(node, 0, b"x")
    await sound(path)


async def test_the_end_of_a_device(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 8 * MiB)
    with path.open("r+b") as file:
        file.truncate(2 * MiB)
    with loop_device(path) as device:
        async with writable(Path(device)) as node:
            results = [
                (await node.pwrite_batch([(at, b"x" * 65536)]))[0]
                for at in range(0, 4 * MiB, 65536)
            ]
            codes = [error and error.errno for error in results]
            full = codes.index(errno.ENOSPC)
            assert set(codes[:full]) == {None}
            assert set(codes[full:]) == {errno.ENOSPC}
            assert full >= 24  # of 32 clusters, less the metadata
            await zero(node, 0, 65536)
            await node.flush()
            await write(node, 3 * MiB, b"y" * 65536)  # there is room again
            assert bytes(await node.pread(65536, 3)) == b"xxx"
        peers.run("qemu-img", "check", "-f", "qcow2", device)


# Damage -------------------------------------------------------------------------------------------


def table_of(path: Path, offset: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.frombuffer(bytes_of(path)[offset : offset + 512], ">u8").astype(np.uint64)


async def test_a_block_that_is_not_at_a_cluster(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    header = Image(size=MiB).write(path).header
    poke(path, header.refcount_table_offset, (0x20200).to_bytes(8, "big"))
    with pytest.raises(CorruptImage, match="refcount block 0 is at 0x20200") as error:
        await open_image(path, read_only=False)
    assert str(error.value).endswith("(pynbd check tells more; -r reads it)")


async def test_two_blocks_in_one_place(tmp_path: Path) -> None:
    """A block that is named twice counts one of its ranges wrongly: nothing is allocated there."""
    path = tmp_path / "x.qcow2"
    Image(size=MiB, cluster_bits=9, clusters={0: Data(b"a" * 512)}).write(path)
    header = await header_of(path)
    first = int(table_of(path, header.refcount_table_offset)[0])
    poke(path, header.refcount_table_offset + 8, first.to_bytes(8, "big"))
    before = bytes_of(path)
    async with writable(path) as node:
        (error,) = await node.pwrite_batch([(65536, b"x" * 512)])
        assert error is not None
        assert error.errno == errno.EIO
        assert "refcount block 0" in str(error)
        assert "refcount block 1" in str(error)
    after = bytearray(bytes_of(path))
    assert after[79] == 2
    after[79] = 0
    assert after == before


# The length of the file ---------------------------------------------------------------------------


async def test_the_file_becomes_longer_in_steps_and_is_cut_in_the_end(tmp_path: Path) -> None:
    path = create(tmp_path / "x.qcow2", 64 * MiB)
    with watched() as host:
        async with writable(path) as node:
            for at in range(0, 8 * MiB, 65536):
                await write(node, at, b"x" * 65536)
            assert 1 <= host.count("resize") <= 8
    report = await report_on(path)
    assert len(bytes_of(path)) == report.image_end_offset
    await sound(path)


async def test_compressed_clusters_that_share_a_host_cluster_end_together(tmp_path: Path) -> None:
    """The last of its references end in one commit: it is punched all the same."""
    path = compressed(tmp_path)
    async with writable(path) as node:
        before = allocated(path)
        await node.discard(0, MiB)
        await node.flush()
        assert before - allocated(path) >= 16 * 20000
    await sound(path)


async def test_more_references_end_than_a_cluster_has(tmp_path: Path) -> None:
    """Two entries name one cluster, which counts one: it is neither punched nor used again."""
    path = tmp_path / "x.qcow2"
    Image(size=MiB, clusters={0: Data(b"a" * 65536), 65536: Data(b"b" * 65536)}).write(path)
    data = bytes_of(path)
    l1 = int.from_bytes(data[40:48], "big")
    table = int.from_bytes(data[l1 : l1 + 8], "big") & ~COPIED
    poke(path, table + 8, data[table : table + 8])
    host_offset = int.from_bytes(data[table : table + 8], "big") & ~COPIED
    async with writable(path) as node:
        await node.discard(0, 2 * 65536)
        await node.flush()
        with pytest.raises(OSError, match="turned read-only"):
            await write(node, 0, b"x")
    assert bytes_of(path)[host_offset : host_offset + 65536] == b"a" * 65536
    assert (await header_of(path)).incompatible & 2


async def test_the_search_for_holes_goes_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of refcounts of one bit may speak of 2^24 clusters."""
    monkeypatch.setattr(refcounts, "_CLUSTERS_PER_STEP", 4)
    path = create(tmp_path / "x.qcow2", MiB, "cluster_size=4k")
    async with writable(path) as node:
        await write(node, 0, b"a" * MiB)
        await node.flush()
        for offset in range(0, MiB, 8192):
            await node.discard(offset, 4096)
    async with writable(path) as node:
        end = node.metadata_file.size()
        for offset in range(0, MiB, 8192):
            await write(node, offset, b"b" * 4096)
        assert node.metadata_file.size() == end
    await sound(path)
    assert qemu_contents(path) == (b"b" * 4096 + b"a" * 4096) * 128


async def test_the_end_is_looked_for_in_so_many_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of 2^20 entries may name blocks without anything in them. What is free before those
    that are looked through is found as holes.
    """
    monkeypatch.setattr(refcounts, "_BLOCKS_AT_OPEN", 2)
    path = create(tmp_path / "x.qcow2", 4 * MiB, "cluster_size=512,refcount_bits=64")
    async with writable(path) as node:
        await write(node, 0, b"a" * MiB)
        await node.flush()
        await node.discard(64 * KiB, MiB - 64 * KiB)
    size = path.stat().st_size
    async with writable(path) as node:
        for offset in range(MiB, MiB + MiB // 2, 4 * KiB):
            await write(node, offset, b"b" * 4 * KiB)
    assert path.stat().st_size < size + 64 * KiB
    await sound(path)
    expected = b"a" * 64 * KiB + bytes(MiB - 64 * KiB) + b"b" * (MiB // 2)
    assert qemu_contents(path) == expected.ljust(4 * MiB, b"\0")
