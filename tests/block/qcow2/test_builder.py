"""Built images in the hands of qemu-img: clean, with the contents meant, mapped as by `decode`."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interop import peers
from pynbd.block.extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from pynbd.block.qcow2 import header as headers
from pynbd.block.qcow2 import snapshots
from pynbd.block.qcow2.builder import (
    Bitmap,
    Cluster,
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Subclusters,
    Written,
    Zero,
    large_map,
    poke,
)
from pynbd.block.qcow2.entries import decode, explain, l2_table_offset
from pynbd.block.qcow2.extensions import Extension
from pynbd.block.qcow2.format import BitmapFlags, CompressionType, Incompatible
from pynbd.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """One kind of image; `image` fills it with every kind of cluster that it may have."""

    options: dict[str, Any] = field(default_factory=dict)
    clusters: int = 60
    tail: int = 512  # bytes of a last cluster that is not whole
    compressed: bool = True
    snapshots: bool = True
    bitmaps: bool = True
    backing: int | None = None  # the size of a raw backing file

    def image(self, seed: int) -> Image:
        chosen = random.Random(seed)
        bits = self.options.get("cluster_bits", 16)
        version = self.options.get("version", 3)
        size = (self.clusters << bits) + self.tail

        def cluster() -> Cluster | None:
            data = bytes([chosen.randrange(1, 256)]) * chosen.choice([1, 1 << bits])
            kinds: list[Cluster | None] = [None, Data(data), Data(data)]
            if self.compressed:
                text = b"".join(chosen.choices([b"some ", b"words "], k=(1 << bits) // 10))
                kinds += [
                    Compressed(data),
                    Compressed(text),
                    Compressed(chosen.randbytes(1 << bits)),
                ]
            if version == 3:
                kinds += [Zero(), Zero(preallocated=True)]
            if self.options.get("extended_l2"):
                allocated = chosen.getrandbits(32)
                zero = chosen.getrandbits(32) & ~allocated
                whole = data.ljust(1 << bits, b"\x11")
                kinds += [Subclusters(whole, allocated, zero), Subclusters(b"", 0, zero)]
            return chosen.choice(kinds)

        places = {at << bits: cluster() for at in range(self.clusters + bool(self.tail))}
        old = {offset: found for offset, found in places.items() if found}
        now = dict(old)
        for offset in chosen.sample(sorted(places), 10):
            found = cluster()
            now.pop(offset, None)
            if found:
                now[offset] = found
        more: dict[str, Any] = {}
        if self.snapshots:
            more["snapshots"] = [InternalSnapshot("first", old), InternalSnapshot("empty", {})]
        if self.bitmaps:
            more["bitmaps"] = [Bitmap("b0", dirty=[(0, 1)]), Bitmap("b1", 512, [(513, 2000)])]
        if self.backing is not None:
            more |= {"backing_file": "base.raw", "backing_format": "raw"}
        return Image(size=size, clusters=now, **self.options, **more)


SHARED = Data(b"shared")
ZSTD = CompressionType.ZSTD
RECIPES = {
    "default": Recipe(),
    "version 2": Recipe({"version": 2}, bitmaps=False),
    "version 2, 512 bytes": Recipe({"version": 2, "cluster_bits": 9}, 300, 0, bitmaps=False),
    "512 bytes": Recipe({"cluster_bits": 9}, 300, 0),
    "4 KiB": Recipe({"cluster_bits": 12}, 700),
    "2 MiB": Recipe({"cluster_bits": 21}, 12),
    "zstd": Recipe({"compression_type": ZSTD}),
    "zstd, 512 bytes": Recipe({"compression_type": ZSTD, "cluster_bits": 9}, 200, 0),
    **{
        f"{bits}-bit refcounts": Recipe({"refcount_bits": bits, "cluster_bits": 12})
        for bits in (2, 4, 8, 32, 64)
    },
    "1-bit refcounts": Recipe({"refcount_bits": 1, "cluster_bits": 12}, snapshots=False),
    "extended L2": Recipe({"extended_l2": True}),
    "extended L2, 16 KiB": Recipe({"extended_l2": True, "cluster_bits": 14}, 1100),
    "extended L2, zstd": Recipe({"extended_l2": True, "compression_type": ZSTD}),
    "data file": Recipe({"data_file": "data.raw"}, compressed=False, snapshots=False),
    "raw data file": Recipe(
        {"data_file": "data.raw", "raw_data_file": True}, compressed=False, snapshots=False
    ),
    "extended L2, data file": Recipe(
        {"data_file": "data.raw", "extended_l2": True}, compressed=False, snapshots=False
    ),
    "short backing file": Recipe(backing=1 << 20),
    "long backing file": Recipe(backing=8 << 20),
    "extended L2, backing file": Recipe({"extended_l2": True}, backing=2 << 20),
    "version 2, backing file": Recipe({"version": 2}, backing=2 << 20, bitmaps=False),
    "whole clusters": Recipe(tail=0),
}


def contents(image: Image, clusters: Mapping[int, Cluster], backing: bytes = b"") -> bytes:
    """What a guest reads, by the specification."""
    size = 1 << image.cluster_bits
    disk = bytearray(backing[: image.size].ljust(-(-image.size // size) * size, b"\0"))
    for offset, cluster in clusters.items():
        match cluster:
            case Data(data) | Compressed(data):
                disk[offset : offset + size] = data.ljust(size, b"\0")
            case Zero():
                disk[offset : offset + size] = bytes(size)
            case Subclusters(data, allocated, zero):
                for n in range(32):
                    part = slice(n * size // 32, (n + 1) * size // 32)
                    there = slice(offset + part.start, offset + part.stop)
                    if zero >> n & 1:
                        disk[there] = bytes(size // 32)
                    elif allocated >> n & 1:
                        disk[there] = data[part]
    return bytes(disk[: image.size])


def mapped(path: Path) -> list[dict[str, Any]]:
    """The image's map in the words of `qemu-img map`, from its tables by `decode`."""
    file = path.read_bytes()
    header = headers.parse(file, name="x", file_size=len(file))
    l1 = np.frombuffer(file, ">u8", header.l1_size, header.l1_table_offset)
    rows: list[dict[str, Any]] = []
    for index, l1_entry in enumerate(l1.tolist()):
        table = np.zeros(header.cluster_size // 8, np.uint64)
        if host_offset := l2_table_offset(l1_entry, header.layout):
            table[:] = np.frombuffer(file, ">u8", len(table), host_offset)
        entries = header.layout.l2_entries
        guest_offset = index * entries * header.cluster_size
        for start, end, kind, host, _ in decode(table, 0, entries, header.layout, guest_offset):
            row = {
                "start": start,
                "length": min(end, header.virtual_size) - start,
                "depth": 0,
                "present": kind != UNALLOCATED,
                "zero": kind in (ZERO, UNALLOCATED),
                "data": kind in (DATA, COMPRESSED),
                "compressed": kind == COMPRESSED,
            }
            if host >= 0 and kind != COMPRESSED:
                row["offset"] = host
            if row["length"] > 0:
                merge(rows, row)
    return rows


def said_by_qemu(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in json.loads(peers.run("qemu-img", "map", "--output=json", path).stdout):
        if not row["present"]:
            # QEMU shows where an unallocated subcluster could be: nothing that a guest could read.
            row.pop("offset", None)
        merge(rows, row)
    return rows


def merge(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Append as qemu-img map does: like neighbours are one, if their host offsets go on."""
    if rows:
        onward = dict(rows[-1], start=row["start"], length=row["length"])
        if "offset" in onward:
            onward["offset"] += rows[-1]["length"]
        if onward == row:
            rows[-1]["length"] += row["length"]
            return
    rows.append(row)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(image: Image) -> tuple[Path, Written]:
        return tmp_path / "x.qcow2", image.write(tmp_path / "x.qcow2")

    return written


@pytest.mark.parametrize("name", RECIPES)
def test_qemu_img_finds_it_clean_and_reads_what_was_meant(
    name: str, tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.require("qemu-img")
    monkeypatch.chdir(tmp_path)  # where qemu looks for a data file with a relative name
    recipe = RECIPES[name]
    image = recipe.image(seed=len(name))
    backing = random.Random(1).randbytes(recipe.backing or 0)
    if backing:
        (tmp_path / "base.raw").write_bytes(backing)
    path, written = write(image)
    copy = tmp_path / "copy.raw"

    assert peers.run("qemu-img", "check", path).stdout.startswith("No errors were found")
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, copy)
    assert copy.read_bytes() == contents(image, image.clusters, backing)
    if recipe.snapshots:
        peers.run("qemu-img", "convert", "-l", "first", "-f", "qcow2", "-O", "raw", path, copy)
        expected = contents(image, image.snapshots[0].clusters, backing)
        assert copy.read_bytes() == expected
    if image.raw_data_file:
        assert (tmp_path / "data.raw").read_bytes() == contents(image, image.clusters)
    if not backing:
        assert mapped(path) == said_by_qemu(path)

    data = path.read_bytes()
    header = headers.parse(data, name="x", file_size=len(data))
    assert header == replace(
        written.header,
        header_length=header.header_length,
        additional_fields=header.additional_fields,
    )
    table = snapshots.parse(data[header.snapshots_offset :], header, name="x")
    assert [found.name for found in table] == [meant.name for meant in image.snapshots]


@pytest.mark.parametrize("bits", range(9, 22))
def test_every_cluster_size(bits: int, write: Any) -> None:
    peers.require("qemu-img")
    path, _ = write(Image(size=5 << bits, cluster_bits=bits, clusters={2 << bits: Data(b"data")}))
    peers.run("qemu-img", "check", path)
    said = said_by_qemu(path)
    assert mapped(path) == said
    assert [row["start"] >> bits for row in said] == [0, 2, 3]


EXTENDED = {"extended_l2": True}
DATA_FILE = {"data_file": "data.raw"}


@pytest.mark.parametrize(
    "options, damage, readable",
    [
        ({}, {}, True),
        ({}, {0: 1 << 9}, False),  # misaligned
        ({}, {0: 1 << 56 | 1 << 61 | 1 << 8 | 1 << 1}, True),  # reserved bits
        ({}, {0: 1}, True),  # the zero flag
        ({}, {0: 1 << 9 | 1}, False),
        ({"version": 2}, {0: 1}, False),
        (EXTENDED, {0: 1}, True),
        (EXTENDED, {0: 1 << 9}, False),
        (EXTENDED, {8: 1 << 32}, False),  # subcluster 0 both allocated and zero
        (EXTENDED, {8: 1 << 63}, False),  # subcluster 31, which is not read here
        (DATA_FILE, {}, True),
        (DATA_FILE, {0: 1 << 17}, False),  # not the guest offset
        (DATA_FILE, {0: 1 << 17 | 1}, False),
        (DATA_FILE, {0: 1 << 62}, False),  # compressed
    ],
)
def test_entries_that_qemu_does_not_read_are_corrupt(
    options: dict[str, Any],
    damage: dict[int, int],
    readable: bool,
    write: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers.require("qemu-io")
    monkeypatch.chdir(tmp_path)
    path, written = write(Image(size=1 << 20, clusters={65536: Data(b"a")}, **options))
    words = [0, 0]
    for at, bits in damage.items():
        offset = written.entry_offset(65536) + at
        entry = int.from_bytes(path.read_bytes()[offset : offset + 8])
        poke(path, offset, (entry ^ bits).to_bytes(8))
    offset = written.entry_offset(65536)
    raw = path.read_bytes()[offset : offset + written.header.l2_entry_size]
    words[: len(raw) // 8] = np.frombuffer(raw, ">u8").tolist()
    done = peers.run("qemu-io", "-r", "-c", "read 64k 512", path, check=False)
    assert (done.returncode == 0) == readable, done.stdout
    assert (explain(words[0], words[1], written.header.layout, 65536) == "") == readable


def test_bitmaps_are_read_by_qemu(write: Any) -> None:
    peers.require("qemu-img", "qemu-nbd", "nbdinfo")
    in_use = BitmapFlags.IN_USE | BitmapFlags.AUTO
    # With 4 KiB clusters the bits of "fine" take 4 of them: ones, mixed, zeroes, ones at the end.
    size, quarter = 64 << 20, 16 << 20
    path, _ = write(
        Image(
            size=size,
            cluster_bits=12,
            bitmaps=[
                Bitmap("fine", 512, [(0, quarter), (quarter + 512, 1024), (3 * quarter, quarter)]),
                Bitmap("coarse", 1 << 20, [((5 << 20) - 1, 2)], BitmapFlags.NONE),
                Bitmap("broken", 65536, [], in_use),
            ],
        )
    )
    peers.run("qemu-img", "check", path)
    info = json.loads(peers.run("qemu-img", "info", "--output=json", path).stdout)
    assert info["format-specific"]["data"]["bitmaps"] == [
        {"flags": ["auto"], "name": "fine", "granularity": 512},
        {"flags": [], "name": "coarse", "granularity": 1 << 20},
        {"flags": ["in-use", "auto"], "name": "broken", "granularity": 65536},
    ]
    with peers.qemu_nbd(path, "-r", "-B", "fine", "-B", "coarse") as uri:

        def dirty(name: str) -> list[tuple[int, int]]:
            context = f"--map=qemu:dirty-bitmap:{name}"
            rows = json.loads(peers.run("nbdinfo", "--json", context, uri).stdout)
            return [(row["offset"], row["length"]) for row in rows if row["type"] == 1]

        assert dirty("fine") == [(0, quarter), (quarter + 512, 1024), (3 * quarter, quarter)]
        assert dirty("coarse") == [(4 << 20, 2 << 20)]


def test_snapshots_share_clusters(write: Any) -> None:
    peers.require("qemu-img")
    old = {0: SHARED, 65536: Data(b"own")}
    path, _ = write(
        Image(
            size=1 << 20,
            clusters={0: SHARED, 65536: Data(b"new")},
            snapshots=[InternalSnapshot("s", old, id="77", size=512 << 10)],
        )
    )
    # Header, 3 data clusters, 2 x (L1, L2), snapshot table, refcount table and block.
    assert path.stat().st_size == 11 * 65536
    info = json.loads(peers.run("qemu-img", "info", "--output=json", path).stdout)
    assert [(said["id"], said["name"]) for said in info["snapshots"]] == [("77", "s")]
    # qemu-img can drop it: the refcounts and COPIED flags were right.
    peers.run("qemu-img", "snapshot", "-d", "s", path)
    assert "2/16" in peers.run("qemu-img", "check", path).stdout


def test_names_and_features_that_only_a_later_program_knows(write: Any) -> None:
    peers.require("qemu-img")
    path, written = write(
        Image(
            size=1 << 20,
            incompatible=Incompatible(1 << 7),
            feature_names={(0, 7): "time travel"},
            extensions=[Extension(0x1234, b"unknown")],
        )
    )
    said = peers.run("qemu-img", "info", path, check=False).stderr
    assert "Unsupported qcow2 feature(s): time travel" in said
    assert written.header.extensions == (Extension(0x1234, b"unknown"),)


def test_a_large_map(tmp_path: Path) -> None:
    peers.require("qemu-img")
    path = tmp_path / "large.qcow2"
    written = large_map(path, (1 << 30) + 65536, cluster_bits=16)
    assert path.stat().st_blocks * 512 < 2 << 20
    peers.run("qemu-img", "check", path)
    said = said_by_qemu(path)
    assert len(said) == written.header.size >> 16 == 16385
    assert [row["present"] for row in said[:4]] == [True, False, True, False]
    # QEMU looks at the host file as well, and finds holes behind the clusters.
    assert [dict(row, zero=row["zero"] or row["data"]) for row in mapped(path)] == said


@pytest.mark.parametrize(
    "image, words",
    [
        (Image(size=1 << 20, clusters={1: Zero()}), "guest offset 0x1"),
        (Image(size=1 << 20, version=2, extended_l2=True), "version 2"),
        (Image(size=1 << 20, cluster_bits=9, backing_file="x" * 500), "a cluster has 512"),
        (
            Image(
                size=1 << 20,
                refcount_bits=1,
                clusters={0: SHARED},
                snapshots=[InternalSnapshot("s", {0: SHARED})],
            ),
            "refcount of 2 needs more than 1 bits",
        ),
    ],
)
def test_what_the_format_has_no_place_for(image: Image, words: str, write: Any) -> None:
    with pytest.raises(UsageError, match=words):
        write(image)
