"""Images that claim as much as the format allows: they are opened, or refused in one line, within a
bound of memory.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from interop.hostile_images import IMAGES
from pynbd.block.chain import open_image
from pynbd.block.limits import Backlog, Budget, ChainMemory, ImageLimits
from pynbd.block.qcow2.builder import Compressed, Image
from pynbd.errors import ImageError, UsageError
from pynbd.server.limits import Limits

MIB = 1 << 20
# What a process may have in memory that has such an image open, besides what it truly needs: the
# interpreter and its libraries, and what is made of the metadata.
MOST = 256 * MIB
# Refused, if it is read, and if it is written; others are opened.
REFUSED = {
    "L1 tables of 32 MiB in 200 layers": ("its L1 table would need", "its L1 table would need"),
    "65535 bitmaps with long names": ("its bitmap directory", "its bitmap directory"),
    "65535 bitmaps with short names": ("", "overlap"),
    "a bitmap of ones": ("bitmap 'b' would need", "bitmap 'b' would need"),
    "subclusters that are all invalid": ("", "refcount block 262143"),
    "a disk of 2^63 - 512 bytes": ("l1_size is 4194304", "l1_size is 4194304"),
}
# An untrusted image that is to be written is checked, and these are refused then: they are trusted.
# The largest in memory: what is done then is one line of the log, or an error.
OPEN = """
import asyncio, sys
from pynbd.block.chain import open_image
from pynbd.errors import ImageError, UsageError
from pynbd.server.limits import Limits

async def main(path, read_only):
    try:
        node = await open_image(path, format="qcow2", read_only=read_only, untrusted=read_only)
    except ImageError as error:
        print(error)
        return
    async with node:
        for offset in (0, node.size // 2):
            try:
                await node.pread(offset, min(65536, node.size - offset))
            except OSError as error:
                print("EIO", error, file=sys.stderr)

asyncio.run(main(sys.argv[1], sys.argv[2] == "True"))
with open("/proc/self/status") as status:
    (peak,) = (line for line in status if line.startswith("VmHWM:"))
print(int(peak.split()[1]) << 10)
"""


@pytest.mark.parametrize("read_only", [True, False], ids=["read", "written"])
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_claims_very_much(tmp_path: Path, name: str, read_only: bool) -> None:
    path = IMAGES[name](tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, path, str(read_only)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    *refused, peak = done.stdout.splitlines()
    said = REFUSED.get(name, ("", ""))[not read_only]
    assert len(refused) == bool(said), done.stdout
    assert said in "".join(refused)
    assert "Traceback" not in done.stderr
    needed = path.stat().st_blocks * 512  # what is in the file, and not only claimed
    assert int(peak) < MOST + needed, f"{int(peak) >> 20} MiB"


@pytest.mark.parametrize("given", [-1, math.nan, None, "12m", 1.5, True])
@pytest.mark.parametrize("field", ["layers", "runs"])
def test_what_is_no_limit(field: str, given: Any) -> None:
    least = int(field == "layers")
    with pytest.raises(UsageError) as error:
        ImageLimits(**{field: given})
    wanted = f"{least} or more is expected, not {given!r} (a whole number)"
    assert str(error.value) == f"ImageLimits.{field}: {wanted}"


def test_a_chain_has_a_layer() -> None:
    with pytest.raises(UsageError, match=r"layers: 1 or more is expected, not 0"):
        ImageLimits(layers=0)


@pytest.mark.parametrize("given", [Limits(), 12, {"layers": 3}], ids=repr)
async def test_limits_of_something_else(tmp_path: Path, given: Any) -> None:
    with pytest.raises(UsageError, match=r"^limits: pynbd.ImageLimits is expected, not \w+$"):
        await open_image(tmp_path / "none", limits=given)


def test_one_byte_is_allowed() -> None:
    memory = ChainMemory(ImageLimits(metadata=1, bitmap_bits=1))
    memory.take(1, "L1 table", "disk")
    with pytest.raises(ImageError, match="need 1 byte of memory beside 1 for others; 1 is allowed"):
        memory.take(1, "L1 table", "disk")
    with pytest.raises(ImageError, match=r"need 8 bytes of memory; 1 is allowed \(--bitmap-memory"):
        memory.check_bits(8, "bitmap 'b'", "disk")


def test_the_account_of_a_chain() -> None:
    memory = ChainMemory(ImageLimits(metadata=100))
    memory.take(60, "L1 table", "top")
    with pytest.raises(ImageError, match=r"^below: its L1 table would need 41 bytes .* beside 60"):
        memory.take(41, "L1 table", "below")
    memory.take(40, "L1 table", "below")


class Shelf(list[int]):
    """Keeps weights."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def drop_oldest(self) -> int:
        return self.pop(0)


def test_who_has_kept_nothing_new_for_longest_drops_first() -> None:
    budget, one, other = Budget(10), Shelf(), Shelf()
    for shelf, weight in ((one, 4), (other, 3), (one, 3), (other, 4)):
        shelf.append(weight)
        budget.keep(shelf, weight)
    assert (list(one), list(other), budget.used) == ([3], [3, 4], 10)
    other.append(20)
    budget.keep(other, 20)
    assert (list(one), list(other), budget.used) == ([], [20], 20)
    one.append(1)
    budget.keep(one, 1)
    assert (list(one), list(other), budget.used) == ([1], [], 1)


def test_who_waits_for_room_has_his_turn() -> None:
    backlog = Backlog(2)
    turns: list[str] = []

    class Reader:
        def __init__(self, name: str, pieces: int) -> None:
            self.name, self.pieces = name, pieces

        def read_more(self) -> None:
            while self.pieces and backlog.held < backlog.limit:
                self.pieces -= 1
                backlog.held += 1
                turns.append(self.name)
            if self.pieces:
                backlog.waiting[self] = None

    for reader in (Reader("a", 6), Reader("b", 2)):
        reader.read_more()
    while backlog.waiting:
        backlog.held -= 1
        backlog.go_on()
    assert sorted(turns) == list("aaaaaabb")
    assert turns.index("b") < 5


async def test_caches_of_no_bytes(tmp_path: Path) -> None:
    """One thing at a time is kept in any case; everything can be read and written."""
    size, path = 16 << 16, tmp_path / "disk.qcow2"
    compressed = {n << 16: Compressed(bytes([n]) * 5000) for n in range(8)}
    Image(size=size, clusters=compressed).write(path)
    none = ImageLimits(tables=0, clusters=0, runs=0, bitmaps=0, changed_tables=0)
    async with asyncio.timeout(30), await open_image(path, read_only=False, limits=none) as node:
        assert not any(await node.pwrite_batch([(n << 16, b"new") for n in range(6, 10)]))
        disk = bytes(await node.pread(0, size))
    assert [disk[n << 16 : (n << 16) + 4] for n in (5, 7, 9)] == [b"\5" * 4, b"new\7", b"new\0"]
