"""WindowFile: an image inside of a file; nothing of what is around it is seen."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.qcow2.builder import Data, Image
from pynbd.block.window import WindowFile, check_window
from pynbd.errors import ImageError, ImageLocked, UnsupportedFeature
from tests.block.reading import contents

SIZE = 100_000


async def test_what_is_seen(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(SIZE)
    path = tmp_path / "archive"
    path.write_bytes(content)
    engine = Engine(1)
    file = WindowFile.of(HostFile.open(engine, str(path), writable=False), 1000, 5000)
    try:
        assert file.size() == 5000
        for offset, length in [(0, 5000), (4990, 100), (5000, 10), (7000, 10), (100, 1)]:
            wanted = content[1000:6000][offset : offset + length]
            assert await file.read_bytes(length, offset) == wanted
            assert await file.read_unless_hole(length, offset, sparse=False) == wanted
            now = bytearray(length)
            assert file.read_now(now, offset) in (0, len(wanted))
        assert await file.data_runs(0, 6000, 10) == [(5000, True), (1000, False)]
        assert await file.data_runs(5500, 10, 10) == [(10, False)]
        assert not file.resident(0, 4096)
        await file.will_need([(0, 5000)])
    finally:
        file.close()
        engine.close()


async def test_it_keeps_the_locks(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(bytes(4096))
    window = {"driver": "raw", "size": 512, "file.filename": str(path)}
    node = await open_image({"driver": "raw", "file": window})
    assert node.size == 512
    with pytest.raises(ImageLocked):
        await open_image(path, format="raw", read_only=False)
    await node.close()
    await (await open_image(path, format="raw", read_only=False)).close()


async def test_its_holes(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    path.write_bytes(b"x" * 65536)
    os.truncate(path, 1 << 20)
    engine = Engine(1)
    file = WindowFile.of(HostFile.open(engine, str(path), writable=False), 32768)
    try:
        assert file.size() == (1 << 20) - 32768
        assert await file.data_runs(0, file.size(), 9) == [(32768, True), (983040, False)]
        assert await file.read_unless_hole(4096, 65536, sparse=True) is None
    finally:
        file.close()
        engine.close()


@pytest.mark.parametrize(
    "offset, size, fits",
    [
        (0, None, True),
        (512, 512, True),
        (1024, None, True),
        (0, 1025, False),
        (1025, None, False),
        (-5, None, False),
    ],
)
def test_where_a_window_may_be(offset: int, size: int | None, fits: bool) -> None:
    """A file of 1000 bytes is 1024 long: whole sectors, as in QEMU."""
    if fits:
        check_window("x", 1000, offset, size)
    else:
        with pytest.raises(ImageError, match="x: it has 1024 bytes; "):
            check_window("x", 1000, offset, size)


@pytest.mark.parametrize("cache", [Cache.WRITEBACK, Cache.NONE])
async def test_an_image_in_an_archive(tmp_path: Path, cache: Cache) -> None:
    """As ovirt-imageio reads a disk of an OVA: the format on raw with offset and size."""
    disk, archive = tmp_path / "disk", tmp_path / "archive"
    Image(size=1 << 20, clusters={65536: Data(b"inside" * 5000)}).write(disk)
    image = disk.read_bytes()
    archive.write_bytes(b"h" * 1536 + image + b"t" * 999)
    options = {
        "driver": "qcow2",
        "file": {
            "driver": "raw",
            "offset": 1536,
            "size": len(image),
            "file": {"driver": "file", "filename": str(archive)},
        },
    }
    try:
        node = await open_image(options, cache=cache)
    except ImageError as error:
        if "O_DIRECT" in str(error):
            pytest.skip("no O_DIRECT here")
        raise
    alone = await open_image(disk)
    assert await contents(node) == await contents(alone)
    await alone.close()
    await node.close()


async def test_it_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    file = {"driver": "raw", "offset": 512, "file.filename": str(tmp_path / "disk")}
    with pytest.raises(UnsupportedFeature, match="not written yet"):
        await open_image({"driver": "raw", "file": file}, read_only=False)
