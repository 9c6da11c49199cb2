"""Qcow2Node against qemu-img: images of qemu-img and qemu-io, and odd ones from the builder."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import (
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Subclusters,
    poke,
)
from pynbd.block.qcow2.format import CompressionType
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.errors import ImageError
from tests.block.reading import Row, contents, merged, qemu_contents, qemu_rows, rows

KiB, MiB = 1 << 10, 1 << 20


@asynccontextmanager
async def opened(path: Path, **options: str | bool) -> AsyncIterator[Qcow2Node]:
    node = await open_image(path, **options)  # type: ignore[arg-type]
    try:
        assert isinstance(node, Qcow2Node)
        yield node
    finally:
        await node.close()


@dataclass(frozen=True)
class Recipe:
    """How qemu-img makes an image, and where qemu-io writes to it."""

    name: str
    options: str = ""
    size: int = 8 * MiB
    backing: tuple[str, int] | None = None  # format and size
    compressed: bool = False
    preallocation: str = "off"


RECIPES = [
    Recipe("v2", "compat=0.10"),
    Recipe("v3"),
    Recipe("tiny-clusters", "cluster_size=512", 2 * MiB),
    Recipe("small-clusters", "cluster_size=4k,refcount_bits=1"),
    Recipe("huge-clusters", "cluster_size=2M", 40 * MiB),
    Recipe("extended", "extended_l2=on"),
    Recipe("extended-small", "extended_l2=on,cluster_size=16k"),
    Recipe("zlib", compressed=True),
    Recipe("zstd", "compression_type=zstd", compressed=True),
    Recipe("extended-zstd", "extended_l2=on,compression_type=zstd", compressed=True),
    Recipe("backing-raw", backing=("raw", 8 * MiB)),
    Recipe("backing-short", "cluster_size=4k", backing=("raw", 3 * MiB + 512)),
    Recipe("backing-long", "extended_l2=on", backing=("qcow2", 20 * MiB)),
    Recipe("data-file", "data_file={dir}/data-file.data"),
    Recipe("data-file-raw", "data_file={dir}/data-file-raw.data,data_file_raw=on"),
    Recipe("metadata", preallocation="metadata"),
    Recipe("falloc", preallocation="falloc"),
    Recipe("odd-size", size=5 * MiB + 512),
]


def make(recipe: Recipe, folder: Path) -> Path:
    """An image with data, zeroes, discards and compressed clusters at seeded random places."""
    chance = random.Random(recipe.name)
    path = folder / f"{recipe.name}.qcow2"
    options = recipe.options.format(dir=folder) or "lazy_refcounts=off"
    line = ["create", "-q", "-f", "qcow2", "-o", f"{options},preallocation={recipe.preallocation}"]
    if recipe.backing:
        kind, size = recipe.backing
        base = folder / f"{recipe.name}.base"
        peers.run("qemu-img", "create", "-q", "-f", kind, base, str(size))
        scribble(base, kind, size, chance, zeroes=False, compressed=False)
        line += ["-b", base.name, "-F", kind]
    peers.run("qemu-img", *line, path, str(recipe.size))
    zeroes = "compat=0.10" not in options
    scribble(path, "qcow2", recipe.size, chance, zeroes=zeroes, compressed=recipe.compressed)
    return path


def scribble(
    path: Path, kind: str, size: int, chance: random.Random, *, zeroes: bool, compressed: bool
) -> None:
    script = []
    if compressed:  # first, because QEMU does not compress onto what is allocated
        script = [
            f"write -c -P {index + 1} {index * 64 * KiB} {64 * KiB}\n"
            for index in chance.sample(range(size // (64 * KiB)), 40)
        ]
    for number in range(40):
        length = min(chance.choice([512, 4 * KiB, 64 * KiB, 200 * KiB]), size)
        offset = chance.randrange(0, size - length + 1) // 512 * 512
        action = chance.choice(["write -P {}", "write -P {}", "write -z", "write -z -u", "discard"])
        if zeroes or "P" in action:
            script.append(f"{action.format(number + 100)} {offset} {length}\n")
    peers.run("qemu-io", "-f", kind, path, stdin="".join(script))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    peers.require("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("images")
    made: dict[Recipe, Path] = {}

    def path(recipe: Recipe) -> Path:
        if recipe not in made:
            made[recipe] = make(recipe, folder)
        return made[recipe]

    return path


every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


@every_recipe
async def test_contents_are_those_of_qemu_img(
    recipe: Recipe, images: Callable[[Recipe], Path]
) -> None:
    path = images(recipe)
    async with opened(path) as node:
        expected = qemu_contents(path)
        assert node.size == len(expected)
        assert await contents(node) == expected
        chance = random.Random(1)
        for _ in range(50):
            offset = chance.randrange(node.size)
            length = min(chance.choice([1, 511, 5000, 300_000]), node.size - offset)
            assert await node.pread(offset, length) == expected[offset : offset + length]


@every_recipe
async def test_map_is_that_of_qemu_img(recipe: Recipe, images: Callable[[Recipe], Path]) -> None:
    path = images(recipe)
    async with opened(path) as node:
        ours, theirs = await rows(node), qemu_rows(path)
    if recipe.name == "backing-short":
        # Past its end qemu-img map says that nothing is present, where NBD's allocation depth
        # says (of the same QEMU) that the short layer decides: test_chain.py has that.
        ours, theirs = without_depth_of_zeroes(ours), without_depth_of_zeroes(theirs)
    assert ours == theirs


def without_depth_of_zeroes(found: list[Row]) -> list[Row]:
    return merged([(*row[:5], row[5] if row[3] else -1) for row in found])


def test_the_recipes_hold_what_they_promise(images: Callable[[Recipe], Path]) -> None:
    """Holes in preallocated data are seen (and were not lost on the way from qemu-img map)."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == "metadata")
    assert any(zero and data for _, _, zero, data, _, _ in qemu_rows(images(recipe)))


