"""New images: what is refused, and in which order they are written.

That they are as QEMU makes them is shown in interop/test_create_qemu_img.py.
"""

from __future__ import annotations

import asyncio
import errno
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.engine import Engine, HostFile
from pynbd.block.new_file import Preallocation
from pynbd.block.probe import probe_format
from pynbd.block.qcow2 import create as creating
from pynbd.block.qcow2.builder import Image
from pynbd.block.qcow2.create import NewImage, create
from pynbd.block.qcow2.format import CompressionType
from pynbd.errors import UsageError

M = 1 << 20


def made(path: Path, **options: Any) -> None:
    async def work() -> None:
        with closing(Engine()) as engine:
            await create(str(path), NewImage(**options), engine=engine)

    asyncio.run(work())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """What is done to files: "sync", or where something is written."""
    done: list[str | int] = []

    def write_batch(file: HostFile, pieces: Any) -> list[OSError | None]:
        done.extend(offset for _, offset in pieces)
        return really_write(file, pieces)

    def sync(file: HostFile) -> None:
        done.append("sync")
        really_sync(file)

    really_write, really_sync = HostFile._write_batch, HostFile._sync
    monkeypatch.setattr(HostFile, "_write_batch", write_batch)
    monkeypatch.setattr(HostFile, "_sync", sync)
    return done


def test_the_header_comes_last(steps: list[str | int], tmp_path: Path) -> None:
    made(tmp_path / "new", size=M, preallocation=Preallocation.METADATA)
    assert steps[0] == "sync"  # what was there before is gone
    assert steps[-3:] == ["sync", 0, "sync"]
    # By clusters of 64 KiB: the refcount table, its block, the L1 table, the L2 table.
    assert steps[1:-3] == [*(n << 16 for n in (1, 2, 3, 4)), 512]


def test_a_data_file_comes_before(steps: list[str | int], tmp_path: Path) -> None:
    data = tmp_path / "data"
    made(tmp_path / "new", size=M, data_file=str(data), preallocation=Preallocation.FULL)
    assert steps[:3] == [0, "sync", "sync"]
    assert steps[-3:] == ["sync", 0, "sync"]
    assert data.read_bytes() == bytes(M)


@pytest.mark.parametrize("how", Preallocation)
def test_what_a_crash_leaves_is_no_image(
    how: Preallocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk fails at each of the writes; a file that was there is not removed."""
    monkeypatch.setattr(creating, "_ENTRIES_PER_STEP", 8)
    really_write = HostFile._write_batch
    left = 0

    def write_batch(file: HostFile, pieces: Any) -> list[OSError | None]:
        nonlocal left
        left -= 1
        return [OSError(errno.EIO, "bad disk")] if left < 0 else really_write(file, pieces)

    monkeypatch.setattr(HostFile, "_write_batch", write_batch)
    path, new = tmp_path / "old", tmp_path / "new"
    for writes in range(100):
        Image(size=4 * M).write(path)
        left = writes
        try:
            made(path, size=2 * M, preallocation=how)
        except OSError:
            assert probe_format(path.read_bytes()[:512]) == "raw"
        else:
            break
        left = writes
        with pytest.raises(OSError, match="bad disk"):
            made(new, size=2 * M, preallocation=how)
        assert not new.exists()
    assert writes >= 4  # a refcount table, a block, and the header in two parts
    assert probe_format(path.read_bytes()[:512]) == "qcow2"


BACKED = {"backing_file": "b", "backing_fmt": "raw"}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": -1}, r"size: -1 is not 0 to 2\^63 - 513"),
        ({"size": (1 << 63) - 1}, "size: "),
        ({"cluster_size": 256}, "cluster_size: 256 is not a power of two, 512 to 2M"),
        ({"cluster_size": 4 * M}, "cluster_size: "),
        ({"cluster_size": 3000}, "cluster_size: "),
        ({"refcount_bits": 0}, "refcount_bits: 0 is not a power of two, 1 to 64"),
        ({"refcount_bits": 128}, "refcount_bits: "),
        ({"refcount_bits": 24}, "refcount_bits: "),
        ({"extended_l2": True, "cluster_size": 8192}, "extended_l2: .* 16k or more, not 8192"),
        ({"compat": "1.2"}, "compat: '1.2' is not 0.10 or 1.1"),
        ({"compat": "0.10", "refcount_bits": 8}, "refcount_bits: with compat=0.10 only"),
        ({"compat": "0.10", "extended_l2": True}, "extended_l2: "),
        ({"compat": "0.10", "lazy_refcounts": True}, "lazy_refcounts: "),
        ({"compat": "0.10", "compression_type": CompressionType.ZSTD}, "compression_type: "),
        ({"compat": "0.10", "data_file": "d"}, "data_file: "),
        ({"data_file": ""}, "data_file: the name of a file"),
        ({"data_file_raw": True}, "data_file_raw: needs data_file"),
        ({"backing_file": "b"}, "backing_fmt: needed"),
        ({"backing_fmt": "raw"}, "backing_fmt: needs backing_file"),
        ({**BACKED, "backing_file": ""}, "backing_file: its name has 0 bytes; 1 to 1023"),
        ({**BACKED, "backing_file": "b" * 1024}, "backing_file: its name has 1024 bytes"),
        ({**BACKED, "backing_file": "b" * 600, "cluster_size": 512}, "shorten the names"),
        ({**BACKED, "data_file": "d", "data_file_raw": True}, "data_file_raw: not allowed with"),
        ({**BACKED, "preallocation": Preallocation.FULL}, "preallocation: with backing_file only"),
        ({"cluster_size": 512, "size": (128 << 30) + 1}, "size: .* cluster_size=512 at most 1374"),
        (
            # 2^27 clusters with a refcount of 8 bytes each: 2^21 blocks, and a table of 2^24 bytes.
            {
                "cluster_size": 512,
                "size": 64 << 30,
                "refcount_bits": 64,
                "preallocation": Preallocation.METADATA,
            },
            "preallocation: 68719476736 bytes are too many",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match=said):
        made(path, **{"size": M, **options})
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]
