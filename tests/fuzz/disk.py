"""What the targets of the disk have in common: one loop, one engine and one folder for all inputs
of a process; small images of every kind; and what has to hold of whatever was opened.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import os
import tempfile
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pynbd.block.engine import Engine, HostFile
from pynbd.block.extent import COMPRESSED, CORRUPT, DATA, ZERO
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import (
    Bitmap,
    Cluster,
    Compressed,
    Data,
    Image,
    InternalSnapshot,
    Subclusters,
    Zero,
)
from pynbd.block.qcow2.check import examine
from pynbd.block.qcow2.format import CompressionType
from pynbd.block.qcow2.image import read_header
from pynbd.block.qcow2.references import References
from pynbd.block.qcow2.report import Report
from pynbd.errors import ImageError
from tests.fuzz.taking import Taking

T = TypeVar("T")

# Bytes of a disk, and runs of it, that are looked at.
_MOST_BYTES = 1 << 18
_MOST_RUNS = 64
_MOST_STEPS = 16


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    atexit.register(loop.close)
    return loop


@cache
def engine() -> Engine:
    return Engine(2)


@cache
def folder() -> Path:
    """Of this process; it goes with it."""
    there = tempfile.TemporaryDirectory(prefix="pynbd-fuzz-disk-")
    atexit.register(there.cleanup)
    return Path(there.name)


def run(work: Coroutine[Any, Any, T]) -> T:
    with _told():
        return _loop().run_until_complete(work)


class _OneLine(logging.Handler):
    """What is told of an image is a line that says something."""

    def emit(self, record: logging.LogRecord) -> None:
        assert not record.exc_info, record.getMessage()
        assert not record.getMessage().rstrip().endswith(":")


@contextmanager
def _told() -> Iterator[None]:
    log, handler = logging.getLogger("pynbd"), _OneLine()
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = True
        log.removeHandler(handler)


def put(data: bytes, name: str = "x.qcow2") -> Path:
    """A file with these bytes; one that is there is not made anew, which would take longest."""
    path = folder() / name
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
        file.write(data)
        file.truncate()
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


# Images


def _text(number: int, size: int) -> bytes:
    return b"".join(b"%3d%3d " % (number, at) for at in range(size // 7 + 1))[:size]


def _small(**options: Any) -> Image:
    """64 clusters of 512 bytes; the first of them of every kind."""
    kinds: dict[int, Cluster] = {
        **{number << 9: Data(bytes([number]) * 512) for number in (1, 2, 5, 9, 63)},
        **{number << 9: Compressed(_text(number, 512)) for number in (3, 4, 6)},
    }
    if options.get("version", 3) > 2:
        kinds |= {7 << 9: Zero(), 8 << 9: Zero(preallocated=True)}
    if options.get("data_file"):
        kinds = {at: kind for at, kind in kinds.items() if not isinstance(kind, Compressed)}
    return Image(**{"size": 64 << 9, "cluster_bits": 9, "clusters": kinds, **options})


def _extended() -> Image:
    shared = {0: Subclusters(b"\x21" * (1 << 14), 0x0F0F00FF, 0x00F00000)}
    clusters: dict[int, Cluster] = {
        **shared,
        1 << 14: Subclusters(b"\x22" * (1 << 14), 0xFFFFFFFF),
        2 << 14: Subclusters(b"", 0, 0xFFFF),
        3 << 14: Compressed(_text(3, 1 << 14)),
        5 << 14: Subclusters(b"\x25" * (1 << 14), 0, 0xFFFFFFFF),
    }
    return Image(
        size=8 << 14,
        cluster_bits=14,
        clusters=clusters,
        extended_l2=True,
        snapshots=[InternalSnapshot("s", shared)],
    )


_PLAIN: Mapping[int, Cluster] = {
    number << 9: Data(bytes([number]) * 512) for number in (1, 2, 5, 9)
}
IMAGES: Mapping[str, Image] = {
    "plain": _small(),
    "v2": _small(version=2),
    "zstd": _small(compression_type=CompressionType.ZSTD),
    "extended": _extended(),
    "snapshots": Image(
        size=64 << 9,
        cluster_bits=9,
        clusters={at: Data(bytes([at >> 9]) * 512) for at in range(0, 16 << 9, 1 << 9)},
        snapshots=[InternalSnapshot("one", {}), InternalSnapshot("two", {0: Data(b"2" * 512)})],
    ),
    "bitmaps": Image(
        size=64 << 9,
        cluster_bits=9,
        clusters={512: Data(b"1" * 512)},
        bitmaps=[
            Bitmap("b", granularity=512, dirty=((0, 4096),)),
            Bitmap("c", granularity=1024, dirty=((0, 64 << 9),)),
        ],
    ),
    "backing": _small(backing_file="base.raw", backing_format="raw"),
    "data-file": _small(data_file="x.data"),
    **{f"refcounts-{bits}": _small(refcount_bits=bits, clusters=_PLAIN) for bits in (1, 2, 8, 64)},
}
NAMES = tuple(IMAGES)


@cache
def image(name: str) -> tuple[bytes, tuple[int, ...]]:
    """The bytes of an image, and the offsets of its words that mean something: those that are not
    zero, nor data, and their neighbours.
    """
    path = folder() / "built.qcow2"
    IMAGES[name].write(path)
    data = path.read_bytes()
    put(b"\x77" * (70 << 9), "base.raw")
    words = [data[at : at + 8] for at in range(0, len(data), 8)]
    meant = [any(word) and len(set(word)) > 1 for word in words]
    near = (any(meant[max(at - 2, 0) : at + 3]) for at in range(len(words)))
    return data, tuple(at * 8 for at, is_near in enumerate(near) if is_near)


PATCH = 11  # bytes


def word_at(name: str, offset: int) -> int:
    """The number of the word at ``offset`` of an image, as `patch` takes it."""
    return image(name)[1].index(offset)


def patch(operation: int, word: int, value: int) -> bytes:
    """One change, as `patched` takes it."""
    return bytes([operation]) + word.to_bytes(2, "big") + value.to_bytes(8, "big")


def patched(name: str, changes: Taking) -> bytes:
    """The image with its words changed, each by what eleven bytes say."""
    data, places = image(name)
    changed = bytearray(data)
    while changes:
        operation = changes.number(1) % 5
        at = places[changes.number(2) % len(places)]
        value = changes.number(8)
        word = int.from_bytes(changed[at : at + 8], "big")
        match operation:
            case 0:
                word = value
            case 1:
                word ^= 1 << value % 64
            case 2:
                there = places[value % len(places)]
                word = int.from_bytes(changed[there : there + 8], "big")
            case 3:
                word += (value % 1024 - 512) << 9
            case _:
                del changed[max(at + 8, value % (len(changed) + 1)) :]  # cut short
        changed[at : at + 8] = (word % (1 << 64)).to_bytes(8, "big")
    return bytes(changed)


def patches() -> Iterator[bytes]:
    """Seeds for `patched`: nothing, and a few of each kind."""
    yield b""
    for operation in range(5):
        yield b"".join(patch(operation, word * 7, 1 << word % 64 | word) for word in range(3))


# What has to hold


async def explore(node: BlockNode) -> None:
    """Maps and reads: the map is contiguous and ends where the disk does; what is read is what the
    map says, or EIO.
    """
    at = runs_seen = 0
    for _ in range(_MOST_STEPS):
        if at == node.size:
            break
        runs = await node.map(at, node.size - at)
        assert runs.offset == at
        for start, end, kind, _, depth in runs:
            assert start == at < end <= node.size
            at = end
            assert kind in (DATA, ZERO, COMPRESSED, CORRUPT, ZERO | DATA), kind
            assert depth > 0 or kind == ZERO
            if runs_seen < _MOST_RUNS:
                runs_seen += 1
                data = await read(node, start, min(end - start, 4096))
                if data is None:  # the host knows no offsets beyond 2^63
                    assert kind & (CORRUPT | DATA), kind
                else:
                    assert kind != CORRUPT
                    assert not (kind & ZERO and any(data))
    await read(node, 0, min(node.size, _MOST_BYTES))


async def read(node: BlockNode, offset: int, length: int) -> bytes | None:
    """Guest bytes; None for EIO."""
    try:
        data = bytes(await node.pread(offset, length))
    except OSError as error:
        check_errno(error)
        return None
    assert len(data) == length
    return data


def check_errno(error: OSError) -> None:
    """What is damaged is EIO."""
    assert error.errno == errno.EIO, error


async def examined(path: Path) -> tuple[Report, References] | None:
    """What the check has found, and counted; None if the image cannot be checked."""
    with closing(HostFile.open(engine(), str(path), writable=False)) as file:
        try:
            return await examine(file, await read_header(file))
        except ImageError as error:
            check_line(error)
            return None


async def check_image(path: Path) -> Report | None:
    """What the check says, of itself consistent; None if the image cannot be checked."""
    found = await examined(path)
    if found is None:
        return None
    report, _ = found
    assert min(report.leaks, report.corruptions, report.check_errors) >= 0
    assert len(report.findings) >= bool(report.corruptions or report.leaks)
    assert all(len(line.splitlines()) == 1 for line in report.findings)
    assert report.image_end_offset >= 0
    return report


def check_line(error: Exception) -> None:
    """An answer is one line."""
    assert len(str(error).splitlines()) == 1, error
