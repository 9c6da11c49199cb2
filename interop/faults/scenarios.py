"""What is done with an image while its host fails: images of every kind, and requests to them.

A scenario is a function of its name: the image is built once, and put back before each run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from interop.samples import qemu_io
from pynbd.block.cache_modes import Cache
from pynbd.block.qcow2.builder import Bitmap, Cluster, Compressed, Data, Image, InternalSnapshot
from tests.block.qcow2.images import compressed, noise, over_raw, subclusters
from tests.block.qcow2.writing import create
from tests.server.session import (
    BLOCK_STATUS,
    CACHE,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Mode,
)

KiB, MiB = 1 << 10, 1 << 20
C = 64 * KiB


class Ask(NamedTuple):
    """A request; one that writes ``data`` has its length from there."""

    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + (self.length or len(self.data))


Group = Sequence[Ask]  # requests that are sent together


def _write(offset: int, length: int, flags: int = 0) -> Ask:
    return Ask(WRITE, offset, 0, flags, noise(offset + length, length))


# What is asked for stands alone, but for the last of the lists. Reads of 64 KiB and more are sent
# by send-file where the page cache has them.
READS: Sequence[Group] = [
    [Ask(READ, 4096, 4096)],
    [Ask(READ, 100, 3 * C)],
    [Ask(READ, 0, MiB)],
    [Ask(CACHE, 0, MiB)],
    [Ask(BLOCK_STATUS, 0, MiB)],
    [Ask(READ, 0, MiB)],
    [Ask(READ, 7 * C + 1000, C)],
    [Ask(READ, number * C + 512, 5000) for number in range(8)],
]
WRITES: Sequence[Group] = [
    [Ask(READ, 0, 4096)],
    [_write(0, 4096)],  # in place, or copied
    [_write(C + 512, 3000)],
    [_write(2 * C, C)],
    [_write(3 * C, 3 * C + 512)],
    [Ask(FLUSH)],
    [_write(2 * C + 4096, 4096, FUA)],
    [Ask(WRITE_ZEROES, 4 * C, C)],
    [Ask(WRITE_ZEROES, 5 * C, C, NO_HOLE)],
    [Ask(WRITE_ZEROES, 6 * C + 512, 3000)],
    [Ask(TRIM, 3 * C, C)],
    [Ask(FLUSH)],
    [_write(3 * C, C), _write(8 * C, 2000), _write(9 * C, 2 * C), _write(12 * C + 1, 70_000)],
    [Ask(READ, 0, MiB)],
    [Ask(BLOCK_STATUS, 0, MiB)],
    [Ask(TRIM, 8 * C, 4 * C, FUA)],
    [_write(14 * C, 512)],
    [Ask(FLUSH)],
    [_write(14 * C + 512, 512)],
]


@dataclass(frozen=True)
class Scenario:
    """An image, made in a folder, and what is asked of it. ``options`` are those of
    `open_image`.
    """

    make: Callable[[Path], Path]
    asked: Sequence[Group]
    options: dict[str, Any] = field(default_factory=dict)
    mode: Mode = Mode.STRUCTURED
    cold: bool = False  # nothing of it is in the page cache

    @property
    def writes(self) -> bool:
        return self.asked is WRITES


def _raw(folder: Path) -> Path:
    """With a hole, in which there is no data from 512 KiB to 640 KiB."""
    path = folder / "x.raw"
    with path.open("wb") as file:
        file.write(noise(1, 512 * KiB))
        file.seek(640 * KiB)
        file.write(noise(2, MiB - 640 * KiB))
    return path


def _mixed(folder: Path, **options: Any) -> Path:
    """Plain, compressed and missing clusters above a raw image, a snapshot, and two bitmaps, one of
    which records.
    """
    (folder / "base.raw").write_bytes(noise(1, MiB))
    shared: dict[int, Cluster] = {at * C: Data(noise(at, C)) for at in range(2)}
    packed = {at * C: Compressed(noise(at, 20_000)) for at in (6, 7, 9)}
    Image(
        size=MiB,
        clusters={**shared, 4 * C: Data(noise(4, C)), **packed},
        snapshots=[InternalSnapshot("s", shared)],
        bitmaps=[Bitmap("b", dirty=[(0, C)])],
        backing_file="base.raw",
        backing_format="raw",
        **options,
    ).write(folder / "x.qcow2")
    return folder / "x.qcow2"


def _chain(folder: Path) -> Path:
    """Three layers."""
    path = _mixed(folder).rename(folder / "middle.qcow2")
    top = create(folder / "x.qcow2", MiB, "", "-b", path.name, "-F", "qcow2")
    qemu_io(top, "write -q -P 3 320k 100k", "write -q -z 832k 64k")
    return top


def _data_file(folder: Path) -> Path:
    clusters = {at * C: Data(noise(at, C)) for at in range(6)}
    image = Image(size=MiB, clusters=clusters, data_file="x.data")
    image.write(folder / "x.qcow2")
    return folder / "x.qcow2"


def _empty(options: str, folder: Path) -> Path:
    return create(folder / "x.qcow2", MiB, options)


def _read(make: Callable[[Path], Path], **rest: Any) -> Scenario:
    options = rest.pop("options", {})
    return Scenario(make, READS, options, **rest)


def _written(make: Callable[[Path], Path], **options: Any) -> Scenario:
    return Scenario(make, WRITES, {"read_only": False, **options})


SCENARIOS = {
    "read-raw": _read(_raw),
    "read-raw-cold": _read(_raw, cold=True),
    "read-raw-direct": _read(_raw, options={"cache": Cache.NONE}),
    "read-raw-simple": _read(_raw, mode=Mode.SIMPLE),
    "read-mixed": _read(_mixed, mode=Mode.EXTENDED),
    "read-mixed-cold": _read(_mixed, cold=True),
    "read-chain": _read(_chain),
    "read-chain-cold": _read(_chain, cold=True),
    "read-snapshot": _read(_mixed, options={"snapshot": "s"}),
    "read-subclusters": _read(subclusters),
    "read-compressed": _read(compressed),
    "read-data-file": _read(_data_file, cold=True),
    "write-raw": _written(_raw, format="raw"),
    "write-raw-guarded": _written(_raw),
    "write-raw-direct": _written(_raw, format="raw", cache=Cache.NONE),
    "write-raw-through": _written(_raw, format="raw", cache=Cache.WRITETHROUGH),
    "write-empty": _written(partial(_empty, "")),
    "write-v2": _written(partial(_empty, "compat=0.10")),
    "write-lazy": _written(partial(_empty, "lazy_refcounts=on")),
    "write-metadata": _written(partial(_empty, "preallocation=metadata")),
    "write-small": _written(partial(_empty, "cluster_size=4k,refcount_bits=1")),
    "write-mixed": _written(_mixed),
    "write-direct": _written(_mixed, cache=Cache.NONE),
    "write-through": _written(_mixed, cache=Cache.DIRECTSYNC),
    "write-chain": _written(_chain),
    "write-extended": _written(lambda folder: over_raw(folder, 700 * KiB, "extended_l2=on")),
    "write-subclusters": _written(subclusters),
    "write-compressed": _written(compressed),
    "write-data-file": _written(_data_file),
}


class Saved(NamedTuple):
    """A file as it was: its size, and (offset, bytes) where it has data."""

    path: Path
    size: int
    data: Sequence[tuple[int, bytes]]

    @classmethod
    def of(cls, path: Path) -> Saved:
        with path.open("rb") as file:
            return cls(path, path.stat().st_size, list(_data(file.fileno())))

    def restore(self) -> None:
        """A new file in its place."""
        self.path.unlink(missing_ok=True)
        with self.path.open("wb") as file:
            file.truncate(self.size)
            for offset, data in self.data:
                os.pwrite(file.fileno(), data, offset)

    def cool(self) -> None:
        """Take it out of the page cache, where its file system has one."""
        with self.path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _data(fd: int) -> Iterator[tuple[int, bytes]]:
    at, end = 0, os.lseek(fd, 0, os.SEEK_END)
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # none from here on
            return
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, os.pread(fd, hole - at, at)
        at = hole


class Place:
    """The folder of a scenario, whose image is put back as often as it is wanted."""

    def __init__(self, name: str, folder: Path) -> None:
        self.scenario = SCENARIOS[name]
        self.path = self.scenario.make(folder)
        self.folder = folder
        self._saved = [Saved.of(path) for path in sorted(folder.iterdir())]

    @property
    def checked_by_qemu(self) -> bool:
        """Whether a run leaves an image to be checked."""
        return self.scenario.writes and self.path.suffix == ".qcow2"

    @property
    def written_through(self) -> bool:
        cache: Cache = self.scenario.options.get("cache", Cache.WRITEBACK)
        return cache.mode.write_through

    @property
    def may_end_early(self) -> bool:
        """Whether a read may give no bytes. In qcow2 what was behind the end of the file is gone
        (`tests/faults/test_files.py` cuts files short), and no system ends a file with O_DIRECT.
        """
        return self.path.suffix == ".raw" and self.scenario.options.get("cache") != Cache.NONE

    def restore(self) -> None:
        for saved in self._saved:
            saved.restore()
            if self.scenario.cold:
                saved.cool()


def draws(seed: object) -> Random:
    """What decides by chance, by a seed that anybody can give again."""
    return Random(str(seed))
