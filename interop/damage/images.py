"""The sound images that are damaged: those of `interop.damages`, and what these do not have.

Each is built once for a process, and then kept as bytes: a damaged one is written by `place`.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from interop import damages
from interop.damages import Target, clusters
from pynbd.block.qcow2.builder import (
    Bitmap,
    Data,
    Image,
    InternalSnapshot,
    Subclusters,
    Zero,
)
from pynbd.block.qcow2.extensions import Extension
from pynbd.block.qcow2.format import FEATURE_NAMES, SUBCLUSTERS, BitmapFlags, CompressionType

NAME = "disk.qcow2"
FIRST_BYTES = 12 << 20

_BASE = random.Random(6).randbytes(150_001)  # shorter than what is above it, and not in sectors
_PLAIN = damages.IMAGES["plain"]
_SMALL, _LARGE = 1 << 9, 1 << 16

# What is below an image, and beside it, by name.
_BELOW: Mapping[str, bytes | Image] = {
    "base.raw": _BASE,
    "base.qcow2": replace(_PLAIN, clusters={0x3000: Data(b"below")}),
}


def refcounts(bits: int) -> Image:
    return replace(_PLAIN, refcount_bits=bits)


IMAGES: dict[str, Image] = damages.IMAGES | {
    "refcounts of 2 bits": refcounts(2),
    "refcounts of 4 bits": refcounts(4),
    "refcounts of 8 bits": refcounts(8),
    "refcounts of 32 bits": refcounts(32),
    "zstd": replace(_PLAIN, compression_type=CompressionType.ZSTD),
    "small clusters": Image(size=1024 * _SMALL, cluster_bits=9, clusters=clusters(_SMALL)),
    "large clusters": Image(size=1024 * _LARGE, cluster_bits=16, clusters=clusters(_LARGE)),
    "over raw": replace(_PLAIN, backing_file="base.raw", backing_format="raw"),
    "over qcow2": replace(
        damages.IMAGES["extended"], backing_file="base.qcow2", backing_format="qcow2"
    ),
    "everything": Image(
        size=damages.SIZE,
        cluster_bits=12,
        clusters=damages.SHARED,
        backing_file="base.raw",
        backing_format="raw",
        snapshots=[InternalSnapshot("before", damages.SHARED)],
        bitmaps=[
            Bitmap("monday", granularity=512, dirty=[(0, 4096), (1 << 20, 65536)]),
            Bitmap("tuesday", granularity=65536, dirty=[(0, damages.SIZE)], flags=BitmapFlags.NONE),
        ],
        feature_names=FEATURE_NAMES,
        extensions=[Extension(0x12345678, b"of somebody else")],
    ),
}


def guest_bytes(image: Image, first: int) -> bytes:
    """What a guest has to see of the first bytes of a sound image: by what it was made of."""
    length = min(image.size, first)
    below = _BELOW.get(image.backing_file or "", b"")
    seen = bytearray(below if isinstance(below, bytes) else guest_bytes(below, length))
    seen = seen[:length].ljust(length, b"\0")
    size = 1 << image.cluster_bits
    piece = size // SUBCLUSTERS
    for at, cluster in image.clusters.items():
        data = b"" if isinstance(cluster, Zero) else cluster.data
        data = data.ljust(size, b"\0")
        if not isinstance(cluster, Subclusters):
            seen[at : at + size] = data
            continue
        for number in range(SUBCLUSTERS):
            start = number * piece
            if cluster.zero >> number & 1:
                seen[at + start : at + start + piece] = bytes(piece)
            elif cluster.allocated >> number & 1:
                seen[at + start : at + start + piece] = data[start : start + piece]
    return bytes(seen[:length])


@dataclass(frozen=True)
class Sound:
    """A sound image, its bytes, and those of the files that it names."""

    name: str
    content: bytes
    beside: Mapping[str, bytes]
    target: Target  # it is in a folder that lives as long as the process
    guest: bytes  # what is seen of it, or of its first `FIRST_BYTES`

    def place(self, folder: Path, content: bytes | None = None) -> Path:
        """Write it into ``folder``, with ``content`` in place of its own; the image's path."""
        for name, data in self.beside.items():
            write_sparsely(folder / name, data)
        write_sparsely(folder / NAME, self.content if content is None else content)
        return folder / NAME


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pynbd-damage-sound-")


@cache
def sound(name: str) -> Sound:
    folder = Path(_folder().name) / str(len(os.listdir(_folder().name)))
    folder.mkdir()
    image = IMAGES[name]
    written = image.write(folder / NAME)
    below = _BELOW.get(image.backing_file or "")
    if isinstance(below, bytes):
        (folder / "base.raw").write_bytes(below)
    elif below is not None:
        below.write(folder / "base.qcow2")
    beside = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != NAME}
    content = (folder / NAME).read_bytes()
    target = Target(folder / NAME, written)
    return Sound(name, content, beside, target, guest_bytes(image, FIRST_BYTES))


def write_sparsely(path: Path, content: bytes) -> None:
    """Write a file anew whose blocks of zeroes are holes, where they are many."""
    with path.open("wb") as file:
        for at in range(0, len(content), 1 << 16):
            piece = content[at : at + (1 << 16)]
            if any(piece):
                file.seek(at)
                file.write(piece)
        file.truncate(len(content))
