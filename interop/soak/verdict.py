"""What is left when the server has ended: looked at by qemu's tools, and by our own check.

1. Nobody finds an error or a leak; the image is not marked as in use.
2. The guest disk is the shadow's; a raw data file is the guest disk.
3. What nobody wrote to is as it was: internal snapshots, the files below.
4. A bitmap that was recording holds what qemu-nbd records for the same requests, one that was not
   what it held before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from interop import peers
from interop.soak.matrix import SNAPSHOT, Image, build
from interop.soak.mix import Request
from interop.soak.shadow import Bytes, Shadow
from pynbd.client.connection import Client

_REPLAYED_AT_ONCE = 16


def guest_disk(path: Path, *snapshot: str) -> Bytes:
    """What a guest reads, or read when the snapshot was made, as qemu-img tells it."""
    with tempfile.TemporaryDirectory(prefix="guest-") as folder:
        raw = Path(folder) / "raw"
        peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *snapshot, path, raw)
        return np.fromfile(raw, np.uint8)


def digest(content: Bytes) -> str:
    return hashlib.sha256(content.tobytes()).hexdigest()


class Before:
    """What has to be the same afterwards."""

    def __init__(self, image: Image) -> None:
        self.snapshot = snapshot_of(image)
        self.below = [digest(np.fromfile(path, np.uint8)) for path in image.backing]


def snapshot_of(image: Image) -> str:
    if image.row.choice["snapshot"] == "no":
        return ""
    return digest(guest_disk(image.path, "-l", SNAPSHOT))


def judge(image: Image, before: Before, shadow: Shadow) -> None:
    """Hold what is left against what was before, and what the guest wrote."""
    checked(image.path)
    content = guest_disk(image.path)
    shadow.abandoned(content)
    after = Before(image)
    assert after.below == before.below, "a backing file has changed"
    assert after.snapshot == before.snapshot, "the snapshot has changed"
    judge_raw(image, content)


def judge_raw(image: Image, content: Bytes) -> None:
    """What others read from a raw data file is the guest disk, and zeroes to the cluster's end."""
    if image.data_file and image.row.choice["data_file"] == "raw":
        raw = np.fromfile(image.data_file, np.uint8)
        assert len(content) <= len(raw) < len(content) + image.row.cluster_size
        assert np.array_equal(raw[: len(content)], content), "a raw data file differs"
        assert not raw[len(content) :].any()


def checked(path: Path) -> None:
    """Neither check finds anything, and nothing says that the image is in use."""
    info = json.loads(peers.run("qemu-img", "info", "--output=json", path).stdout)
    assert not info["dirty-flag"]
    specific = info["format-specific"]["data"]
    assert not specific.get("corrupt")
    for bitmap in specific.get("bitmaps", ()):
        assert "in-use" not in bitmap["flags"], bitmap
    ours = [sys.executable, "-m", "pynbd", "check", str(path)]
    for line in [*peers.command("qemu-img"), "check", str(path)], ours:
        said = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, f"{line}: {said.returncode}\n{said.stdout}{said.stderr}"


def dirty(path: Path, names: Iterable[str]) -> list[set[int]]:
    """The sectors that each bitmap calls dirty, as qemu-nbd and nbdinfo tell it."""
    options = [word for name in names for word in ("-B", name)]
    with peers.qemu_nbd(path, "-r", "-f", "qcow2", *options) as uri:
        context = "--map=qemu:dirty-bitmap:"
        maps = [peers.run("nbdinfo", "--json", f"{context}{name}", uri).stdout for name in names]
    return [set(_sectors(json.loads(text))) for text in maps]


def _sectors(extents: Iterable[dict[str, int]]) -> Iterator[int]:
    for extent in extents:
        if extent["type"]:
            first = extent["offset"] // 512
            yield from range(first, first - -extent["length"] // 512)


class Twin:
    """A second image of a row, to which qemu-nbd does what was done to the first."""

    def __init__(self, image: Image, folder: Path) -> None:
        self._image = image
        self._twin = build(image.row, folder)
        self._names = [name for name, _, _ in image.row.bitmaps]

    def judge_bitmaps(self, changes: Sequence[Request]) -> int:
        """Hold them against each other after these changes, and let those that record begin anew;
        how many there are.
        """
        with peers.qemu_nbd(self._twin.path, "-f", "qcow2", "--discard=unmap") as uri:
            asyncio.run(replay(uri, changes))
        both = [dirty(image.path, self._names) for image in (self._image, self._twin)]
        for name, ours, theirs in zip(self._names, *both, strict=True):
            assert ours == theirs, f"bitmap {name}: {_difference(ours, theirs, changes)}"
        for image in self._image, self._twin:
            for name, _, enabled in image.row.bitmaps:
                if enabled:
                    peers.run("qemu-img", "bitmap", "--clear", image.path, name)
        return len(self._names)


def _difference(ours: set[int], theirs: set[int], changes: Sequence[Request]) -> str:
    where = min(ours ^ theirs) * 512
    touched = [str(c) for c in changes if c.offset < where + 512 and where < c.offset + c.length]
    return (
        f"{len(ours - theirs)} sectors are dirty here only, {len(theirs - ours)} by qemu-nbd only;"
        f" the first that differs lies at {where}, and was changed by {touched or 'nobody'}"
    )


async def replay(uri: str, changes: Iterable[Request]) -> None:
    """Carry out changes in any order: they mark the same."""
    wanted = iter(changes)

    async def work(client: Client) -> None:
        for request in wanted:
            if request.kind in ("write", "blank"):
                await client.pwrite(request.offset, bytes(request.length))
            elif request.kind == "zeroes":
                await client.write_zeroes(request.offset, request.length, no_hole=request.no_hole)
            else:
                await client.trim(request.offset, request.length)

    async with await Client.open(uri) as client, asyncio.TaskGroup() as group:
        for _ in range(_REPLAYED_AT_ONCE):
            group.create_task(work(client))
