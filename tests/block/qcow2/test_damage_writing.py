"""Damage that is found while an image is written (the ideas are those of QEMU's test 060).

The request fails with EIO, the corrupt bit is set on disk, the log names both places, nothing is
written any more, reading goes on; and of what else is in the file nothing was changed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop import peers
from interop.samples import qemu_io
from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import writer
from pynbd.block.qcow2.builder import Bitmap, Compressed, Data, Image, InternalSnapshot, poke
from pynbd.block.qcow2.format import COMPRESSED, COPIED, BitmapFlags
from pynbd.errors import ImageError
from tests.block.qcow2.writing import (
    MiB,
    bytes_of,
    create,
    header_of,
    writable,
    write,
    zero,
)

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

C = 65536
TABLE_SPAN = C // 8 * C  # guest bytes of one L2 table


@dataclass(frozen=True)
class Places:
    """Where the metadata of the image of these tests is, by the names that the log gives it."""

    path: Path
    by_name: dict[str, int]

    def __getitem__(self, name: str) -> int:
        return self.by_name[name]

    def number(self, offset: int, length: int = 8) -> int:
        return int.from_bytes(bytes_of(self.path)[offset : offset + length], "big")

    def poke(self, offset: int, value: int, length: int = 8) -> None:
        poke(self.path, offset, value.to_bytes(length, "big"))

    def entry(self, guest_offset: int) -> int:
        """Where the L2 entry of a guest cluster is."""
        index, within = divmod(guest_offset, TABLE_SPAN)
        return self[f"L2 table {index}"] + within // C * 8

    def free(self, offset: int) -> None:
        """Make the refcount of a cluster 0."""
        self.poke(self["refcount block 0"] + 2 * (offset // C), 0, 2)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Two L2 tables, a snapshot with one of its own, and a bitmap that does not record."""
    path = tmp_path / "x.qcow2"
    Image(
        size=2 * TABLE_SPAN,
        clusters={
            0: Data(b"a" * C),
            C: Data(b"b" * C),
            2 * C: Compressed(b"c" * 5000),
            TABLE_SPAN: Data(b"d" * C),
        },
        snapshots=[InternalSnapshot("s", {0: Data(b"old" * 10)})],
        bitmaps=[Bitmap("bits", dirty=[(0, C)], flags=BitmapFlags.NONE)],
    ).write(path)
    data = bytes_of(path)

    def number(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 8], "big") & 0x00FFFFFFFFFFFE00

    l1, table, snapshots = number(40), number(48), number(64)
    directory = data.index(b"bits") - 24
    bitmap = number(directory)
    return Places(
        path,
        {
            "header": 0,
            "L1 table": l1,
            "L2 table 0": number(l1),
            "L2 table 1": number(l1 + 8),
            "refcount table": table,
            "refcount block 0": number(table),
            "snapshot table": snapshots,
            "L1 table of snapshot '1'": number(snapshots),
            "L2 table of snapshot '1' 0": number(number(snapshots)),
            "bitmap directory": directory,
            "the table of bitmap 'bits'": bitmap,
            "bits of bitmap 'bits', part 0": number(bitmap),
        },
    )


FAR = [1 << 30, 1 << 55]  # past the end of the file
NAMES = [
    "header",
    "L1 table",
    "L2 table 0",
    "L2 table 1",
    "refcount table",
    "refcount block 0",
    "snapshot table",
    "L1 table of snapshot '1'",
    "L2 table of snapshot '1' 0",
    "bitmap directory",
    "the table of bitmap 'bits'",
    "bits of bitmap 'bits', part 0",
]

Request = Callable[[BlockNode], Awaitable[None]]


async def is_found(
    places: Places,
    caplog: pytest.LogCaptureFixture,
    request: Request,
    *told: str,
) -> None:
    """The request meets the damage, and all is as it has to be then."""
    before = bytes_of(places.path)
    async with writable(places.path) as node:
        with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="qcow2") as caught:
            await request(node)
        assert caught.value.errno == errno.EIO
        line = next(text for text in caplog.messages if "only read from now on" in text)
        assert all(what in line for what in told), line
        assert (await header_of(places.path)).incompatible & 2
        await everything_is_refused(node)
        assert bytes(await node.pread(C, 2)) == b"bb"
        await node.flush()
    after = bytearray(bytes_of(places.path))
    assert after[79] == 2
    after[79] = 0
    assert after == before
    assert "corrupt: true" in peers.run("qemu-img", "info", places.path).stdout
    with pytest.raises(ImageError, match="marked corrupt"):
        await open_image(places.path, read_only=False)


