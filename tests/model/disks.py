"""The disks of the connection machine: real images, and one in Python.

Each knows what it reads as at the beginning, how it is opened, what of it is on stable storage, and
what is left of it in the end.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from interop.soak.recording import SteppedEngine
from interop.soak.shadow import Bytes
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine, HostFile
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Bitmap, Cluster, Compressed, Data, Image, Zero
from pynbd.server.disk import Disk, DiskNode
from tests.block.qcow2.images import noise
from tests.block.qcow2.writing import sound

SIZE = (300 << 10) + 512
BITMAP = "qemu:dirty-bitmap:b"
GRANULARITY = 4096
"""Of the bitmap of the images that have one."""


class Kept(ABC):
    """A disk. ``cluster``: bytes that a discard makes zero as a whole; 0: it may do nothing.

    ``depth``: how many layers it has; 0 where nobody tells.
    """

    size = SIZE
    cluster = 0
    depth = 0
    read_only = False
    bitmap = False

    @abstractmethod
    async def open(self) -> BlockNode:
        """What is served."""

    @abstractmethod
    async def stable(self) -> Bytes:
        """What a guest would find after a power cut."""

    @abstractmethod
    async def left(self) -> Bytes:
        """What a guest finds once the server has closed it; it is sound, too."""


class InPython(Kept):
    """A `Disk` whose calls overlap."""

    def __init__(self, content: Bytes) -> None:
        self.disk = _Memory(content)

    async def open(self) -> BlockNode:
        return DiskNode(self.disk)

    async def stable(self) -> Bytes:
        return self.disk.stable.copy()

    async def left(self) -> Bytes:
        return self.disk.content.copy()


class _Memory(Disk):
    """Long calls are made in two parts."""

    size = SIZE

    def __init__(self, content: Bytes) -> None:
        self.content = content
        self.stable = content.copy()

    async def pread(self, offset: int, length: int) -> bytes:
        half = offset + length // 2
        first = self.content[offset:half].tobytes()
        await asyncio.sleep(0)
        return first + self.content[half : offset + length].tobytes()

    async def pwrite(self, offset: int, data: bytes) -> None:
        half = len(data) // 2
        values = np.frombuffer(data, np.uint8)
        self.content[offset + half : offset + len(data)] = values[half:]
        await asyncio.sleep(0)
        self.content[offset : offset + half] = values[:half]

    async def flush(self) -> None:
        await asyncio.sleep(0)
        self.stable = self.content.copy()

    async def discard(self, offset: int, length: int) -> None:
        self.content[offset : offset + length // 2] = 0

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        self.content[offset : offset + length] = 0

    async def map(self, offset: int, length: int) -> list[tuple[int, int]]:
        end = offset + length
        edges = [offset, *range(offset // 512 * 512 + 512, end, 512), end]
        return [
            (stop - start, 0 if self.content[start:stop].any() else 3)
            for start, stop in pairwise(edges)
        ]


class InFile(Kept):
    """An image. ``seed``: its disk is slow, and requests meet in every way; None: as fast as it
    is.
    """

    def __init__(self, folder: Path, seed: int | None) -> None:
        self.path = folder / "x.img"
        self._seed = seed
        self._make(folder)
        self._synced = {self.path.name: self.path.read_bytes()}

    format = "raw"

    @abstractmethod
    def _make(self, folder: Path) -> None: ...

    async def open(self) -> BlockNode:
        self._engine = Engine(4) if self._seed is None else SteppedEngine(self._seed)
        kind: Any = type("KeptFile", (_KeptFile,), {"synced": self._synced})
        with patch("pynbd.block.file.HostFile", kind):
            node = await open_image(
                self.path, format=self.format, read_only=self.read_only, engine=self._engine
            )
        node.own_engine = self._engine
        return node

    async def stable(self) -> Bytes:
        copy = self.path.with_name("stable.img")
        copy.write_bytes(self._synced[self.path.name])
        return await self._content(copy)

    async def left(self) -> Bytes:
        if self.format == "qcow2":
            await sound(self.path)
        return await self._content(self.path)

    async def _content(self, path: Path) -> Bytes:
        async with await open_image(path, format=self.format) as node:
            return np.frombuffer(await node.pread(0, self.size), np.uint8)


class _KeptFile(HostFile):
    """What is on stable storage of it is kept, by its name."""

    synced: dict[str, bytes]
    _turn = threading.Lock()

    def _sync(self) -> None:
        with self._turn:
            super()._sync()
            self.synced[Path(self.path).name] = Path(self.path).read_bytes()


class Raw(InFile):
    """It ends in the middle of a sector."""

    size = SIZE + 77
    depth = 1

    def _make(self, folder: Path) -> None:
        with self.path.open("wb") as file:
            file.truncate(self.size)
            file.write(noise(1, 70000))
            file.seek(150000)
            file.write(noise(2, 50000))


class RawReadOnly(Raw):
    read_only = True


_CLUSTERS: dict[int, Cluster] = {
    0: Data(noise(3, 4096)),
    1: Compressed(noise(4, 3000)),
    2: Zero(),
    3: Zero(preallocated=True),
    **{number: Data(noise(number, 4096)) for number in range(8, 20)},
    **{number: Compressed(noise(number, 1000)) for number in range(20, 24)},
}


class Qcow2(InFile):
    """Small clusters, and a bitmap that records."""

    format = "qcow2"
    cluster = 4096
    depth = 1
    bitmap = True

    def _make(self, folder: Path) -> None:
        Image(
            size=self.size,
            cluster_bits=12,
            clusters={number << 12: cluster for number, cluster in _CLUSTERS.items()},
            bitmaps=[Bitmap("b", granularity=GRANULARITY)],
        ).write(self.path)


class Extended(InFile):
    """Subclusters above a shorter raw backing file."""

    format = "qcow2"
    cluster = 16384
    depth = 2

    def _make(self, folder: Path) -> None:
        (folder / "base.raw").write_bytes(noise(5, 200000))
        Image(
            size=self.size,
            cluster_bits=14,
            extended_l2=True,
            clusters={
                2 << 14: Data(noise(6, 16384)),
                3 << 14: Zero(),
                4 << 14: Compressed(noise(7, 9000)),
            },
            backing_file="base.raw",
            backing_format="raw",
        ).write(self.path)


def keep(kind: str, folder: Path, seed: int | None) -> Kept:
    """A new disk of a kind."""
    if kind == "python":
        return InPython(np.frombuffer(noise(8, SIZE), np.uint8).copy())
    return KINDS[kind](folder, seed)


KINDS: dict[str, type[InFile]] = {
    "raw": Raw,
    "read-only": RawReadOnly,
    "qcow2": Qcow2,
    "extended": Extended,
}
