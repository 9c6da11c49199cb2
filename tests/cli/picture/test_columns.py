"""What lies in the columns of a picture: against the maps of qemu-img, and against loops."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from interop import peers, samples
from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Cluster, Data, Image, Zero
from pynbd.cli.picture.columns import (
    COLUMNS,
    MAX_LAYERS,
    Columns,
    Content,
    DiskPicture,
    picture_of,
)

CLUSTER = 1 << 16
EMPTY = [0] * len(Content)


async def looked_at(path: Path | str) -> DiskPicture:
    node = await open_image(path)
    try:
        return await picture_of(node, node.bitmaps())
    finally:
        await node.close()


def summed(size: int, classes: int, rows: Sequence[tuple[int, int, int]]) -> list[list[int]]:
    """Bytes of each class in each column, from rows of (offset, length, class), by arithmetic."""
    count = min(size, COLUMNS)
    sums = [[0] * count for _ in range(classes)]
    for offset, length, kind in rows:
        for column in range(count):
            start, end = size * column // count, size * (column + 1) // count
            sums[kind][column] += max(min(end, offset + length) - max(start, offset), 0)
    return sums


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(0, 2)), min_size=1, max_size=20),
    st.integers(1, 20),
)
def test_runs_are_added_to_their_columns(runs: list[tuple[int, int]], cut: int) -> None:
    """In one answer or in two."""
    ends = np.cumsum([length for length, _ in runs])
    classes = np.array([kind for _, kind in runs], np.intp)
    size = int(ends[-1])
    columns = Columns(size, 3)
    first = min(cut, len(runs))
    columns.add(0, ends[:first], classes[:first])
    if first < len(runs):
        columns.add(int(ends[first - 1]), ends[first:], classes[first:])
    rows = [
        (int(end) - length, length, kind)
        for end, (length, kind) in zip(ends.tolist(), runs, strict=True)
    ]
    assert columns.sums.tolist() == summed(size, 3, rows)


def test_sums_are_exact_on_the_largest_disk() -> None:
    size = (1 << 63) - 1
    columns = Columns(size, 2)
    columns.add(0, np.array([size - 1, size]), np.array([0, 1]))
    assert columns.sums[1].sum() == 1
    assert columns.sums[1, -1] == 1
    assert int(columns.sums[0].sum()) == size - 1


def content(row: dict[str, bool]) -> Content:
    """What a row of ``qemu-img map`` says about a layer by itself."""
    if not row["present"]:
        return Content.UNALLOCATED
    if row["zero"]:
        return Content.ZERO
    return Content.COMPRESSED if row["compressed"] else Content.DATA


async def test_a_chain_is_what_qemu_img_says(tmp_path: Path) -> None:
    top = samples.chain(tmp_path)
    picture = await looked_at(top)
    size = picture.size
    assert [Path(layer.name).name for layer in picture.layers] == [
        "top.qcow2",
        "middle.qcow2",
        "base.raw",
    ]

    rows = json.loads(peers.run("qemu-img", "map", "--output=json", top).stdout)
    assert not all(row["present"] for row in rows)  # past the end of the base
    for depth, layer in enumerate(picture.layers):
        read = [
            (row["start"], row["length"], content(row))
            for row in rows
            if depth == (row["depth"] if row["present"] else 2)
        ]
        assert layer.read.tolist() == summed(size, len(Content), read)

    for layer in picture.layers:
        options = {"driver": layer.format, "file": {"driver": "file", "filename": layer.name}}
        if layer.format == "qcow2":
            options["backing"] = None  # type: ignore[assignment]
        name = f"json:{json.dumps(options)}"
        rows = json.loads(peers.run("qemu-img", "map", "--output=json", name).stdout)
        own = [(row["start"], row["length"], content(row)) for row in rows]
        assert layer.held.tolist() == summed(size, len(Content), own)
        assert layer.file_size == samples.allocated(Path(layer.name))


async def test_bitmaps_are_what_was_written(tmp_path: Path) -> None:
    """The writes of `samples.chain`, rounded to the granularity."""
    picture = await looked_at(samples.chain(tmp_path))
    kib = 1 << 10
    end = (8 << 20) + 32 * kib
    written = {
        ("b0", 4 * kib): [(100, 12), (2048, 64), (5120, 200), (end // kib - 4, 4)],
        ("b1", 64 * kib): [(64, 64), (8192, 32)],
    }
    for bitmap in picture.bitmaps:
        dirty = written.pop((bitmap.name, bitmap.granularity))
        rows = [(start * kib, length * kib, 1) for start, length in dirty]
        assert bitmap.columns[1].tolist() == summed(end, 2, rows)[1]
        assert int(bitmap.columns.sum()) == end
    assert not written


async def test_the_lower_layers_of_a_long_chain_are_one(tmp_path: Path) -> None:
    """Each layer writes the cluster of its number; all but the base zero cluster 20."""
    layers = MAX_LAYERS + 3
    for number in range(layers):
        clusters: dict[int, Cluster] = {number * CLUSTER: Data(b"x" * CLUSTER)}
        if number:
            clusters[20 * CLUSTER] = Zero()
        Image(
            size=32 * CLUSTER,
            clusters=clusters,
            backing_file=f"{number - 1}.qcow2" if number else None,
            backing_format="qcow2" if number else None,
        ).write(tmp_path / f"{number}.qcow2")
    picture = await looked_at(tmp_path / f"{layers - 1}.qcow2")
    assert [layer.count for layer in picture.layers] == [1] * (MAX_LAYERS - 1) + [4]
    sums = [layer.held.sum(axis=1) // CLUSTER for layer in picture.layers]
    alone = EMPTY.copy()
    alone[Content.DATA], alone[Content.ZERO], alone[Content.UNALLOCATED] = 1, 1, 30
    assert [row.tolist() for row in sums[:-1]] == [alone] * (MAX_LAYERS - 1)
    together = EMPTY.copy()
    together[Content.DATA], together[Content.ZERO], together[Content.UNALLOCATED] = 4, 1, 27
    assert sums[-1].tolist() == together
    # The top one hides the zeroes of all others, and nobody holds what is left.
    read = [layer.read.sum(axis=1) // CLUSTER for layer in picture.layers]
    assert [row[Content.DATA] for row in read] == [1] * (MAX_LAYERS - 1) + [4]
    assert [row[Content.ZERO] for row in read] == [1] + [0] * (MAX_LAYERS - 1)
    nobody = 32 - layers - 1
    assert [row[Content.UNALLOCATED] for row in read] == [0] * (MAX_LAYERS - 1) + [nobody]
    files = [samples.allocated(tmp_path / f"{number}.qcow2") for number in range(layers)]
    assert picture.layers[-1].file_size == sum(files[:4])


async def test_damage_is_seen(tmp_path: Path) -> None:
    """An L2 entry whose host offset is not at a cluster is damaged ("L2 table entry")."""
    path = tmp_path / "damaged.qcow2"
    Image(size=4 * CLUSTER, clusters={0: Data(b"x" * CLUSTER)}).write(path)
    with path.open("r+b") as file:
        file.seek(40)  # l1_table_offset
        (l1_table,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_table)
        (l1_entry,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_entry & 0x00FFFFFFFFFFFE00)
        file.write(struct.pack(">Q", 1 << 63 | 0x200))
    picture = await looked_at(path)
    expected = EMPTY.copy()
    expected[Content.CORRUPT], expected[Content.UNALLOCATED] = CLUSTER, 3 * CLUSTER
    assert picture.layers[0].held.sum(axis=1).tolist() == expected
    assert picture.layers[0].read.sum(axis=1).tolist() == expected


async def test_an_empty_disk_has_no_columns(tmp_path: Path) -> None:
    samples.empty_file(tmp_path / "empty.raw", 0)
    picture = await looked_at(tmp_path / "empty.raw")
    (layer,) = picture.layers
    assert layer.held.shape == layer.read.shape == (len(Content), 0)


async def test_a_slice_has_the_picture_of_its_image(tmp_path: Path) -> None:
    path = samples.chain(tmp_path)
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    options = {"driver": "raw", "offset": 1 << 20, "file": image}
    whole, part = await looked_at(path), await looked_at(f"json:{json.dumps(options)}")
    assert (part.size, part.title) == (whole.size, whole.title)
    for one, other in zip(whole.layers, part.layers, strict=True):
        assert (one.read == other.read).all()
