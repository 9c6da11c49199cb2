"""``pynbd copy`` and ``pynbd compare`` as their users start them, and other people's judgement of
what came out.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from interop import peers
from pynbd.cli import complaints
from pynbd.cli.main import commands
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
    assert (done.returncode, _is_said(says, done.stderr)) == (status, True), done
    return done.stdout


def pynbd_here(*args: str | Path, status: int = 0, says: str = "") -> str:
    """The same without a process of its own; for what does not warn."""
    output, errors = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["pynbd", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            complaints.run(commands, "pynbd")
    said = errors.getvalue()
    assert (end.value.code or 0, _is_said(says, said)) == (status, True), said
    output.seek(0)
    return output.read()


def _is_said(says: str, errors: str) -> bool:
    if not says:
        return not errors
    return says in errors and errors.startswith("pynbd: ") and errors.count("\n") == 1


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