# Snapshots


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io")
    path = tmp_path_factory.mktemp("snapshots") / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    for number, name in enumerate(["first", "second"], 1):
        peers.run("qemu-io", path, "-c", f"write -P {number} {number * 64}k 256k")
        peers.run("qemu-img", "snapshot", "-c", name, path)
        peers.run("qemu-img", "bitmap", "--add", path, f"b{number}")
    peers.run("qemu-io", path, "-c", "write -P 9 0 1M", "-c", "write -z 2M 64k")
    return path


@pytest.mark.parametrize("wanted", ["first", "2", "snapshot.name=second", "snapshot.id=1"])
async def test_a_snapshot_reads_as_it_was(snapshots: Path, wanted: str) -> None:
    option = (
        wanted if "=" in wanted else f"snapshot.{'id' if wanted.isdigit() else 'name'}={wanted}"
    )
    async with opened(snapshots, snapshot=wanted) as node:
        assert node.read_only
        assert node.bitmaps() == ()
        assert await contents(node) == qemu_contents(snapshots, "-l", option)


async def test_an_unknown_snapshot_lists_those_there_are(snapshots: Path) -> None:
    with pytest.raises(ImageError, match=r"no snapshot 'third'.*'first' \(ID 1\), 'second'"):
        await open_image(snapshots, snapshot="third")


