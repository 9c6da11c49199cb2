"""A mix of requests to an image for which its host has no more space, and then has again.

NBD_ENOSPC is the answer to what needs more; the connection goes on, and so does everything else:
what was acknowledged is flushed and stored even if there never is any room again.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from interop import peers
from interop.conftest import serving
from interop.faults.process import served_by
from interop.soak import verdict
from interop.soak.matrix import Image, build, row
from interop.soak.mix import Mix
from interop.soak.runs import form_of
from interop.soak.shadow import Shadow
from interop.soak.turns import CHOICES
from pynbd.protocol.values import Error

REQUESTS = 400
FILE_SYSTEM = 64 << 20

rooms = pytest.mark.parametrize("room", [True, False])


@pytest.fixture
def file_system() -> Iterator[Path]:
    """A file system of 64 MiB in memory, in a mount namespace that this process looks into."""
    mount = f"mount -t tmpfs -o size={FILE_SYSTEM} none /mnt && echo mounted && exec cat"
    line = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            pytest.skip("no mount namespace is to be had")
        yield Path(f"/proc/{holder.pid}/root/mnt")


@rooms
def test_longest_file(room: bool, tmp_path: Path) -> None:
    """The limit of a file's size: EFBIG, which is the same NBD error."""
    image = made("small", tmp_path / "image")
    limit = image.path.stat().st_size + image.row.size // 4

    def lift(uri: str) -> None:
        resource.prlimit(served_by(uri), resource.RLIMIT_FSIZE, (-1, -1))

    fill(image, ["prlimit", f"--fsize={limit}:"], lift if room else None)


@rooms
@pytest.mark.parametrize("name", CHOICES)
def test_full_file_system(name: str, room: bool, file_system: Path) -> None:
    image, other = made(name, file_system / "image"), file_system / "other"
    used = sum(path.stat().st_blocks * 512 for path in file_system.rglob("*"))
    with other.open("wb") as file:
        file.write(bytes(FILE_SYSTEM - used - image.row.size // 4))
    fill(image, [], (lambda _: other.unlink()) if room else None)


def made(name: str, folder: Path) -> Image:
    peers.require("qemu-img", "qemu-io")
    return build(row(f"no-space-{name}", CHOICES[name] | {"bitmaps": "none"}, 1), folder)


def fill(image: Image, under: Sequence[str], make_room: Callable[[str], None] | None) -> None:
    """Write until there is no more room, and go on; and, if there is some again, on and on."""
    before, shadow = verdict.Before(image), Shadow(verdict.guest_disk(image.path))
    mix = Mix(shadow, form_of(image.row), tolerated=[Error.ENOSPC])
    with serving(image.path, "-f", "qcow2", under=under, says="(pynbd: .*\n)+") as uri:
        asyncio.run(run(mix, uri, "full"))
        assert mix.counts["write: NBD_ENOSPC"] > 10
        if make_room:
            make_room(uri)
            writer = Mix(shadow, form_of(image.row))
            asyncio.run(run(writer, uri, "room"))
            assert not any("ENOSPC" in kind for kind in writer.counts)
    verdict.judge(image, before, shadow)


async def run(mix: Mix, uri: str, seed: str) -> None:
    await mix.run(uri, REQUESTS, seed)
    await mix.read_all(uri)
