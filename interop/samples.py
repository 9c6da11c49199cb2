"""Small images that several tests serve. Their contents come from here, from qemu-img and qemu-io.

Nothing here knows pynbd.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from interop import peers

BLOCK = 1 << 16


def qemu_io(image: Path | str, *commands: str, driver: str = "qcow2") -> None:
    """Run qemu-io commands on an image or a URI; an AssertionError shows the first that failed."""
    line = [word for command in commands for word in ("-c", command)]
    peers.run("qemu-io", "-d", "unmap", "-f", driver, *line, image)


def sparse_file(path: Path, size: int, seed: int = 1) -> bytes:
    """Write a raw image of blocks of noise, of written zeroes and of holes; its content."""
    rng = random.Random(seed)
    content = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, BLOCK):
            length = min(BLOCK, size - offset)
            kind = rng.choice(["noise", "noise", "zeroes", "hole"])
            if kind != "hole":
                data = rng.randbytes(length) if kind == "noise" else bytes(length)
                content[offset : offset + length] = data
                file.seek(offset)
                file.write(data)
    return bytes(content)


def empty_file(path: Path, size: int) -> None:
    """Write a raw image that is one hole (qemu-img would allocate its first block)."""
    path.touch()
    os.truncate(path, size)


def allocated(path: Path) -> int:
    """Bytes that a file takes on its file system."""
    return path.stat().st_blocks * 512


def chain(folder: Path) -> Path:
    """The top of three layers: raw, compressed qcow2, and qcow2 with two persistent bitmaps.

    8 MiB and a half cluster. ``b0`` has 4 KiB for each bit and is recording, ``b1`` 64 KiB and is
    disabled.
    """
    size = (8 << 20) + (32 << 10)
    base, middle, top = (folder / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    sparse_file(base, 6 << 20)
    options = ["-o", "compression_type=zstd"]
    below = ["-b", base.name, "-F", "raw"]
    create = ["create", "-q", "-f", "qcow2"]
    peers.run("qemu-img", *create, *options, *below, middle, str(size))
    qemu_io(middle, "write -q -c -P 17 512k 1M", "write -q -z 4M 512k")
    peers.run("qemu-img", *create, "-b", middle.name, "-F", "qcow2", top, str(size))
    qemu_io(top, "write -q -P 18 1M 100k")
    peers.run("qemu-img", "bitmap", "--add", "-g", "4k", top, "b0")
    qemu_io(top, "write -q -P 19 5M 200k", "write -q -z 2M 64k")
    peers.run("qemu-img", "bitmap", "--add", "-g", "64k", top, "b1")
    qemu_io(top, "write -q -P 20 100k 10k", f"write -q -P 21 {size - 512} 512")
    peers.run("qemu-img", "bitmap", "--disable", top, "b1")
    return top