async def test_a_snapshot_has_the_size_the_disk_had(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    cluster = Data(b"then")
    Image(
        size=1 << 20,
        clusters={0: Data(b"now"), 65536: cluster},
        snapshots=[InternalSnapshot("s", {65536: cluster}, size=1 << 17)],
    ).write(path)
    async with opened(path, snapshot="s") as node:
        assert node.size == 1 << 17
        assert await node.pread(0, node.size) == bytes(65536) + b"then" + bytes(65532)


# Odd and damaged images


async def test_the_size_is_floored_to_sectors(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    Image(size=1_000_000).write(path)
    async with opened(path) as node:
        assert node.size == 999_936


async def test_a_damaged_stream_fails_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.qcow2"
    good = bytes(range(256)) * 256
    clusters = {0: Compressed(good), 65536: Compressed(stream=b"\xff" * 512), 131072: Data(b"x")}
    Image(size=1 << 18, clusters=clusters).write(path)
    async with opened(path) as node:
        assert await node.pread(0, 65536) == good
        assert (await node.pread(131072, 1)) == b"x"
        for _ in range(2):
            with pytest.raises(OSError, match="compressed") as caught:
                await node.pread(65530, 10)
            assert caught.value.errno == errno.EIO
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line
    assert "guest offset 0x10000" in line


@pytest.mark.parametrize("compression_type", CompressionType)
async def test_concurrent_readers_share_one_decompression(
    tmp_path: Path, compression_type: CompressionType
) -> None:
    path = tmp_path / "disk.qcow2"
    data = b"pynbd---" * 8192
    image = Image(size=1 << 18, clusters={0: Compressed(data)}, compression_type=compression_type)
    image.write(path)
    async with opened(path) as node:
        answers = await asyncio.gather(*(node.pread(at, 4096) for at in range(0, 65536, 4096)))
        assert b"".join(answers) == data
        assert node.clusters.loads == 1


async def test_compressed_data_may_reach_past_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    data = bytes(range(256)) * 256
    written = Image(size=1 << 18, clusters={0: Compressed(data)}).write(path)
    with path.open("r+b") as file:
        file.seek(written.entry_offset(0))
        entry = int.from_bytes(file.read(8), "big")
        file.seek(entry & (1 << 54) - 1)
        stream = file.read().rstrip(b"\0")
        file.truncate(file.tell() - file.tell() % 512 + len(stream))
    async with opened(path) as node:
        assert await node.pread(0, 65536) == data


async def test_a_corrupt_entry_fails_alone_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.qcow2"
    image = Image(size=1 << 20, clusters={0: Data(b"a"), 65536: Data(b"b"), 131072: Data(b"c")})
    written = image.write(path)
    with path.open("r+b") as file:
        file.seek(written.entry_offset(65536))
        entry = int.from_bytes(file.read(8), "big") | 0x200  # no longer aligned to a cluster
        file.seek(written.entry_offset(65536))
        file.write(entry.to_bytes(8, "big"))
    async with opened(path) as node:
        assert (await node.pread(0, 1), await node.pread(131072, 1)) == (b"a", b"c")
        for _ in range(2):
            with pytest.raises(OSError, match="0x10000") as caught:
                await node.pread(65536, 1)
            assert caught.value.errno == errno.EIO
            node.resolved.forget(0, node.size)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(path) in record.getMessage()
    assert "0x10000" in record.getMessage()


async def test_a_corrupt_image_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk.qcow2"
    Image(size=1 << 20, clusters={0: Data(b"a")}).write(path)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")  # incompatible features, bit 1
    async with opened(path) as node:
        assert await node.pread(0, 1) == b"a"
    assert "marked corrupt" in caplog.text


async def test_subclusters_of_every_kind(tmp_path: Path) -> None:
    peers.require("qemu-img")
    path = tmp_path / "disk.qcow2"
    data = bytes(index // 2048 + 1 for index in range(65536))
    Image(
        size=1 << 20,
        extended_l2=True,
        clusters={
            0: Subclusters(data, allocated=0x0F0F0001, zero=0xF0000010),
            65536: Subclusters(data, allocated=0xFFFFFFFF),
            131072: Subclusters(b"", allocated=0, zero=0xFFFFFFFF),
            196608: Subclusters(data, allocated=0x80000000, zero=1),
            262144: Compressed(data),
        },
    ).write(path)
    async with opened(path) as node:
        assert await contents(node) == qemu_contents(path)
        assert await rows(node) == qemu_rows(path)


@pytest.mark.parametrize(
    "options, window",
    [({}, 64 * MiB), ({"cluster_bits": 9}, MiB), ({"extended_l2": True}, 2 * MiB)],
    ids=["64 KiB", "512 B", "2 KiB"],
)
async def test_window(tmp_path: Path, options: dict[str, int], window: int) -> None:
    path = tmp_path / "disk.qcow2"
    Image(size=1 << 20, **options).write(path)  # type: ignore[arg-type]
    async with opened(path) as node:
        assert node.window == window


async def test_close_closes_every_file(images: Callable[[Recipe], Path]) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name == "data-file")
    node: BlockNode = await open_image(images(recipe))
    files = [file for layer in node.chain() for file in layer.files()]
    assert len(files) == 2
    await node.close()
    assert all(file.fd < 0 for file in files)


@pytest.mark.parametrize("kept, told", [(1.0, []), (0.5, ["L2 tables are missing"])])
async def test_a_file_that_was_cut_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: float, told: list[str]
) -> None:
    """It opens, as in QEMU; but whoever copies it had better know."""
    path = tmp_path / "disk.qcow2"
    Image(size=1 << 20, clusters={0: Data(b"x")}).write(path)
    os.truncate(path, int(path.stat().st_size * kept))
    async with await open_image(path) as node:
        await node.pread(0, 512)
    assert len(caplog.messages) == len(told)
    for message, words in zip(caplog.messages, told, strict=True):
        assert words in message


async def test_an_l1_entry_that_leads_to_no_cluster(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is missing of that file: it is damaged, which whoever reads there is told."""
    path = tmp_path / "disk.qcow2"
    written = Image(size=1 << 20, clusters={0: Data(b"x")}).write(path)
    poke(path, written.header.l1_table_offset, b"\xff" * 8)
    async with await open_image(path) as node:
        assert not caplog.messages
        with pytest.raises(OSError, match="corrupt metadata"):
            await node.pread(0, 512)


@pytest.mark.parametrize("use", ["map", "write"])
async def test_most_of_a_file_that_was_cut_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, use: str
) -> None:
    """What was lost looks like holes that somebody left; it is told all the same."""
    path = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    peers.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 8M", path)
    os.truncate(path, 1 << 20)
    async with await open_image(path, read_only=use == "map") as node:
        if use == "map":
            await node.map(0, node.size)
    assert [message for message in caplog.messages if "cut short" in message]
