"""One image of the matrix from its making to the verdict, with pynbd as its server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path

import numpy as np

from interop import peers
from interop.conftest import serving
from interop.soak import verdict
from interop.soak.matrix import Image, Row, build
from interop.soak.mix import Form, Mix, Request
from interop.soak.shadow import Bytes, Shadow

LIBNBD_MIX = Path(__file__).with_name("libnbd_mix.py")
# Requests of the first and the last session of an image with bitmaps: few enough that they do not
# mark all of it.
FEW = 24
# Requests before the clients leave in the middle of a session.
LAST = 60


def form_of(row: Row) -> Form:
    return Form(row.size, row.cluster_size, row.subcluster_size, row.hides_what_is_discarded)


def by_pynbd(path: Path, *options: str) -> AbstractContextManager[str]:
    return serving(path, "-f", "qcow2", *options)


def sessions(row: Row, requests: int) -> list[int]:
    """After so many requests each the server is ended, and the image looked at."""
    few = [FEW] if row.bitmaps else []
    most = requests - 2 * sum(few)
    return [*few, most - most // 2, most // 2, *few]


def run_row(row: Row, folder: Path, requests: int, *, by_libnbd: int = 0) -> Counter[str]:
    """Send so many requests to the image of a row, and ``by_libnbd`` others through that; what was
    answered, by kinds. Raises AssertionError, which names the row.
    """
    try:
        image = build(row, folder / "image")
        twin = verdict.Twin(image, folder / "twin") if row.bitmaps else None
        before = verdict.Before(image)
        shadow = Shadow(verdict.guest_disk(image.path))
        verdict.judge_raw(image, shadow.content)
        mix = Mix(shadow, form_of(row))
        detecting = cycle(("off", "on", "unmap"))
        for session, count in enumerate(sessions(row, requests)):
            with by_pynbd(image.path, f"--detect-zeroes={next(detecting)}") as uri:
                asyncio.run(_mixed(mix, uri, count, f"mix {row.seed} {session}"))
                if session == 1 and by_libnbd:
                    shadow.content = _through_libnbd(image, uri, by_libnbd, mix)
                elif twin is None:  # else what the bitmaps are to hold would be open
                    asyncio.run(mix.run(uri, LAST, f"left {row.seed} {session}", leave=True))
            verdict.judge(image, before, shadow)
            if twin:
                mix.counts["bitmaps"] += twin.judge_bitmaps(mix.changes)
                mix.changes.clear()
    except Exception as error:
        error.add_note(f"{row}, {requests} requests")
        raise
    return mix.counts


async def _mixed(mix: Mix, uri: str, requests: int, seed: str) -> None:
    await mix.run(uri, requests, seed)
    await mix.read_all(uri)


def _through_libnbd(image: Image, uri: str, requests: int, mix: Mix) -> Bytes:
    """What the disk holds afterwards; ``mix`` learns what was asked for."""
    row, content = image.row, image.path.with_name("content")
    mix.shadow.content.tofile(content)
    trims = "yes" if row.hides_what_is_discarded else "no"
    given = [uri, content, row.cluster_size, requests, f"libnbd {row.seed}", trims]
    script = (
        f"import runpy, sys; sys.argv[1:] = {list(map(str, given))};"
        f" runpy.run_path({str(LIBNBD_MIX)!r}, run_name='__main__')"
    )
    said = json.loads(peers.run("nbdsh", "-n", "-c", script, timeout=300).stdout)
    mix.counts.update(said["counts"])
    mix.changes += [
        Request(0, kind, offset, length, no_hole=no_hole)
        for kind, offset, length, no_hole in said["changes"]
    ]
    return np.fromfile(content, np.uint8)
