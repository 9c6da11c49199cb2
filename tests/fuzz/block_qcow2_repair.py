"""The reference counter of `pynbd check`, and the repair, on whole images of which anything is
changed (docs/interop/qcow2.rst, "Host cluster management").

Allowed: `ImageError`, where there is nothing to be checked; the file stays as it is then. The check
changes nothing. After a repair there are no more corruptions than before, the guest reads what it
read before, and another repair changes nothing of an image that is clean by then.

COPIED flags are not counted where a table is somebody else's cluster, too. What two entries name
has a refcount of two then, which contradicts both their flags, and to clear these in a table that
is guest data is to change what the guest reads. `qemu-img check -r all` does it; a repair here
leaves them, and tells.
"""

from __future__ import annotations

import re
import struct
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

_L1_FLAG = re.compile(r"L1 table: entry (\d+), \w+: COPIED contradicts")
_L2_FLAG = re.compile(r"L1 table: L2 entry \w+ at (\w+): COPIED contradicts")

_PIECE = 512
_REACH = 64


def seeds() -> Iterable[bytes]:
    for index in range(len(disk.NAMES)):
        for number, changes in enumerate(disk.patches()):
            yield bytes([index, number % 2]) + changes
    # Its data file is forgotten, so that the L1 and the L2 table are guest data, too.
    forgotten = disk.patch(0, disk.word_at("data-file", 72), 0)
    yield bytes([disk.NAMES.index("data-file"), 0]) + forgotten


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
    if fix is Fix.ALL and after.corruptions > before.corruptions:
        assert after.corruptions - await _flags_in_shared_tables(path) <= before.corruptions
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


async def _flags_in_shared_tables(path: Path) -> int:
    """How many findings are COPIED flags in tables whose clusters have other references, too."""
    found = await disk.examined(path)
    assert found is not None
    report, references = found
    (bits,) = struct.unpack_from(">I", disk.content(path), 20)
    tables, times = references.tables.distinct()
    as_tables = dict(zip((tables >> bits).tolist(), times.tolist(), strict=True))
    shared = 0
    for line in report.findings:
        if in_l1 := _L1_FLAG.match(line):
            at = references.layers[0][0] + 8 * int(in_l1[1])
            shared += references.counts[at >> bits] > 1
        elif in_l2 := _L2_FLAG.match(line):
            cluster = int(in_l2[1], 16) >> bits
            shared += references.counts[cluster] > as_tables[cluster]
    return int(shared)


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
