"""The reference counter of `pynbd check`, and the repair, on whole images of which anything is
changed (docs/interop/qcow2.rst, "Host cluster management").

Allowed: `ImageError`, where there is nothing to be checked; the file stays as it is then. The check
changes nothing. After a repair there are no more corruptions than before, the guest reads what it
read before, and another repair changes nothing of an image that is clean by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.engine import HostFile
from pynbd.block.qcow2.image import read_header
from pynbd.block.qcow2.repair import Fix, repair
from pynbd.block.qcow2.report import Report
from pynbd.errors import ImageError
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = (ImageError,)
MAX_LEN = 2 + 8 * disk.PATCH
SMOKE = 120

_PIECE = 512
_REACH = 64


def seeds() -> Iterable[bytes]:
    for index in range(len(disk.NAMES)):
        for number, changes in enumerate(disk.patches()):
            yield bytes([index, number % 2]) + changes


def one_input(data: bytes) -> None:
    taking = Taking(data)
    name = disk.NAMES[taking.below(len(disk.NAMES))]
    fix = Fix.LEAKS if taking.flag() else Fix.ALL
    damaged = disk.patched(name, taking)
    disk.run(_repaired(disk.put(damaged), damaged, fix))


async def _repaired(path: Path, damaged: bytes, fix: Fix) -> None:
    before = await disk.check_image(path)
    read_before = await _contents(path)
    try:
        after = await _repair(path, fix)
    except ImageError:
        assert before is None
        assert disk.content(path) == damaged
        raise
    assert before is not None
    if fix is Fix.ALL:
        assert after.corruptions <= before.corruptions
    again = disk.content(path)
    now = await disk.check_image(path)
    assert now is not None
    assert (now.leaks, now.corruptions) == (after.leaks, after.corruptions)
    for piece, (one, other) in enumerate(
        zip(read_before, await _contents(path), strict=True) if read_before else ()
    ):
        assert one in (None, other), f"guest offset {piece * _PIECE:#x}"
    # Where the file was cut short, a repair that makes it longer may leave something to the next.
    later = await _repair(path, fix)
    assert fix is Fix.LEAKS or later.corruptions <= after.corruptions
    assert not after.clean or disk.content(path) == again


async def _repair(path: Path, fix: Fix) -> Report:
    with closing(
        HostFile.open(disk.engine(), str(path), writable=True, cache=Cache.UNSAFE.mode)
    ) as file:
        return await repair(file, await read_header(file), fix=fix)


async def _contents(path: Path) -> list[bytes | None]:
    """What the guest reads; nothing of an image that is refused."""
    try:
        node = await open_image(path, format="qcow2", engine=disk.engine())
    except ImageError:
        return []
    async with node:
        pieces = min(node.size // _PIECE, _REACH)
        return [await disk.read(node, piece * _PIECE, _PIECE) for piece in range(pieces)]
