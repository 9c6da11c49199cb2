"""Images whose clusters are everything that a cluster may be; about 1 MiB each, "x.qcow2" in a
folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from interop.samples import qemu_io
from pynbd.block.qcow2.builder import (
    Cluster,
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Subclusters,
    Zero,
)
from pynbd.block.qcow2.format import CompressionType
from tests.block.qcow2.writing import KiB, MiB, create


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def over_raw(folder: Path, size: int, options: str = "", top: int = MiB) -> Path:
    """An overlay of a raw image of ``size`` bytes."""
    (folder / "base.raw").write_bytes(noise(1, size))
    return create(folder / "x.qcow2", top, options, "-b", "base.raw", "-F", "raw")


def compressed(folder: Path, kind: CompressionType = CompressionType.ZLIB) -> Path:
    """Every cluster is compressed, several of them in one host cluster, some across two."""
    clusters = {
        number << 16: Compressed(noise(number, 20000 + 1000 * number) + b"end")
        for number in range(16)
    }
    Image(size=MiB, clusters=clusters, compression_type=kind).write(folder / "x.qcow2")
    return folder / "x.qcow2"


def zstd(folder: Path) -> Path:
    return compressed(folder, CompressionType.ZSTD)


def snapshot(folder: Path) -> Path:
    clusters = {number << 16: Data(noise(number, 65536)) for number in range(16)}
    image = Image(size=MiB, clusters=clusters, snapshots=[InternalSnapshot("s", clusters)])
    image.write(folder / "x.qcow2")
    return folder / "x.qcow2"


def preallocated(folder: Path) -> Path:
    """Zero clusters whose host clusters hold something else."""
    clusters = {number << 16: Zero(preallocated=number % 2 == 0) for number in range(16)}
    Image(size=MiB, clusters=clusters).write(folder / "x.qcow2")
    return folder / "x.qcow2"


def subclusters(folder: Path) -> Path:
    """Clusters in many states, above a backing file."""
    (folder / "base.raw").write_bytes(noise(1, MiB))
    some = 0x0F0F00FF
    shared = {0: Subclusters(noise(3, 65536), some, 0x00F0_0000)}
    clusters: dict[int, Cluster] = {
        **shared,
        1 << 16: Subclusters(noise(4, 65536), some, ~some & 0xFFFFFFFF),
        2 << 16: Subclusters(b"", 0, 0xFFFF),
        3 << 16: Subclusters(noise(5, 65536), 0xFFFFFFFF),
        4 << 16: Compressed(noise(6, 30000)),
        5 << 16: Subclusters(noise(7, 65536), 0, 0xFFFFFFFF),
    }
    Image(
        size=MiB,
        clusters=clusters,
        extended_l2=True,
        snapshots=[InternalSnapshot("s", shared)],
        backing_file="base.raw",
        backing_format="raw",
    ).write(folder / "x.qcow2")
    return folder / "x.qcow2"


def data_file(folder: Path, raw: bool = False, options: str = "") -> Path:
    """A disk of an external data file; not all of it was ever written."""
    recorded = f"data_file={folder}/x.data,data_file_raw={'on' if raw else 'off'}"
    path = create(folder / "x.qcow2", MiB + 512, recorded + options)
    qemu_io(path, "write -q -P 7 0 300k", "write -q -P 8 512k 64k", "write -q -z 576k 64k")
    return path


def metadata(folder: Path) -> Path:
    """Clusters that are there, without space on the host."""
    return create(folder / "x.qcow2", MiB, "preallocation=metadata")


IMAGES: dict[str, Callable[[Path], Path]] = {
    "nothing": lambda folder: create(folder / "x.qcow2", MiB),
    "v2": lambda folder: create(folder / "x.qcow2", MiB, "compat=0.10"),
    "backing": lambda folder: over_raw(folder, MiB),
    "short": lambda folder: over_raw(folder, 300 * KiB + 512),
    "odd": lambda folder: over_raw(folder, 300 * KiB + 77, "cluster_size=4k"),
    "long": lambda folder: over_raw(folder, 2 * MiB, top=MiB + 512),
    "extended": lambda folder: over_raw(folder, 300 * KiB + 512, "extended_l2=on"),
    "large": lambda folder: over_raw(folder, 700 * KiB, "cluster_size=2M"),
    "zlib": compressed,
    "zstd": zstd,
    "snapshot": snapshot,
    "preallocated": preallocated,
    "subclusters": subclusters,
    "metadata": metadata,
    "data-file": data_file,
    "raw-data-file": lambda folder: data_file(folder, raw=True),
    "extended-data-file": lambda folder: data_file(folder, options=",extended_l2=on"),
}


def twice(name: str, folder: Path) -> tuple[Path, Path]:
    """Two images that are alike, for us and for QEMU."""
    paths = []
    for whose in ("ours", "theirs"):
        (folder / whose).mkdir()
        paths.append(IMAGES[name](folder / whose))
    return paths[0], paths[1]
