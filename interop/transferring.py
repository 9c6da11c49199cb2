"""``pynbd copy`` and ``pynbd compare`` as their users start them, and other people's judgement of
what came out.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from interop import peers
from pynbd.client.compare import Comparison, compare
from pynbd.client.copy import copy
from pynbd.client.dirty import dirty_ranges
from pynbd.client.ends import Reading, Writing, open_disk, open_target


def pynbd(*args: str | Path, status: int = 0, says: str = "") -> str:
    """Run a subcommand to its end; its output. It leaves with ``status``, and on standard error
    there is a line with ``says``, or nothing.
    """
    line = [sys.executable, "-m", "pynbd", *map(str, args)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, f"{line}: status {done.returncode}\n{done.stderr}"
    if says:
        assert says in done.stderr
        assert done.stderr.startswith("pynbd: ")
        assert done.stderr.count("\n") == 1
    else:
        assert done.stderr == ""
    return done.stdout


def same(a: Path | str, b: Path | str, formats: tuple[str, str] = ("raw", "raw")) -> None:
    """qemu-img finds no difference; a URI is raw."""
    said = peers.run("qemu-img", "compare", "-f", formats[0], "-F", formats[1], a, b)
    assert said.stdout == "Images are identical.\n"


def copied(source: Path | str, target: Path | str, *, bitmap: str | None = None) -> None:
    """`pynbd copy` without a process of its own."""

    async def work() -> None:
        async with open_disk(str(source), Reading(bitmap=bitmap)) as disk:
            ranges = await dirty_ranges(disk, bitmap) if bitmap else None
            async with open_target(str(target), disk, Writing(), whole=not bitmap) as place:
                await copy(disk, place, ranges=ranges)

    asyncio.run(work())


def compared(a: Path | str, b: Path | str, *, strict: bool = False) -> Comparison:
    """`pynbd compare --all` without a process of its own."""

    async def work() -> Comparison:
        async with open_disk(str(a), Reading()) as left, open_disk(str(b), Reading()) as right:
            return await compare(left, right, strict=strict, every=True)

    return asyncio.run(work())
