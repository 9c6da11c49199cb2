"""Tracking: what enabled bitmaps record, when they are in use, and when they are stored.

docs/interop/qcow2.rst, "Bitmaps". The oracle is QEMU: qemu-io makes the same requests on an image
that is alike, and qemu-nbd and nbdinfo say what is dirty in each.
"""

from __future__ import annotations

import asyncio
import errno
import json
import random
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from interop.samples import qemu_io
from pynbd.block.chain import open_image
from pynbd.block.limits import ImageLimits
from pynbd.block.qcow2.builder import Bitmap, Image, poke
from pynbd.block.qcow2.format import BitmapFlags
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.errors import ImageError
from tests.block.qcow2.writing import (
    Call,
    KiB,
    MiB,
    bytes_of,
    create,
    report_on,
    sound,
    watched,
    writable,
    write,
    zero,
)
from tests.block.reading import contents, qemu_contents

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

C = 65536
GRANULARITIES = ["512", "4k", "64k", "1M"]


def with_bitmaps(path: Path, size: int = 4 * MiB + 512, options: str = "") -> Path:
    """One bitmap of each granularity, and one that does not record."""
    create(path, size, options)
    qemu_io(path, "write -q -P 1 0 2M")
    for granularity in GRANULARITIES:
        peers.run("qemu-img", "bitmap", "--add", "-g", granularity, path, f"b{granularity}")
    peers.run("qemu-img", "bitmap", "--add", "--disable", path, "off")
    return path


def dirty(path: Path, *names: str) -> dict[str, Any]:
    """What qemu-nbd says that each bitmap has, as nbdinfo tells it."""
    options = [f"--bitmap={name}" for name in names]
    with peers.qemu_nbd(path, "-r", "-f", "qcow2", *options) as uri:
        return {
            name: json.loads(
                peers.run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", uri).stdout
            )
            for name in names
        }


