"""Files that begin anew: made, locked, emptied, given their space, removed again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.engine import Engine
from pynbd.block.file import open_host_file
from pynbd.block.new_file import Preallocation, empty, make_file, new_file, preallocate, remove_made
from pynbd.block.qcow2.mending import write_all
from pynbd.errors import ImageError, ImageLocked
from tests.block.devices import loop_device
from tests.block.test_engine import largest_file

M = 1 << 20


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def test_what_fails_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch()
    for path in new, old:
        with pytest.raises(KeyboardInterrupt), new_file(engine, str(path)):
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [old]


def test_what_others_put_in_its_place_stays(tmp_path: Path) -> None:
    new = tmp_path / "new"
    made = make_file(str(new))
    assert made is not None
    new.rename(tmp_path / "moved")
    remove_made(str(new), made)
    new.touch()
    remove_made(str(new), made)
    assert new.exists()


def test_what_cannot_be_made(engine: Engine, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for path, said in (
        (link, "it is a symbolic link that leads nowhere"),
        (tmp_path / "no" / "where", "it cannot be made: No such file or directory"),
        ("\0", "it cannot be the name of a file"),
    ):
        with pytest.raises(ImageError, match=said):
            make_file(str(path))


def test_others(engine: Engine, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    make_file(path)
    file = open_host_file(engine, path, writable=False)
    with pytest.raises(ImageLocked, match=r"another process uses it$"), new_file(engine, path):
        pass
    file.close()
    assert os.path.exists(path)


async def test_a_size_that_it_cannot_have(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    with new_file(engine, str(path)) as file, largest_file(M):
        with pytest.raises(ImageError, match=f"it cannot have {2 * M} bytes: File too large"):
            await empty(file, 2 * M)
        assert path.read_bytes() == b"precious"
        await empty(file, M)
    assert path.read_bytes() == bytes(M)
    assert path.stat().st_blocks == 0


async def test_no_space_is_told_with_the_name(engine: Engine, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    with new_file(engine, path) as file, largest_file(M):
        for write in (file.write(b"x", M), write_all(file, [(b"x", M)])):
            with pytest.raises(OSError, match="File too large") as raised:
                await write
            assert raised.value.filename == path


@pytest.mark.parametrize("how", Preallocation)
async def test_space(how: Preallocation, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = M + 1234
    with new_file(engine, str(path)) as file:
        await empty(file, size)
        await preallocate(file, size, how)
        await file.flush()
    assert path.read_bytes() == bytes(size)
    allocated = how in (Preallocation.FALLOC, Preallocation.FULL)
    assert (path.stat().st_blocks * 512 >= size) is allocated


async def test_a_device(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"\xa5" * 2 * M)
    with loop_device(path) as device, new_file(engine, device) as file:
        with pytest.raises(ImageError, match=f"it has {2 * M} bytes, and {2 * M + 1} are needed"):
            await empty(file, 2 * M + 1)
        await empty(file, M)
        await file.flush()
        assert await file.read_bytes(2 * M, 0) == bytes(M) + b"\xa5" * M
