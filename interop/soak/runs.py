"""One image of the matrix from its making to the verdict, with pynbd as its server."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from interop import peers
from interop.conftest import serving
from interop.soak import verdict
from interop.soak.matrix import Image, Row, build
from interop.soak.mix import Form, Mix, Request
from interop.soak.shadow import Bytes, Shadow

LIBNBD_MIX = Path(__file__).with_name("libnbd_mix.py")
# How often the server is ended, and the image looked at, in a run.
SESSIONS = 3
# Requests before the clients leave in the middle of a session.
LAST = 60


def form_of(row: Row) -> Form:
    return Form(row.size, row.cluster_size, row.subcluster_size, row.hides_what_is_discarded)


def by_pynbd(path: Path, *options: str) -> AbstractContextManager[str]:
    return serving(path, "-f", "qcow2", *options)


def run_row(row: Row, folder: Path, requests: int, *, by_libnbd: int = 0) -> Counter[str]:
    """Send so many requests to the image of a row, ``by_libnbd`` of them through that; what was
    answered, by kinds. Raises AssertionError, which names the row.
    """
    try:
        image = build(row, folder / "image")
        before = verdict.Before(image)
        shadow = Shadow(verdict.guest_disk(image.path))
        verdict.judge_raw(image, shadow.content)
        mix = Mix(shadow, form_of(row))
        for session, detect in zip(range(SESSIONS), ("off", "on", "unmap"), strict=True):
            last = session == SESSIONS - 1
            with by_pynbd(image.path, f"--detect-zeroes={detect}") as uri:
                count = (requests - by_libnbd) // SESSIONS
                asyncio.run(_mixed(mix, uri, count, f"mix {row.seed} {session}"))
                if last and by_libnbd:
                    shadow.content = _through_libnbd(image, uri, by_libnbd, mix)
                elif not last and not row.bitmaps:  # else what they are to hold would be open
                    asyncio.run(mix.run(uri, LAST, f"left {row.seed} {session}", leave=True))
            verdict.judge(image, before, shadow)
        mix.counts["bitmaps"] = verdict.judge_bitmaps(image, mix.changes)
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