def flags(path: Path) -> dict[str, set[str]]:
    """The flags of each bitmap, as qemu-img tells them."""
    told = json.loads(peers.run("qemu-img", "info", "--output=json", "-U", path).stdout)
    bitmaps = told["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: set(bitmap["flags"]) for bitmap in bitmaps}


async def test_what_is_recorded_is_what_qemu_records(tmp_path: Path) -> None:
    """Writes, zeroes and discards, aligned or not, in place or not."""
    ours = with_bitmaps(tmp_path / "ours.qcow2")
    theirs = tmp_path / "theirs.qcow2"
    shutil.copyfile(ours, theirs)
    size = 4 * MiB + 512
    rng = random.Random(4)
    commands = []
    async with writable(ours) as node:
        for number in range(24):
            length = rng.choice([1, 512, 4097, 65536, 200_000])
            offset = size - length if number == 5 else rng.randrange(0, size - length)
            match number % 4:
                case 0 | 1:
                    await write(node, offset, b"x" * length)
                    commands.append(f"write -q {offset} {length}")
                case 2:
                    await zero(node, offset, length)
                    commands.append(f"write -q -z -u {offset} {length}")
                case 3:
                    offset, length = offset // C * C, max(length // C, 1) * C
                    await node.discard(offset, length)
                    commands.append(f"discard -q {offset} {length}")
    qemu_io(theirs, *commands)
    await sound(ours)
    names = [f"b{granularity}" for granularity in GRANULARITIES] + ["off"]
    assert dirty(ours, *names) == dirty(theirs, *names)
    assert flags(ours) == flags(theirs)


async def test_in_use_is_on_disk_before_the_first_change(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "x.qcow2")
    with watched() as host:
        async with writable(path) as node:
            assert not any("in-use" in each for each in flags(path).values())
            await write(node, 0, b"x")
            names = [call.name for call in host.calls]
            assert names[:3] == ["write", "sync", "write"]
            assert all(length == 4 for _, length in host.calls[0].ranges)  # flags
            assert len(host.calls[0].ranges) == len(GRANULARITIES)
            there = flags(path)
            assert all(("in-use" in there[name]) == (name != "off") for name in there)
            await node.flush()
            assert "in-use" in flags(path)["b64k"]
    assert not any("in-use" in each for each in flags(path).values())
    await sound(path)


@pytest.mark.parametrize("how", ["zero", "discard"])
async def test_whatever_comes_first(tmp_path: Path, how: str) -> None:
    path = with_bitmaps(tmp_path / "x.qcow2")
    async with writable(path) as node:
        await (zero(node, 0, C) if how == "zero" else node.discard(0, C))
        assert "in-use" in flags(path)["b512"]
    await sound(path)


async def test_the_first_change_waits_for_the_mark(tmp_path: Path) -> None:
    """All of those that come at the same time."""
    path = with_bitmaps(tmp_path / "x.qcow2")
    with watched() as host:
        async with writable(path) as node:
            gate = host.gate(lambda call: call.name == "sync")
            tasks = [asyncio.create_task(write(node, at * C, b"x")) for at in range(4)]
            await gate.reached()
            await asyncio.sleep(0.01)
            assert host.count("write") == 1
            gate.opened.set()
            await asyncio.gather(*tasks)
    await sound(path)


async def test_stored_in_the_order_of_the_rules(tmp_path: Path) -> None:
    """The bits, a barrier, the table that names new ones, a barrier, the end of the mark."""
    path = with_bitmaps(tmp_path / "x.qcow2")
    with watched() as host:
        async with writable(path) as node:
            await write(node, 3 * MiB, b"x" * C)
            await node.flush()
            host.calls.clear()
        calls = list(host.calls)
    last = max(
        index for index, call in enumerate(calls) if [size for _, size in call.ranges] == [4] * 4
    )
    assert [call.name for call in calls[last - 1 :] if call.name != "resize"][:3] == [
        "sync",
        "write",
        "sync",
    ]
    bits = [
        index for index, call in enumerate(calls) if (call.name, len(call.ranges)) == ("write", 1)
    ]
    assert bits
    assert bits[0] < last
    between = [call.name for call in calls[:last]]
    assert between.count("sync") >= 2
    await sound(path)


async def test_stored_bits_are_read_again(tmp_path: Path) -> None:
    """Opened several times; what was dirty stays dirty."""
    path = with_bitmaps(tmp_path / "x.qcow2", 256 * MiB)
    for number in range(3):
        async with writable(path) as node:
            await write(node, number * 100 * MiB, b"x" * 512)
    for row in dirty(path, "b512")["b512"]:
        expected = row["offset"] in (0, 100 * MiB, 200 * MiB)
        assert bool(row["type"]) == expected
    await sound(path)


async def test_a_bitmap_that_becomes_large(tmp_path: Path) -> None:
    """Many clusters of bits; those that have none are given no cluster."""
    path = create(tmp_path / "x.qcow2", 256 * MiB, "cluster_size=4k")
    peers.run("qemu-img", "bitmap", "--add", "-g", "512", path, "b")
    async with writable(path) as node:
        for offset in range(0, 256 * MiB, 32 * MiB):
            await write(node, offset, b"x" * 512)
        await node.discard(128 * MiB, 64 * MiB)
    told = dirty(path, "b")["b"]
    assert sum(row["length"] for row in told if row["type"]) == 6 * 512 + 64 * MiB
    await sound(path)


async def test_bits_that_are_all_ones(tmp_path: Path) -> None:
    """A table entry that says so has no cluster; it gets one, or stays dirty."""
    path = tmp_path / "x.qcow2"
    Image(size=MiB, bitmaps=[Bitmap("b", C, dirty=[(0, MiB)])]).write(path)
    async with writable(path) as node:
        await write(node, 0, b"x")
    (row,) = dirty(path, "b")["b"]
    assert (row["length"], bool(row["type"])) == (MiB, True)
    await sound(path)


# What is left alone -------------------------------------------------------------------------------


async def test_bitmaps_that_do_not_record_are_left_as_they_are(tmp_path: Path) -> None:
    """Disabled ones, and those that were in use already."""
    path = tmp_path / "x.qcow2"
    Image(
        size=MiB,
        bitmaps=[
            Bitmap("off", C, dirty=[(C, C)], flags=BitmapFlags.NONE),
            Bitmap("lost", C, dirty=[(0, C)], flags=BitmapFlags.AUTO | BitmapFlags.IN_USE),
        ],
    ).write(path)
    before = flags(path)
    with watched() as host:
        async with writable(path) as node:
            await write(node, 5 * C, b"x")
            assert host.count("write") == 1  # no mark
            assert host.count("sync") == 0
    assert flags(path) == before
    assert before["lost"] == {"auto", "in-use"}
    rows = dirty(path, "off")["off"]
    assert [row["offset"] for row in rows if row["type"]] == [C]
    await sound(path)


# Failures -----------------------------------------------------------------------------------------


async def test_no_change_without_the_mark(tmp_path: Path) -> None:
    path = with_bitmaps(tmp_path / "x.qcow2")
    before = qemu_contents(path)
    with watched() as host:
        async with writable(path) as node:
            host.fail(0, errno.EIO, "write")
            (error,) = await node.pwrite_batch([(0, b"x")])
            assert error is not None
            assert error.errno == errno.EIO
            assert bytes(await contents(node)) == before
            await write(node, 0, b"x")
    assert dirty(path, "b512")["b512"][0]["length"] == 512
    await sound(path)


async def test_bits_that_cannot_be_stored(tmp_path: Path) -> None:
    """The bitmaps stay in use, which says that they are out of date; everything else is kept."""
    path = with_bitmaps(tmp_path / "x.qcow2")
    with watched() as host:
        node = await open_image(path, read_only=False)
        await write(node, 3 * MiB, b"kept" * KiB)
        writes = [0]

        def trouble(call: Call) -> int:  # the first thing that is written at the end are bits
            if call.name == "write":
                writes[0] += 1
                return errno.ENOSPC if writes[0] == 1 else 0
            return 0

        host.trouble = trouble
        with pytest.raises(OSError, match="No space left"):
            await node.close()
    there = flags(path)
    assert all(("in-use" in there[name]) == (name != "off") for name in there)
    assert qemu_contents(path)[3 * MiB :][: 4 * KiB] == b"kept" * KiB
    report = await report_on(path)
    assert (report.corruptions, report.check_errors) == (0, 0)
    async with writable(path) as again:
        assert isinstance(again, Qcow2Node)
        assert set(again.inconsistent_bitmaps()) == {f"b{one}" for one in GRANULARITIES}


async def test_a_crash_leaves_them_in_use(tmp_path: Path) -> None:
    path, copy = with_bitmaps(tmp_path / "x.qcow2"), tmp_path / "copy.qcow2"
    async with writable(path) as node:
        await write(node, 0, b"x", fua=True)
        put(copy, bytes_of(path))
    assert "in-use" in flags(copy)["b512"]
    async with writable(copy) as node:
        await write(node, C, b"y")
    assert "in-use" in flags(copy)["b512"]
    await sound(copy)


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def test_more_bits_than_may_be_in_memory(tmp_path: Path) -> None:
    """Nothing is written to the image, which can be read."""
    path = with_bitmaps(tmp_path / "x.qcow2")
    before = bytes_of(path)
    async with await open_image(path) as node:
        sizes = [bitmap.size // bitmap.granularity // 8 for bitmap in node.bitmaps()]
        most = ImageLimits(bitmap_bits=max(sizes) + 8)
    told = (
        rf"that record .* need .* bytes of memory; {most.bitmap_bits} are allowed \(--bitmap-memory"
    )
    with pytest.raises(ImageError, match=told):
        await open_image(path, read_only=False, limits=most)
    assert bytes_of(path) == before
    async with await open_image(path, limits=most) as node:
        assert node.bitmaps()


async def test_huge_tables_of_bitmaps_that_cannot_be_used(tmp_path: Path) -> None:
    """Of each 2^20 entries, past the end of the file; nobody needs them, or keeps them."""
    path, count = tmp_path / "x.qcow2", 64
    names = [f"b{number:05}" for number in range(count)]
    bitmaps = [Bitmap(name, dirty=[], flags=BitmapFlags.IN_USE) for name in names]
    Image(size=MiB, cluster_bits=9, bitmaps=bitmaps).write(path)
    directory = bytes_of(path).index(names[0].encode()) - 24
    for number in range(count):
        table = struct.pack(">QI", (1 << 50) + (number << 34), 1 << 20)
        poke(path, directory + 32 * number, table)
    tracemalloc.start()
    try:
        async with writable(path) as node:
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 64 * MiB
            await write(node, 0, b"x")
    finally:
        tracemalloc.stop()
