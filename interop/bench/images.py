"""What is read: images built once into the cache folder, and warmed into the page cache.

The layout of the map image follows the qcow2 specification, "Header" and "Cluster mapping".
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

from interop import peers

FOLDER = peers.CACHE / "bench"
SIZE = 1 << 30
MAP_SIZE = 1 << 40
CLUSTER = 1 << 16
ENTRIES = CLUSTER // 8  # of one L2 table
RUN = 8  # clusters: 2**40 / (8 * 2**16) is two million extents
COPIED = 1 << 63
NOTHING = 0
FRAGMENTED_SIZE = 1 << 36
SCATTERED = 256  # host clusters that a fragmented image refers to


def build_raw(path: Path) -> None:
    """1 GiB of bytes that no layer can take for zeroes."""
    block = random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(block)


def build_qcow2(path: Path) -> None:
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw(), path, timeout=300)


def build_map(path: Path) -> None:
    """1 TiB, eight clusters of data and eight unallocated by turns: two million extents."""
    run = [number * CLUSTER | COPIED for number in range(RUN)] + [NOTHING] * RUN
    build_tables(path, MAP_SIZE, RUN, lambda: run * (ENTRIES // len(run)))


def build_fragmented(path: Path) -> None:
    """64 GiB whose clusters lie in no order at all."""
    chance = random.Random(0)
    places = [number * CLUSTER | COPIED for number in range(SCATTERED)]
    build_tables(path, FRAGMENTED_SIZE, SCATTERED, lambda: chance.choices(places, k=ENTRIES))


def build_tables(path: Path, size: int, clusters: int, table: Callable[[], list[int]]) -> None:
    """An image with ``clusters`` host clusters of data, which all its L2 entries name.

    ``table`` gives the entries of each L2 table in turn, with offsets from the first of these
    clusters. They are not counted: the image is only read, and so it stays small.
    """
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    with path.open("r+b") as file:
        _, l1_size, l1_offset = struct.unpack(">IIQ", file.read(48)[32:])
        data = -file.seek(0, os.SEEK_END) // CLUSTER * -CLUSTER
        first_table = data + clusters * CLUSTER
        file.seek(l1_offset)
        file.write(big_endian([first_table + i * CLUSTER | COPIED for i in range(l1_size)]))
        file.seek(data)
        file.write(random.Random(0).randbytes(clusters * CLUSTER))
        for _ in range(l1_size):
            file.write(big_endian([entry + data if entry else 0 for entry in table()]))


def big_endian(numbers: list[int]) -> bytes:
    return struct.pack(f">{len(numbers)}Q", *numbers)


def built(name: str, build: Callable[[Path], None]) -> Path:
    """The image of this name, built if it is not there yet, with its bytes in the page cache."""
    path = FOLDER / name
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        build(unfinished)
        unfinished.rename(path)
    with path.open("rb") as file:
        while file.read(1 << 22):
            pass
    return path


def raw() -> Path:
    return built("data.raw", build_raw)


def qcow2() -> Path:
    return built("data.qcow2", build_qcow2)


def fragmented() -> Path:
    return built("fragmented.qcow2", build_fragmented)


def tebibyte() -> Path:
    return built("map.qcow2", build_map)
