"""What is served: images built once into the cache folder, and kept in the page cache.

Those that are only read, and those that are written in place, are kept; what has to be empty is
made anew for each measurement, in the same way for every server.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from interop import peers
from interop.bench import tables

FOLDER = peers.CACHE / "bench"
FRESH = FOLDER / "fresh"
SIZE = 1 << 30
COMPRESSED_SIZE = 1 << 29  # more than any cache of decompressed clusters holds
EMPTY_SIZE = 1 << 31  # so large that most of the writes of a job meet an unallocated cluster
LAYERS = "base", "middle", "top"
RUNS = 1, 2, 4, 8, 16, 32  # clusters that lie in one layer of the chain
_libc = ctypes.CDLL(None)
_kept: list[mmap.mmap] = []
LETTERS = b"eeeeeetttttaaaaoooiiinnnssshhrrdlcumwfgypbvkjxqz"


@cache
def built(name: str, build: Callable[[Path], None]) -> Path:
    """The image of this name, built if it is not there yet, with its bytes in the page cache."""
    path = FOLDER / name
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        build(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file)
        unfinished.rename(path)
    keep_cached(path)
    return path


def keep_cached(path: Path) -> None:
    """Have all of a file in the page cache, to the end of the run: a host that reclaims pages would
    make some servers read from the disk, and others not. Who may not lock pages reads them once.

    It is brought there as random access brings it. A file that was read or written from end to end
    is in large folios, and every small write to one of these costs the kernel ten times what any
    server does.
    """
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        piece = bytearray(1 << 16)
        while file.readinto(piece):
            pass
        pages = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    _kept.append(pages)
    address = np.frombuffer(pages, np.uint8).ctypes.data
    _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)))


def let_go() -> None:
    """Keep nothing in the page cache any more, and look at every file again."""
    built.cache_clear()
    _kept.clear()


def settle(path: Path) -> None:
    """After a measurement: no writeback is left over that could disturb the next one."""
    if path.parent == FRESH:
        path.unlink()
    else:
        with path.open("rb") as file:
            os.fsync(file)


def raw() -> Path:
    return built("data.raw", build_raw)


def build_raw(path: Path) -> None:
    """1 GiB of bytes that no layer can take for zeroes."""
    block = random.Random(0).randbytes(1 << 20)
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(block)


def qcow2() -> Path:
    return built("data.qcow2", build_qcow2)


def build_qcow2(path: Path) -> None:
    """The same bytes, every cluster allocated."""
    peers.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw(), path, timeout=300)


def written_raw() -> Path:
    """A copy to be written: all servers write it in turn, in place."""
    return built("written.raw", build_raw)


def written_qcow2() -> Path:
    """A copy to be written in place: every cluster stays where it is."""
    return built("written.qcow2", copy_qcow2)


def copy_qcow2(path: Path) -> None:
    shutil.copyfile(qcow2(), path)


def fragmented() -> Path:
    return built("fragmented.qcow2", tables.build_fragmented)


def tebibyte() -> Path:
    return built("map.qcow2", tables.build_map)


def bitmaps() -> Path:
    return built("bitmaps.qcow2", tables.build_bitmaps)


def chain() -> Path:
    """Three layers, the guest's clusters spread over all of them in runs of 1 to 32."""
    for name in LAYERS[:-1]:
        built(layer_name(name), build_layer)
    return built(layer_name(LAYERS[-1]), build_layer)


def layer_name(layer: str) -> str:
    return f"chain-{layer}.qcow2"


def build_layer(path: Path) -> None:
    number = [Path(layer_name(name)).stem for name in LAYERS].index(path.stem)
    backing = ["-b", layer_name(LAYERS[number - 1]), "-F", "qcow2"] if number else []
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, path, str(SIZE))
    chance = random.Random(0)
    writes = []
    place = 0
    while place < SIZE:
        length = min(chance.choice(RUNS) * tables.CLUSTER, SIZE - place)
        if chance.randrange(len(LAYERS)) == number:
            writes.append(f"write -q -P {1 + place // length % 255} {place} {length}\n")
        place += length
    peers.run("qemu-io", "-f", "qcow2", path, stdin="".join(writes), timeout=300)


def zlib() -> Path:
    return built("zlib.qcow2", build_zlib)


def zstd() -> Path:
    return built("zstd.qcow2", build_zstd)


def build_zlib(path: Path) -> None:
    compress(path, "zlib")


def build_zstd(path: Path) -> None:
    compress(path, "zstd")


def compress(path: Path, kind: str) -> None:
    options = ["-O", "qcow2", "-c", "-o", f"compression_type={kind}"]
    source = built("text.raw", build_text)
    peers.run("qemu-img", "convert", "-f", "raw", *options, source, path, timeout=300)


def build_text(path: Path) -> None:
    """512 MiB of made-up words, some frequent and most rare; compressed, less than half is left."""
    chance = np.random.default_rng(0)
    letters = np.frombuffer(LETTERS, np.uint8)
    words = [
        chance.choice(letters, length).tobytes() + b" " for length in chance.integers(2, 12, 8000)
    ]
    lengths = np.array([len(word) for word in words])
    starts = np.cumsum(lengths) - lengths
    glossary = np.frombuffer(b"".join(words), np.uint8)

    def text(count: int) -> bytes:
        chosen = (chance.random(count) ** 5 * len(words)).astype(np.int64)
        length = lengths[chosen]
        shift = starts[chosen] - (np.cumsum(length) - length)
        said: NDArray[np.uint8] = glossary[np.arange(length.sum()) + np.repeat(shift, length)]
        return said.tobytes()

    with path.open("wb") as file:
        while file.tell() < COMPRESSED_SIZE:
            file.write(text(1 << 18))
        file.truncate(COMPRESSED_SIZE)


def empty(size: int = EMPTY_SIZE) -> Path:
    """A new image with nothing in it."""
    FRESH.mkdir(parents=True, exist_ok=True)
    path = FRESH / "empty.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))
    return path


def empty_tebibyte() -> Path:
    return empty(1 << 40)


def overlay() -> Path:
    """A new overlay with nothing in it, over the image with every cluster allocated."""
    FRESH.mkdir(parents=True, exist_ok=True)
    path = FRESH / "overlay.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2(), "-F", "qcow2", path)
    return path
