"""One image, written by pynbd and by QEMU in turns; after each turn both look at it.

QEMU's turn is qemu-nbd's, qemu-storage-daemon's or qemu-io's; now and then qemu-img makes or
deletes a snapshot and clears a bitmap between them. The shadow goes with the image all the way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random

import numpy as np

from interop import peers, samples, storage_daemon
from interop.soak import verdict
from interop.soak.matrix import BYTES, Choice, Image, Row, build, row
from interop.soak.mix import Mix
from interop.soak.runs import by_pynbd, form_of
from interop.soak.shadow import Shadow

REQUESTS = 80  # of a turn
_PLAIN = {
    "cluster_size": "64k",
    "extended_l2": "off",
    "compat": "1.1",
    "refcount_bits": "16",
    "lazy_refcounts": "off",
    "backing": "short",
    "compression": "zlib",
    "data_file": "none",
    "snapshot": "yes",
    "bitmaps": "several",
    "preallocation": "off",
}
CHOICES: dict[str, Choice] = {
    "plain": _PLAIN,
    "small": _PLAIN | {"cluster_size": "512", "refcount_bits": "64", "lazy_refcounts": "on"},
    "subclusters": _PLAIN | {"extended_l2": "on", "compression": "zstd", "refcount_bits": "8"},
}
_SNAPSHOT = "turn"


@contextmanager
def by_storage_daemon(path: Path) -> Iterator[str]:
    node = f"driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={path}"
    with (
        peers.socket_path() as socket,
        storage_daemon.running(socket.parent, node, export="disk") as (_, uri),
    ):
        yield uri


def by_qemu_nbd(path: Path) -> AbstractContextManager[str]:
    return peers.qemu_nbd(path, "-f", "qcow2", "--discard=unmap")


class Turns:
    """An image of a choice in a new folder. ``counts`` says how many requests of each kind were
    answered, and how many turns each had.
    """

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self.row: Row = row(f"turns-{name}", CHOICES[name], seed)
        self.image: Image = build(self.row, folder / name)
        self.before = verdict.Before(self.image)
        self._mix = Mix(Shadow(verdict.guest_disk(self.image.path)), form_of(self.row))
        self.counts = self._mix.counts
        self._rng = Random(f"turns {name} {seed}")

    def run(self, turns: int, requests: int = REQUESTS) -> Counter[str]:
        """Half of the turns are pynbd's. Raises AssertionError, which names the turn."""
        for number in range(turns):
            others: list[Callable[[int], None]] = [
                self._by_qemu_nbd,
                self._by_storage_daemon,
                self._by_qemu_io,
            ]
            turn = self._rng.choice(others) if number % 2 else self._by_pynbd
            try:
                turn(requests)
                verdict.judge(self.image, self.before, self._mix.shadow)
            except Exception as error:
                error.add_note(f"turn {number}, {turn.__name__}: {self.row}")
                raise
            self.counts[turn.__name__.removeprefix("_")] += 1
            if number % 8 == 7:
                self._between(number)
        return self.counts

    def _by_pynbd(self, requests: int) -> None:
        self._over_nbd(by_pynbd(self.image.path), requests, qemu=False)

    def _by_qemu_nbd(self, requests: int) -> None:
        self._over_nbd(by_qemu_nbd(self.image.path), requests, qemu=True)

    def _by_storage_daemon(self, requests: int) -> None:
        self._over_nbd(by_storage_daemon(self.image.path), requests, qemu=True)

    def _over_nbd(self, server: AbstractContextManager[str], requests: int, *, qemu: bool) -> None:
        self._mix.shadow.qemu = qemu
        with server as uri:
            asyncio.run(self._mixed(uri, requests))

    async def _mixed(self, uri: str, requests: int) -> None:
        await self._mix.run(uri, requests, f"{self._rng.random()}")
        await self._mix.read_all(uri)

    def _by_qemu_io(self, requests: int) -> None:
        samples.qemu_io(self.image.path, *self._commands(requests // 4))

    def _commands(self, count: int) -> Iterator[str]:
        """Commands of qemu-io, which the shadow obeys, too."""
        rng, size, cluster = self._rng, self.row.size, BYTES[self.row.choice["cluster_size"]]
        for kind in rng.choices(["write", "write -z", "write -z -u", "discard"], k=count):
            unit = cluster if kind == "discard" else rng.choice([1, 512, cluster])
            length = rng.randrange(1, max(2, 4 * cluster // unit)) * unit
            offset = rng.randrange(size - length + 1) // unit * unit
            value = rng.randrange(1, 256) if kind == "write" else 0
            content = np.full(length, value, np.uint8)
            self._mix.shadow.completed(self._mix.shadow.begin(offset, length, content))
            yield f"{kind} -q{f' -P {value}' if value else ''} {offset} {length}"
            self.counts[f"qemu-io {kind.split()[0]}"] += 1

    def _between(self, number: int) -> None:
        """A snapshot comes, or goes, and a bitmap begins anew."""
        path = self.image.path
        peers.run("qemu-img", "snapshot", "-c" if number % 16 == 7 else "-d", _SNAPSHOT, path)
        peers.run("qemu-img", "bitmap", "--clear", path, self.row.bitmaps[0][0])
        verdict.checked(path)
