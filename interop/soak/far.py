"""Disks with more L2 tables than the server keeps in memory, seen through windows.

Tables are dropped and read again while they are changed, and so many are changed at a time that
they are written without anybody asking for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interop import peers
from interop.soak import verdict
from interop.soak.mix import Form, Mix
from interop.soak.runs import by_pynbd
from interop.soak.shadow import Shadow


class Shape(NamedTuple):
    """Options of qemu-img, length of a cluster; how many windows, how long, how far apart."""

    options: str
    cluster_size: int
    subcluster_size: int
    windows: int
    window: int
    stride: int


SHAPES = {
    # 8 tables fit; each maps 512 GiB.
    "2M": Shape("cluster_size=2M", 2 << 20, 2 << 20, 12, 4 << 20, 512 << 30),
    "64k": Shape("cluster_size=64k", 64 << 10, 64 << 10, 300, 192 << 10, 512 << 20),
    "subclusters": Shape("extended_l2=on", 64 << 10, 2 << 10, 300, 128 << 10, 256 << 20),
}


def run_far(name: str, folder: Path, requests: int, seed: int) -> Counter[str]:
    """Send so many requests to a new image; what was answered, by kinds."""
    shape, path = SHAPES[name], folder / "disk.qcow2"
    size = shape.windows * shape.stride
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape.options, path, str(size))
    form = Form(
        shape.windows * shape.window,
        shape.cluster_size,
        shape.subcluster_size,
        window=shape.window,
        stride=shape.stride,
    )
    mix = Mix(Shadow(np.zeros(form.size, np.uint8)), form)
    with by_pynbd(path) as uri:
        asyncio.run(_mixed(mix, uri, requests, f"far {name} {seed}"))
    verdict.checked(path)
    with peers.qemu_nbd(path, "-r", "-f", "qcow2") as uri:
        asyncio.run(mix.read_all(uri))
    return mix.counts


async def _mixed(mix: Mix, uri: str, requests: int, seed: str) -> None:
    await mix.run(uri, requests, seed)
    await mix.read_all(uri)
