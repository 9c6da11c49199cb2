"""A whole image of which anything is changed, refcounts of several widths among it, opened for
writing: clusters are written, allocated, zeroed, given back (docs/interop/qcow2.rst, "Host cluster
management", "Cluster mapping").

Allowed: `ImageError`, which refuses it; what is damaged is EIO for who touches it. A damaged image
is not damaged further: what was readable, and nobody wrote to, reads as before if its cluster was
counted, and nobody else's; an image without corruptions has none afterwards, and what was written
to it is there.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.format import Incompatible
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.block.qcow2.references import References
from pynbd.errors import ImageError
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = (ImageError,)
_MOST_REQUESTS = 8
_REQUEST = 4  # bytes
MAX_LEN = 2 + _MOST_REQUESTS * _REQUEST + 8 * disk.PATCH
SMOKE = 120

_PIECE = 512
_REACH = 64  # pieces of the disk that are written to and looked at

Pieces = list[bytes | None]


def seeds() -> Iterable[bytes]:
    requests = bytes([0, 1, 1, 3, 0, 20, 3, 7, 1, 40, 2, 0, 2, 4, 2, 0, 3, 9, 1, 0])
    for index in range(len(disk.NAMES)):
        for changes in disk.patches():
            yield bytes([index, 5]) + requests + changes


def one_input(data: bytes) -> None:
    taking = Taking(data)
    name = disk.NAMES[taking.below(len(disk.NAMES))]
    count = taking.below(_MOST_REQUESTS + 1)
    requests = [taking.bytes(_REQUEST).ljust(_REQUEST, b"\0") for _ in range(count)]
    damaged = disk.patched(name, taking)
    path = disk.put(damaged)
    disk.run(_changed(path, damaged, requests))


async def _changed(path: Path, damaged: bytes, requests: list[bytes]) -> None:
    node = await open_image(path, format="qcow2", engine=disk.engine())
    async with node:
        assert isinstance(node, Qcow2Node)
        dirty = Incompatible.DIRTY in node.header.incompatible
        pieces = min(node.size // _PIECE, _REACH)
        before = await _read(node, pieces)
        hosts = await _hosts(node, pieces)
    found = await disk.examined(path)
    try:
        node = await open_image(
            path, format="qcow2", read_only=False, engine=disk.engine(), cache=Cache.UNSAFE
        )
    except ImageError:
        assert dirty or disk.content(path) == damaged
        raise
    expected = list(before)
    try:
        for number, request in enumerate(requests):
            await _one_request(node, request, number, expected)
    finally:
        try:
            await node.close()
        except OSError as error:
            disk.check_errno(error)
    async with await open_image(path, format="qcow2", engine=disk.engine()) as node:
        after = await _read(node, pieces)
    if found is None or dirty:
        return
    report, references = found
    for piece in range(pieces):
        untouched = expected[piece] is before[piece]
        sound = not report.corruptions if not untouched else _is_alone(references, hosts[piece])
        if sound and expected[piece] is not None:
            assert after[piece] == expected[piece], f"guest offset {piece * _PIECE:#x}"
    if not report.corruptions:
        now = await disk.examined(path)
        assert now is not None
        assert now[0].corruptions == 0, now[0].findings


async def _one_request(node: BlockNode, request: bytes, number: int, expected: Pieces) -> None:
    """Change the disk; ``expected``: what its pieces read as, None for what nobody knows."""
    kind, first, count, _ = request
    first, count = first % _REACH, count % 16 + 1
    count = min(count, len(expected) - first)
    if count <= 0:
        return
    offset, length = first * _PIECE, count * _PIECE
    told: bytes | None = bytes(_PIECE)
    try:
        match kind % 6:
            case 0 | 1:
                told = bytes([0xA0 + number]) * _PIECE
                (failure,) = await node.pwrite_batch([(offset, told * count)])
                if failure:
                    raise failure
            case 2:
                await node.write_zeroes(offset, length, may_unmap=False, fast=False)
            case 3:
                await node.write_zeroes(offset, length, may_unmap=True, fast=False)
            case 4:
                told = None  # what it reads as is open
                await node.discard(offset, length)
            case _:
                await node.flush()
                return
    except OSError as error:
        if error.errno != errno.EROFS:  # damage was found before
            disk.check_errno(error)
        told = None
    expected[first : first + count] = [told] * count


async def _read(node: BlockNode, pieces: int) -> Pieces:
    return [await disk.read(node, piece * _PIECE, _PIECE) for piece in range(pieces)]


async def _hosts(node: Qcow2Node, pieces: int) -> list[int | None]:
    """The host cluster of each piece that has one of its own; None for the others."""
    found: list[int | None] = []
    for piece in range(pieces):
        (extent,) = await node.resolve(piece * _PIECE, (piece + 1) * _PIECE)
        plain = extent.file is node.metadata_file
        found.append(extent.host >> node.header.cluster_bits if plain else None)
    return found


def _is_alone(references: References, cluster: int | None) -> bool:
    """Whether a cluster has one reference, and a refcount that says so."""
    if cluster is None or cluster >= references.clusters:
        return False
    return bool(references.counts[cluster] == 1 and references.recorded.counts[cluster] >= 1)
