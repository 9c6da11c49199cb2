"""Images whose tables are written directly: too large, or too scattered, to be made by writing.

The layout follows the qcow2 specification, "Header", "Cluster mapping", "Bitmaps extension" and
"Bitmap directory".
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from interop import peers

MAP_SIZE = 1 << 40
CLUSTER = 1 << 16
ENTRIES = CLUSTER // 8  # of one L2 table
RUN = 8  # clusters: 2**40 / (8 * 2**16) is two million extents
COPIED = 1 << 63
NOTHING = 0
FRAGMENTED_SIZE = 1 << 36
SCATTERED = 256  # host clusters that a fragmented image refers to
BITMAPS = "backup", "hourly", "daily", "weekly", "monthly", "yearly"
BITMAPS_EXTENSION = 0x23852875
HEADER_LENGTH = 100  # a header field: where the extensions begin


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
        data = end_of(file)
        first_table = data + clusters * CLUSTER
        file.seek(l1_offset)
        file.write(big_endian([first_table + i * CLUSTER | COPIED for i in range(l1_size)]))
        file.seek(data)
        file.write(random.Random(0).randbytes(clusters * CLUSTER))
        for _ in range(l1_size):
            file.write(big_endian([entry + data if entry else 0 for entry in table()]))


def build_bitmaps(path: Path, names: tuple[str, ...] = BITMAPS) -> None:
    """1 TiB of nothing with bitmaps of 64 KiB granularity, dirty and clean for eight bits by turns:
    two million extents in each.

    The bitmaps' clusters are counted by ``qemu-img check``, so that the image is sound.
    """
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(MAP_SIZE))
    for name in names:
        peers.run("qemu-img", "bitmap", "--add", "-g", str(CLUSTER), "-f", "qcow2", path, name)
    bits = b"\xff\x00" * (CLUSTER // 2)
    with path.open("r+b") as file:
        for table_offset, table_size in bitmap_tables(file):
            data = end_of(file)
            file.seek(table_offset)
            file.write(big_endian([data + i * CLUSTER for i in range(table_size)]))
            file.seek(data)
            file.write(bits * table_size)
    # 3: it did find clusters that were not counted, and mended that
    status = peers.run("qemu-img", "check", "-r", "all", "-f", "qcow2", path, check=False)
    assert "repaired" in status.stdout, status.stdout + status.stderr
    peers.run("qemu-img", "check", "-f", "qcow2", path)


def bitmap_tables(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(offset, entries) of the table of each bitmap."""
    file.seek(HEADER_LENGTH)
    (place,) = struct.unpack(">I", file.read(4))
    while True:
        file.seek(place)
        kind, length = struct.unpack(">II", file.read(8))
        if kind == BITMAPS_EXTENSION:
            break
        place += 8 + -length // 8 * -8
    count, _, size, offset = struct.unpack(">IIQQ", file.read(24))
    file.seek(offset)
    directory = file.read(size)
    place = 0
    for _ in range(count):
        table = struct.unpack_from(">QI", directory, place)
        name_size, extra_size = struct.unpack_from(">HI", directory, place + 18)
        yield table
        place += -(24 + name_size + extra_size) // 8 * -8


def end_of(file: BinaryIO) -> int:
    """The first cluster after all that there is."""
    return -file.seek(0, os.SEEK_END) // CLUSTER * -CLUSTER


def big_endian(numbers: list[int]) -> bytes:
    return struct.pack(f">{len(numbers)}Q", *numbers)