async def everything_is_refused(node: BlockNode) -> None:
    for request in (
        write(node, C, b"x"),
        write(node, 5 * C, b"x", fua=True),
        zero(node, 0, C),
        node.discard(0, C),
    ):
        with pytest.raises(OSError, match="turned read-only") as caught:
            await request
        assert caught.value.errno == errno.EROFS


def writes(offset: int) -> Request:
    return lambda node: write(node, offset, b"new")


# What an entry names is somebody else's -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[1:])
async def test_a_cluster_is_mapped_to_metadata(
    places: Places, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    places.poke(places.entry(0), places[name] | COPIED)
    await is_found(places, caplog, writes(100), "guest offset 0x0", f"{name} at {places[name]:#x}")


@pytest.mark.parametrize("name", [name for name in NAMES[1:] if name[:8] != "L2 table"])
async def test_an_l2_table_in_the_place_of_something_else(
    places: Places, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    places.poke(places["L1 table"] + 8, places[name] | COPIED)
    told = f"{name} at {places[name]:#x}"
    await is_found(places, caplog, writes(TABLE_SPAN), told, "L2 table 1 at")


async def test_one_table_for_two_entries(places: Places, caplog: pytest.LogCaptureFixture) -> None:
    places.poke(places["L1 table"] + 8, places["L2 table 0"] | COPIED)
    await is_found(places, caplog, writes(TABLE_SPAN), "L2 table 0 at", "L2 table 1 at")


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("header", "refcount block 0")]
)
async def test_a_refcount_block_in_the_place_of_something_else(
    places: Places, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    places.poke(places["refcount table"], places[name])
    told = f"{name} at {places[name]:#x}"
    await is_found(places, caplog, writes(8 * C), told, "refcount block 0 at")


async def test_the_l1_table_in_the_place_of_something_else(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not changed; nobody has asked for what else is there."""
    places.poke(places["L1 table"] + 8, 0)
    places.poke(places["refcount table"] + 8, places["L1 table"])
    await is_found(places, caplog, writes(TABLE_SPAN), "L1 table at", "refcount block 1 at")


# Metadata that nobody counts ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_metadata_whose_refcount_is_0(
    places: Places, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It looks like a hole of the file, and is not handed out."""
    places.free(places[name])
    await is_found(places, caplog, writes(8 * C), f"{name} at {places[name]:#x}", "has no refcount")


async def test_the_end_of_the_file_is_metadata(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that lies where the refcounts end."""
    data = bytes_of(places.path)
    end = -(-len(data) // C) * C
    poke(places.path, end, data[places["L2 table 1"] :][:C])
    places.poke(places["L1 table"] + 8, end | COPIED)
    places.free(places["L2 table 1"])
    full = [
        number
        for number in range(end // C)
        if not places.number(places["refcount block 0"] + 2 * number, 2)
    ]
    for number in full:  # no holes
        places.poke(places["refcount block 0"] + 2 * number, 1, 2)
    await is_found(places, caplog, writes(8 * C), f"L2 table 1 at {end:#x}", "has no refcount")


# Entries that break a rule ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["write", "zero", "discard"])
async def test_an_l2_entry_that_is_not_aligned(
    places: Places, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    places.poke(places.entry(0), places.number(places.entry(0)) + 512)
    requests: dict[str, Request] = {
        "write": writes(100),
        "zero": lambda node: zero(node, 0, C),
        "discard": lambda node: node.discard(0, C),
    }
    await is_found(places, caplog, requests[how], "guest offset 0x0", "not aligned to a cluster")


async def test_an_l1_entry_that_is_not_aligned(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    places.poke(places["L1 table"] + 8, places["L2 table 1"] + 512 | COPIED)
    await is_found(places, caplog, writes(TABLE_SPAN), "L1 entry", "not aligned to a cluster")


async def test_copied_without_an_offset_is_no_damage(places: Places) -> None:
    """The cluster reads as unallocated, and is written as such."""
    places.poke(places.entry(3 * C), COPIED)
    async with writable(places.path) as node:
        await write(node, 3 * C, b"new")
        assert bytes(await node.pread(3 * C, 5)) == b"new\0\0"
    peers.run("qemu-img", "check", places.path)


# Given back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "discard", "copied"])
@pytest.mark.parametrize("name", NAMES[1:])
async def test_metadata_that_an_entry_names_is_not_given_back(
    places: Places, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    """It is neither punched nor used again; the image is read-only then."""
    copied = 0 if how == "copied" else COPIED
    places.poke(places.entry(0), places[name] | copied)
    before = bytes_of(places.path)
    async with writable(places.path) as node:
        if how == "zero":
            await zero(node, 0, C)
        elif how == "discard":
            await node.discard(0, C)
        else:
            await write(node, 0, b"new")
        with caplog.at_level(logging.ERROR):
            await node.flush()
        assert any(f"{name} at {places[name]:#x}" in text for text in caplog.messages)
        await everything_is_refused(node)
    after = bytes_of(places.path)
    assert (await header_of(places.path)).incompatible & 2
    for other in NAMES[1:]:
        if other not in ("L2 table 0", "refcount block 0"):  # which were changed
            assert after[places[other] :][:C] == before[places[other] :][:C]
    assert after[places["L2 table 0"] + 8 :][: C - 8] == before[places["L2 table 0"] + 8 :][: C - 8]


async def test_a_compressed_cluster_in_the_place_of_metadata(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    places.poke(places.entry(2 * C), places["L1 table"] | COMPRESSED)
    async with writable(places.path) as node:
        await zero(node, 2 * C, C)
        await node.flush()
        assert any("L1 table at" in text for text in caplog.messages)
        assert bytes(await node.pread(0, 2)) == b"aa"


# Found by many, and at the end --------------------------------------------------------------------


async def test_requests_that_are_under_way_end(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that met the damage fail; it is told once."""
    places.poke(places.entry(0), places["L1 table"] | COPIED)
    async with writable(places.path) as node:
        results = await asyncio.gather(
            *(node.pwrite_batch([(number, b"x")]) for number in range(10))
        )
        codes = {error and error.errno for (error,) in results}
        assert codes <= {errno.EIO, errno.EROFS}
        assert errno.EIO in codes
    assert sum("only read from now on" in text for text in caplog.messages) == 1


async def test_a_long_write_ends_where_the_damage_is(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its earlier steps wrote is there; of the later ones there is nothing."""
    monkeypatch.setattr(writer, "CLUSTERS_PER_STEP", 2)
    places.poke(places.entry(6 * C), places["L1 table"] | COPIED)
    async with writable(places.path) as node:
        (error,) = await node.pwrite_batch([(4 * C, b"n" * 8 * C)])
        assert error is not None
        assert error.errno == errno.EIO
        assert await node.pread(4 * C, 2 * C) == b"n" * 2 * C
        assert not any(await node.pread(8 * C, 4 * C))


async def test_what_was_changed_before_is_kept(places: Places) -> None:
    """Damage that is found later takes nothing along that was done."""
    places.poke(places.entry(0), places["L1 table"] | COPIED)
    async with writable(places.path) as node:
        await write(node, 8 * C, b"before")
        with pytest.raises(OSError, match="L1 table"):
            await write(node, 0, b"x")
    async with await open_image(places.path) as node:
        assert bytes(await node.pread(8 * C, 6)) == b"before"


async def test_bits_that_share_a_cluster_get_their_own(tmp_path: Path) -> None:
    """A bitmap that records, whose bits are in a guest's cluster, as the refcount says."""
    path = tmp_path / "x.qcow2"
    bitmap = Bitmap("b", dirty=[(0, C)])
    written = Image(size=MiB, clusters={0: Data(b"a"), C: Data(b"b" * C)}, bitmaps=[bitmap]).write(
        path
    )
    data = bytes_of(path)
    extension = written.header.bitmaps
    assert extension is not None
    entry = written.entry_offset(C)
    cluster = int.from_bytes(data[entry : entry + 8], "big") & ~COPIED
    block = int.from_bytes(data[written.header.refcount_table_offset :][:8], "big")
    table = int.from_bytes(data[extension.directory_offset :][:8], "big")
    poke(path, table, cluster.to_bytes(8, "big"))
    poke(path, entry, cluster.to_bytes(8, "big"))
    poke(path, block + 2 * (cluster // C), b"\0\2")
    async with writable(path) as node:
        await write(node, 0, b"new")
    after = bytes_of(path)
    assert after[cluster : cluster + C] == b"b" * C
    assert int.from_bytes(after[table : table + 8], "big") != cluster
    assert after[block + 2 * (cluster // C) :][:2] == b"\0\1"
    async with await open_image(path) as node:
        assert [each.name for each in node.bitmaps()] == ["b"]


async def test_bits_in_the_place_of_metadata(tmp_path: Path) -> None:
    """A bitmap that records, whose bits are found to be the L1 table when they are stored."""
    path = tmp_path / "x.qcow2"
    Image(size=MiB, clusters={0: Data(b"a")}, bitmaps=[Bitmap("b", dirty=[(0, C)])]).write(path)
    data = bytes_of(path)
    directory = data.index(b"b\0\0\0\0\0\0\0", 4 * C) - 24
    table = int.from_bytes(data[directory : directory + 8], "big")
    l1 = int.from_bytes(data[40:48], "big")
    poke(path, table, l1.to_bytes(8, "big"))
    node = await open_image(path, read_only=False)
    await write(node, 0, b"new")
    with pytest.raises(OSError, match="L1 table at"):
        await node.close()
    assert (await header_of(path)).incompatible & 2
    assert bytes_of(path)[l1 : l1 + 8] == data[l1 : l1 + 8]


@pytest.mark.parametrize("table", FAR)
async def test_an_l2_table_behind_the_end_of_the_file(
    places: Places, caplog: pytest.LogCaptureFixture, table: int
) -> None:
    """It reads as empty; the file does not become as long."""
    places.poke(places["L1 table"] + 8, table | COPIED)
    await is_found(places, caplog, writes(TABLE_SPAN), f"L2 table 1 at {table:#x} is past the end")


@pytest.mark.parametrize("how", ["write", "write again", "zero"])
@pytest.mark.parametrize("far", FAR)
async def test_a_cluster_behind_the_end_of_the_file(
    places: Places, caplog: pytest.LogCaptureFixture, far: int, how: str
) -> None:
    """It reads as zeroes. Written, it would be cut off again by what is allocated next."""
    places.poke(places.entry(0), far | COPIED)

    async def request(node: BlockNode) -> None:
        if how == "write again":  # the table is in memory, and known
            await write(node, C, b"bb")
        if how == "zero":
            await zero(node, 0, C, no_hole=True)
        else:
            await write(node, 0, b"x")

    await is_found(places, caplog, request, f"at {far:#x} is past the end of the file")


async def test_neighbours_of_a_cluster_behind_the_end_of_the_file(places: Places) -> None:
    """They can be written, as they could before; what is written is there when it is closed."""
    places.poke(places.entry(C), 1 << 55 | COPIED)
    async with writable(places.path) as node:
        await write(node, 5, b"in place")
        await write(node, 8 * C, b"new")
        await write(node, 7, b"again")
    async with await open_image(places.path) as node:
        assert bytes(await node.pread(5, 8)) == b"inagaine"
        assert bytes(await node.pread(8 * C, 3)) == b"new"
        assert not any(await node.pread(C, C))


@pytest.mark.parametrize("far", FAR)
async def test_a_refcount_block_behind_the_end_of_the_file(
    places: Places, caplog: pytest.LogCaptureFixture, far: int
) -> None:
    """It would count nothing, and all clusters seem to be free."""
    places.poke(places["refcount table"], far)
    await is_found(places, caplog, writes(8 * C), f"block 0 at {far:#x} is past the end")


@pytest.mark.parametrize("left", [36, 43, 200, 500])
async def test_a_file_that_was_cut_short(tmp_path: Path, left: int) -> None:
    """Refcount blocks are missing: what is written takes nobody's place."""
    path = create(tmp_path / "x.qcow2", MiB, "cluster_size=512")
    qemu_io(path, "write -q -P 1 0 400k")
    os.truncate(path, left * 512)
    async with writable(path) as node:
        disk = bytearray(await node.pread(0, MiB))
        for offset in range(MiB // 2, MiB, 512):
            with suppress(OSError):
                await write(node, offset, b"new")
                disk[offset : offset + 3] = b"new"
        assert await node.pread(0, MiB) == disk
    async with await open_image(path) as node:
        assert await node.pread(0, MiB) == disk


@pytest.mark.parametrize("what", ["the table of bitmap 'b'", "a part of bitmap 'b'"])
@pytest.mark.parametrize("far", FAR)
async def test_a_bitmap_behind_the_end_of_the_file(tmp_path: Path, far: int, what: str) -> None:
    """It is not stored there, and does not count as true."""
    path = tmp_path / "x.qcow2"
    Image(size=MiB, clusters={0: Data(b"a")}, bitmaps=[Bitmap("b", dirty=[(0, C)])]).write(path)
    directory = bytes_of(path).index(b"b\0\0\0\0\0\0\0", 4 * C) - 24
    table = int.from_bytes(bytes_of(path)[directory : directory + 8], "big")
    poke(path, directory if what[:3] == "the" else table, far.to_bytes(8, "big"))
    node = await open_image(path, read_only=False)
    await write(node, 0, b"new")
    with pytest.raises(OSError, match=f"{what} at {far:#x} is past the end"):
        await node.close()
    assert path.stat().st_size < MiB
    async with await open_image(path) as node:
        assert node.inconsistent_bitmaps() == ("b",)
        assert bytes(await node.pread(0, 3)) == b"new"


# Found when it is opened --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "victim", ["header", "refcount table", "snapshot table", "bitmap directory"]
)
async def test_structures_in_one_place(places: Places, victim: str) -> None:
    """The header names the L1 table where something else is: the image is not opened to be
    written, and can be read.
    """
    places.poke(40, places[victim])
    before = bytes_of(places.path)
    with pytest.raises(ImageError):
        await open_image(places.path, read_only=False)
    assert bytes_of(places.path) == before


async def test_an_image_of_version_2_has_no_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    written = Image(size=MiB, version=2, clusters={0: Data(b"a")}).write(path)
    poke(
        path, written.entry_offset(0), (written.header.l1_table_offset | COPIED).to_bytes(8, "big")
    )
    before = bytes_of(path)
    async with writable(path) as node:
        with pytest.raises(OSError, match="L1 table"):
            await write(node, 0, b"x")
        with pytest.raises(OSError, match="turned read-only"):
            await write(node, C, b"x")
    assert bytes_of(path) == before


@pytest.mark.parametrize("field, what", [(40, "L1 table"), (48, "refcount table")])
@pytest.mark.parametrize("behind", [C, 1 << 57])
async def test_a_table_behind_the_end_of_the_file_is_not_written(
    places: Places, field: int, what: str, behind: int
) -> None:
    """It would make the file as long; the space belongs to nobody."""
    size = places.path.stat().st_size
    places.poke(field, -(-size // C) * C + behind)
    before = bytes_of(places.path)
    with pytest.raises(ImageError, match=f"{what} at 0x[0-9a-f]+ is past the end of the file"):
        await open_image(places.path, read_only=False)
    assert bytes_of(places.path) == before
    async with await open_image(places.path) as node:  # what is there is there
        assert node.size


@pytest.mark.parametrize("of_a_table", [True, False], ids=["L2 table", "cluster"])
async def test_the_end_of_a_reference_past_the_end_takes_nobodys_place(
    places: Places, caplog: pytest.LogCaptureFixture, of_a_table: bool
) -> None:
    """The cluster that it names may be handed out before the reference ends."""
    end = places.path.stat().st_size
    end = -(-end // C) * C
    at = places["L1 table"] + 8 if of_a_table else places.entry(TABLE_SPAN)
    places.poke(at, end + C if of_a_table else end)
    await is_found(places, caplog, writes(TABLE_SPAN), "is past the end of the file")


async def test_zeroes_end_no_reference_past_the_end(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    end = -(-places.path.stat().st_size // C) * C
    places.poke(places.entry(TABLE_SPAN), end | COPIED)
    line = f"at {end:#x} is past the end of the file"
    await is_found(places, caplog, lambda node: zero(node, TABLE_SPAN, C), line)


async def test_what_was_past_the_end_stays_so_in_a_file_that_grows(places: Places) -> None:
    """It is made longer in large steps, of which no cluster is anybody's yet."""
    end = -(-places.path.stat().st_size // C) * C
    places.poke(places.entry(TABLE_SPAN), end + 8 * C | COPIED)
    async with writable(places.path) as node:
        await write(node, 5 * C, b"new")
        assert places.path.stat().st_size > end + 9 * C
        with pytest.raises(OSError, match="is past the end of the file"):
            await write(node, TABLE_SPAN, b"new")
