"""DamageLog: news only, and not without end. And images that are damaged at random."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from pynbd.block.chain import open_image
from pynbd.block.qcow2.builder import Bitmap, Compressed, Data, Image, InternalSnapshot, Zero
from pynbd.block.qcow2.damage import MAX_PLACES, DamageLog
from pynbd.errors import ImageError
from tests.block.reading import contents


def test_a_place_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    damage = DamageLog("disk.qcow2")
    for _ in range(3):
        damage.tell(0x10000, lambda: "it is damaged")
    assert [record.getMessage() for record in caplog.records] == [
        "disk.qcow2: guest offset 0x10000: it is damaged"
    ]


def test_the_log_is_not_filled(caplog: pytest.LogCaptureFixture) -> None:
    damage = DamageLog("disk.qcow2")
    for place in range(10 * MAX_PLACES):
        damage.tell(place, lambda: "damaged")
    assert len(caplog.records) == MAX_PLACES + 1


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "disk"
    Image(
        size=1 << 20,
        cluster_bits=9,
        clusters={
            0: Data(b"a" * 512),
            512: Compressed(bytes(range(16)) * 32),
            1536: Zero(),
            4096: Zero(preallocated=True),
            65536: Data(b"z"),
        },
        snapshots=[InternalSnapshot("s", {0: Data(b"s")})],
        bitmaps=[Bitmap("b", 512, [(0, 700)])],
    ).write(path)
    return path.read_bytes()


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize("seed", range(100))
async def test_random_damage(tmp_path: Path, sound: bytes, seed: int) -> None:
    """It is refused in one line, or it is EIO, or it does not matter; never anything else."""
    chance = random.Random(seed)
    data = bytearray(sound)
    for _ in range(chance.choice([1, 1, 2, 5])):
        # Half of it in the header, half at the beginning of a cluster, where tables have entries.
        within = chance.randrange(64)
        place = chance.choice([chance.randrange(256), chance.randrange(len(data) // 512) * 512])
        data[min(place + within, len(data) - 1)] ^= 1 << chance.randrange(8)
    path = tmp_path / "disk"
    path.write_bytes(data)
    refusal, failure = "", 0
    try:
        node = await open_image(path, format="qcow2")
    except ImageError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"{path}: ")
        assert "\n" not in refusal
        return
    try:
        if node.size > 64 << 20:
            await node.pread(node.size - 4096, 4096)
        else:
            await contents(node)
    except OSError as error:
        failure = error.errno or -1
    assert failure in (0, errno.EIO)
    at = 0
    for _ in range(100):
        at = (await node.map(at, node.size - at)).end
        if at == node.size:
            break
    for bitmap in node.bitmaps():
        assert (await bitmap.runs(0, node.size, 1000)).offset == 0
    await node.close()
