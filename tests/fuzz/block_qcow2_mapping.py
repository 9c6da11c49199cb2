"""The walk through the L1 table and L2 tables to the bytes of a disk (docs/interop/qcow2.rst,
"Cluster mapping"), standard and extended, above a backing file and without.

Nothing is allowed: damage is EIO for who touches it. Each piece of the disk is mapped to, and reads
as, what the tables say, which are read here for themselves.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import EllipsisType

from pynbd.block.chain import open_image
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, UNALLOCATED, ZERO
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Cluster, Compressed, Data, Image, Subclusters, Written, Zero
from pynbd.block.qcow2.entries import Layout
from tests.fuzz import disk
from tests.fuzz.block_qcow2_l2_entries import meaning
from tests.fuzz.taking import Taking

ALLOWED = ()
MAX_LEN = 1 + 10 * 24
SMOKE = 60

_BACKING = b"".join(bytes([0x40 + at % 32]) * 512 for at in range(150))  # not all of the disk
_OFFSETS = 0x00FFFFFFFFFFFE00  # bits 9 - 55 of an entry
_TEXT = b"".join(b"%07d " % at for at in range(64))


def _images() -> Iterable[Image]:
    clusters: dict[int, Cluster] = {
        number << 9: Data(bytes([number]) * 512) for number in (0, 1, 2, 63, 64, 65, 140)
    }
    clusters |= {3 << 9: Compressed(_TEXT), 4 << 9: Compressed(_TEXT[::-1])}
    yield Image(size=160 << 9, cluster_bits=9, clusters=clusters, version=2)
    clusters |= {5 << 9: Zero(), 6 << 9: Zero(preallocated=True)}
    yield Image(size=160 << 9, cluster_bits=9, clusters=clusters)
    yield Image(
        size=(160 << 9) - 512,
        cluster_bits=9,
        clusters=clusters,
        backing_file="below.raw",
        backing_format="raw",
    )
    pieces: dict[int, Cluster] = {
        0: Subclusters(b"\x31" * 16384, 0x0F0F00FF, 0x00F00000),
        1 << 14: Subclusters(b"\x32" * 16384, 0xFFFFFFFF),
        2 << 14: Compressed(_TEXT * 32),
        4 << 14: Subclusters(b"", 0, 0xFF),
    }
    yield Image(
        size=5 << 14,
        cluster_bits=14,
        clusters=pieces,
        extended_l2=True,
        backing_file="below.raw",
        backing_format="raw",
    )


@cache
def _built() -> list[tuple[bytes, Written, bool]]:
    """Of each image its bytes, where its tables are, and whether something is below it."""
    disk.put(_BACKING, "below.raw")
    path = disk.folder() / "map.qcow2"
    found = []
    for image in _images():
        written = image.write(path)
        found.append((path.read_bytes(), written, image.backing_file is not None))
    return found


def seeds() -> Iterable[bytes]:
    for index, (image, written, _) in enumerate(_built()):
        tables = list(written.l2_tables.values())
        yield bytes([index])
        for word in (
            *(tables[-1], 512, 1 << 62 | 777, 1 << 62 | 7 << 61 - 1, len(image) & -512, 1 << 50, 1),
            *(tables[0] + 512, (0xFF << 32) | 0xFF00, 0xFFFFFFFF),
        ):
            for at in (0, 64 + 1, 64 + 5):
                yield bytes([index, at >> 6, at & 63]) + word.to_bytes(8, "big")


def one_input(data: bytes) -> None:
    taking = Taking(data)
    built, written, has_backing = _built()[taking.below(4)]
    header, image = written.header, bytearray(built)
    places = [header.l1_table_offset, *written.l2_tables.values()]
    while taking:
        place = places[taking.below(len(places))]
        at = place + taking.number(1) % 64 * 8
        image[at : at + 8] = taking.number(8).to_bytes(8, "big")
    path = disk.put(bytes(image), "map.qcow2")
    l1 = header.l1_table_offset
    disk.run(_compared(path, bytes(image), l1, header.layout, _BACKING if has_backing else b""))


async def _compared(path: Path, image: bytes, l1: int, layout: Layout, backing: bytes) -> None:
    async with await open_image(path, format="qcow2", engine=disk.engine()) as node:
        mapped = await _mapped(node)
        for piece in range(node.size // 512):
            guest = piece * 512
            kind, host = _walk(image, l1, layout, guest)
            below = backing[guest : guest + 512]
            content = _content(image, kind, host, guest, layout, below)
            if kind == UNALLOCATED:  # DATA of the backing file, ZERO behind its end
                kind, host, depth = (DATA, guest, 2) if below else (ZERO, -1, 2 if backing else 0)
            else:
                depth = 1
            told_kind, told_host, told_depth = mapped[piece]
            assert (told_kind, told_depth) == (kind, depth), hex(guest)
            assert told_host == host or kind == ZERO, hex(guest)
            if content is not Ellipsis:
                assert await disk.read(node, guest, 512) == content, hex(guest)


async def _mapped(node: BlockNode) -> list[tuple[int, int, int]]:
    """(kind, host offset, depth) of each piece."""
    found: list[tuple[int, int, int]] = []
    while len(found) * 512 < node.size:
        runs = await node.lookup(len(found) * 512, node.size - len(found) * 512)
        for start, end, kind, host, depth in runs:
            assert start == len(found) * 512 < end
            found += (
                (kind, host + at - start if kind == DATA else host, depth)
                for at in range(start, end, 512)
            )
    return found


def _word(image: bytes, offset: int) -> int:
    """What is not in the file is 0."""
    return int.from_bytes(image[offset : offset + 8].ljust(8, b"\0"), "big")


def _walk(image: bytes, l1: int, layout: Layout, guest: int) -> tuple[int, int]:
    """(kind, host offset or descriptor) of the piece at a guest offset."""
    number, inside = divmod(guest, layout.cluster_size)
    l1_index, l2_index = divmod(number, layout.l2_entries)
    table = _word(image, l1 + l1_index * 8) & _OFFSETS
    if not table:
        return UNALLOCATED, -1
    if table % layout.cluster_size:
        return CORRUPT, -1
    each = 16 if layout.extended else 8
    at = table + l2_index * each
    bitmap = _word(image, at + 8) if layout.extended else 0
    pieces = meaning(_word(image, at), bitmap, layout, guest - inside)
    part = layout.cluster_size // len(pieces)
    kind, host = pieces[inside // part]
    return kind, host + inside % part if kind == DATA else host


def _content(
    image: bytes, kind: int, host: int, guest: int, layout: Layout, below: bytes
) -> bytes | EllipsisType | None:
    """Of one piece; None for EIO, ... for what the libraries do not agree on."""
    if kind == DATA:
        return image[host : host + 512].ljust(512, b"\0")
    if kind == COMPRESSED:
        x = 62 - (layout.cluster_bits - 8)
        offset = host % (1 << x)
        stream = image[offset : (offset // 512 + 1 + (host >> x)) * 512]
        try:
            cluster = zlib.decompressobj(-15).decompress(stream, layout.cluster_size)
        except zlib.error:
            return ...
        inside = guest % layout.cluster_size
        return cluster[inside : inside + 512] if len(cluster) == layout.cluster_size else None
    if kind == CORRUPT:
        return None
    return below.ljust(512, b"\0") if kind == UNALLOCATED else bytes(512)
