"""Whether an image that a crash has left keeps every promise.

It opens for reading, and for reading and writing; nothing in it is corrupt (leaks may be there, but
with lazy refcounts not after it was opened for writing and closed); the guest's disk, and a raw
data file, hold what `Cells` allow; a bitmap that is not in use covers all that has changed;
internal snapshots are as they were; an unknown autoclear bit is there only if nothing has changed.

The files are judged where nothing else is: they are written anew for each image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interop import peers
from interop.soak.cells import CELL, Bools, Cells, Request, cells_of
from interop.soak.plans import SNAPSHOT, Files, Plan, unknown_autoclear
from interop.soak.recording import SteppedEngine
from interop.soak.replay import SECTOR
from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.cache_modes import Cache
from pynbd.block.chain import open_image
from pynbd.block.extent import DATA, ZERO
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.check import check
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.errors import PynbdError


class Broken(Exception):
    """A promise that an image does not keep."""


@dataclass(slots=True)
class Before:
    """What there was before the run: the files, and what qemu-img reads in them."""

    files: Files
    disk: bytes
    snapshot: bytes | None
    bitmaps: Mapping[str, Bools | None]  # by granules; None if it cannot be used

    @classmethod
    async def of(cls, plan: Plan, image: Path) -> Before:
        files = {name: image.with_name(name).read_bytes() for name in plan.files}
        disk = _converted(plan, image)
        snapshot = _converted(plan, image, "-l", SNAPSHOT) if plan.snapshot else None
        engine = SteppedEngine(0, turns=False)
        async with await open_image(image, format=plan.format, engine=engine) as node:
            bitmaps: dict[str, Bools | None] = dict.fromkeys(node.inconsistent_bitmaps())
            bitmaps |= {bitmap.name: await _bits(bitmap) for bitmap in node.bitmaps()}
        return cls(files, disk, snapshot, bitmaps)


class Judge:
    """Judges the images of one run, in ``folder``, which has nothing but what is below them."""

    def __init__(self, plan: Plan, folder: Path, before: Before, asked: Sequence[Request]) -> None:
        self._plan = plan
        self._folder = folder
        self._before = before
        self._disk = Cells(before.disk, asked)
        # After a crash both hold what is allowed, and that may be two things: then what is zero in
        # the guest only is written, too, around what a later request puts into its cluster.
        self._raw = None
        if plan.raw_data_file:
            self._raw = Cells(before.files[plan.files[-1]], asked, also=before.disk)
        self._engine = SteppedEngine(0, turns=False)
        self.image = folder / plan.files[0]

    def advance(self, moment: int) -> None:
        """Judge from now on what a crash at ``moment`` leaves."""
        for cells in filter(None, (self._disk, self._raw)):
            cells.advance(moment)

    async def judge(self, contents: Mapping[str, bytes | bytearray], *, peer: bool = False) -> None:
        """Raise `Broken` if the image breaks a promise. ``peer``: ask qemu-img, too."""
        self._place(contents)
        self._autoclear(contents)
        try:
            await self._reading(contents if not peer else None)
            if self._plan.format == "qcow2":
                await self._writing(peer=peer)
        except (PynbdError, OSError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from error

    def _autoclear(self, contents: Mapping[str, bytes | bytearray]) -> None:
        if self._plan.autoclear and unknown_autoclear(contents[self.image.name]):
            for name, content in contents.items():
                if content[SECTOR:] != self._before.files[name][SECTOR:]:
                    raise Broken(f"{name} has changed under an unknown autoclear bit")

    async def closed(self, contents: Mapping[str, bytes | bytearray]) -> None:
        """Raise `Broken` unless an image that was closed as it should be leaves nothing to wish."""
        self._place(contents)
        await self._reading()
        if self._plan.format == "qcow2":
            check_by_peer(self.image, leaks=False)
            async with await self._open() as node:
                if node.inconsistent_bitmaps():
                    raise Broken("it was closed, and a bitmap is in use")
                disk = await node.pread(0, node.size)
            if self._raw and disk != contents[self._plan.files[-1]]:
                raise Broken("it was closed, and the raw data file is not the disk")

    def _place(self, contents: Mapping[str, bytes | bytearray]) -> None:
        for name, content in contents.items():
            (self._folder / name).write_bytes(content)

    async def _reading(self, contents: Mapping[str, bytes | bytearray] | None = None) -> None:
        """``contents``: of the files, to be looked at where the image maps them; without them
        everything is read, which takes longer.
        """
        async with await self._open() as node:
            disk = await _disk(node, contents)
            _hold("the disk", disk, self._disk)
            if isinstance(node, Qcow2Node):
                await self._bitmaps(node, disk)
                if not self._plan.lazy:
                    await self._check(node, leaks=True)
        if self._raw:
            raw = self._folder.joinpath(self._plan.files[-1]).read_bytes()
            _hold("the raw data file", raw, self._raw)
        if self._before.snapshot is not None:
            async with await self._open(snapshot=SNAPSHOT) as node:
                if await _disk(node, contents) != self._before.snapshot:
                    raise Broken("the internal snapshot has changed")

    async def _writing(self, *, peer: bool) -> None:
        if peer and not self._plan.lazy:
            check_by_peer(self.image, leaks=True)
        async with await self._open(read_only=False):
            pass
        if self._plan.lazy:
            async with await self._open() as node:
                assert isinstance(node, Qcow2Node)
                _hold("the repaired disk", await node.pread(0, node.size), self._disk)
                await self._check(node, leaks=False)
            if peer:
                check_by_peer(self.image, leaks=False)

    async def _open(self, *, read_only: bool = True, snapshot: str | None = None) -> BlockNode:
        return await open_image(
            self.image,
            format=self._plan.format,
            read_only=read_only,
            snapshot=snapshot,
            engine=self._engine,
            cache=Cache.UNSAFE,
        )

    async def _bitmaps(self, node: BlockNode, disk: bytearray) -> None:
        usable = {bitmap.name: bitmap for bitmap in node.bitmaps()}
        names = {*usable, *node.inconsistent_bitmaps()}
        if names != self._before.bitmaps.keys():
            raise Broken(f"the bitmaps are {sorted(names)}")
        changed = (cells_of(disk) != self._disk.first).any(1)
        for name, bitmap in usable.items():
            bits, were = await _bits(bitmap), self._before.bitmaps[name]
            if were is None:
                raise Broken(f"the bitmap {name} was in use, and is not any more")
            if bitmap.enabled:
                edges = np.arange(0, len(changed), bitmap.granularity // CELL)
                missing = (np.logical_or.reduceat(changed, edges) | were) & ~bits
            else:
                missing = bits != were
            if missing.any():
                granule = int(np.argmax(missing))
                raise Broken(f"the bitmap {name} is not right about granule {granule}")

    async def _check(self, node: Qcow2Node, *, leaks: bool) -> None:
        found = await check(node.metadata_file, node.header)
        if found.corruptions or found.check_errors or (found.leaks and not leaks):
            raise Broken(f"our check: {'; '.join(found.findings[:5])}")


async def _disk(node: BlockNode, contents: Mapping[str, bytes | bytearray] | None) -> bytearray:
    """All guest bytes of a node."""
    if contents is None or node.file is None:
        return await node.pread(0, node.size)
    content = contents[Path(node.file.path).name]
    sectors = np.zeros((-(-len(content) // SECTOR) + 1, SECTOR), np.uint8)  # the last is zero
    sectors.reshape(-1)[: len(content)] = np.frombuffer(content, np.uint8)
    disk = np.zeros((node.size // SECTOR, SECTOR), np.uint8)
    at = 0
    while at < node.size:
        runs = await node.lookup(at, node.size - at)
        plain = (runs.kind == DATA) & (runs.depth == 1)
        first, count = runs.starts[plain] // SECTOR, runs.lengths[plain] // SECTOR
        shift = np.repeat(runs.host[plain] // SECTOR - first, count)
        places = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        disk[places] = sectors[np.minimum(places + shift, len(sectors) - 1)]
        for row in np.flatnonzero(~plain & (runs.kind != ZERO)).tolist():
            start, end = int(runs.starts[row]), int(runs.ends[row])
            part = np.frombuffer(await node.pread(start, end - start), np.uint8)
            disk[start // SECTOR : end // SECTOR] = part.reshape(-1, SECTOR)
        at = runs.end
    return bytearray(disk.data.cast("B"))


def _hold(what: str, content: bytes | bytearray, cells: Cells) -> None:
    if wrong := cells.wrong(content):
        raise Broken(f"{what}: {wrong}")


def check_by_peer(image: Path, *, leaks: bool) -> None:
    """Raise `Broken` unless qemu-img finds nothing, or ``leaks`` at most."""
    line = ["check", "-f", "qcow2", "--output=json", image.name]
    said = peers.run("qemu-img", *line, cwd=image.parent, check=False)
    found = json.loads(said.stdout)
    bad = {key: found[key] for key in ("check-errors", "corruptions") if found.get(key)}
    if found.get("leaks") and not leaks:
        bad["leaks"] = found["leaks"]
    if bad or said.returncode not in (0, 3):
        raise Broken(f"qemu-img check: {bad}: {said.stderr[:600]}")


def _converted(plan: Plan, image: Path, *options: str) -> bytes:
    target = image.with_suffix(".converted")
    line = ["convert", "-q", "-f", plan.format, "-O", "raw", *options, image.name, target.name]
    peers.run("qemu-img", *line, cwd=image.parent)
    content = target.read_bytes()
    target.unlink()
    return content


async def _bits(bitmap: DirtyBitmap) -> Bools:
    await bitmap.load()
    granules = -(-bitmap.size // bitmap.granularity)
    return np.array(bitmap.bits[:granules].tolist(), np.bool_)
