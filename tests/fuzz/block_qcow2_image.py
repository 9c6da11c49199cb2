"""A whole image of which anything is changed (docs/interop/qcow2.rst, all of it): opened, mapped,
read, its bitmaps and snapshots too, checked, closed.

Allowed: `ImageError`, which refuses it in one line, and `UsageError` for options that are at odds
with its header. What is damaged is EIO for who asks for it. The file stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from pynbd.block.chain import open_image
from pynbd.errors import ImageError, UsageError
from tests.fuzz import disk
from tests.fuzz.taking import Taking

ALLOWED = (ImageError, UsageError)
MAX_LEN = 2 + 12 * disk.PATCH
SMOKE = 250


def seeds() -> Iterable[bytes]:
    for index in range(len(disk.NAMES)):
        for number, changes in enumerate(disk.patches()):
            yield bytes([index, number % 4]) + changes


def one_input(data: bytes) -> None:
    taking = Taking(data)
    name = disk.NAMES[taking.below(len(disk.NAMES))]
    snapshot = (None, None, "1", "2")[taking.below(4)]
    damaged = disk.patched(name, taking)
    path = disk.put(damaged)
    try:
        disk.run(_looked_at(path, snapshot))
    finally:
        disk.run(disk.check_image(path)) if damaged[:4] == b"QFI\xfb" else None
        assert path.read_bytes() == damaged


async def _looked_at(path: disk.Path, snapshot: str | None) -> None:
    node = await open_image(path, format="qcow2", engine=disk.engine(), snapshot=snapshot)
    async with node:
        await disk.explore(node)
        for bitmap in node.bitmaps() if node.size else ():
            try:
                await bitmap.load()
                runs = await bitmap.runs(0, node.size, 100)
            except OSError as error:
                disk.check_errno(error)
            else:
                assert 0 < runs.end <= node.size
                assert 0 <= bitmap.dirty_bytes() <= node.size
