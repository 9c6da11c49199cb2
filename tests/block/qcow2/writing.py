"""What the tests of the writer have in common: images that are written, host files that are
watched, held or fail, and the two judges, our check and that of qemu-img.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.engine import Buffer, Engine, HostFile
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.check import check
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.image import Qcow2Node, read_header
from pynbd.block.qcow2.report import Report

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def create(path: Path, size: int | str, options: str = "", *words: str | Path) -> Path:
    """An empty image by qemu-img."""
    extra = ["-o", options] if options else []
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *extra, *words, path, str(size))
    return path


@asynccontextmanager
async def writable(path: Path, engine: Engine | None = None) -> AsyncIterator[Qcow2Node]:
    """The image, open for writing, closed in the end."""
    node = await open_image(path, format="qcow2", read_only=False, engine=engine)
    assert isinstance(node, Qcow2Node)
    try:
        yield node
    finally:
        await node.close()


async def write(node: BlockNode, offset: int, data: Buffer, *, fua: bool = False) -> None:
    """One request, which has to succeed."""
    (error,) = await node.pwrite_batch([(offset, data)], fua=fua)
    if error:
        raise error


async def zero(
    node: BlockNode, offset: int, length: int, *, unmap: bool = True, **flags: bool
) -> None:
    """One request, which has to succeed."""
    await node.write_zeroes(offset, length, **{"may_unmap": unmap, "fast": False, **flags})


@contextmanager
def host_file(path: Path, *, writable: bool = False) -> Iterator[HostFile]:
    """The file itself."""
    engine = Engine(2)
    file = HostFile.open(engine, str(path), writable=writable)
    try:
        yield file
    finally:
        file.close()
        engine.close()


async def report_on(path: Path) -> Report:
    """What our check says."""
    with host_file(path) as file:
        return await check(file, await read_header(file))


async def sound(path: Path, *, leaks: int = 0) -> None:
    """Both checks find nothing, or so many leaks."""
    report = await report_on(path)
    assert (report.corruptions, report.check_errors, report.leaks) == (0, 0, leaks), report.findings
    done = peers.run("qemu-img", "check", path, check=False)
    assert done.returncode == (3 if leaks else 0), done.stdout + done.stderr


async def header_of(path: Path) -> Header:
    """The header on disk."""
    with host_file(path) as file:
        return await read_header(file)


def bytes_of(path: Path) -> bytes:
    """A file as it is."""
    return path.read_bytes()


def allocated(path: Path) -> int:
    """Bytes that the host has given to a file."""
    return path.stat().st_blocks * 512


@dataclass(frozen=True)
class Call:
    """One call on a host file. ``ranges``: (offset, length) of each piece, whose bytes ``data``
    are.
    """

    name: str  # "write", "sync", "resize", "fallocate"
    file: str  # the last part of its path
    ranges: tuple[tuple[int, int], ...] = ()
    data: tuple[Buffer, ...] = ()

    def touches(self, offset: int, length: int) -> bool:
        return any(at < offset + length and offset < at + count for at, count in self.ranges)


@dataclass
class Gate:
    """Calls of a kind wait here, in the pool, until it is opened."""

    holds: Callable[[Call], bool]
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    async def reached(self) -> None:
        for _ in range(5000):
            if self.entered.is_set():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("nobody came to the gate")


class Host:
    """All files that are opened for writing while it is installed."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.trouble: Callable[[Call], int] = lambda call: 0
        self.gates: list[Gate] = []

    def count(self, name: str, file: str | None = None) -> int:
        return sum(call.name == name and file in (None, call.file) for call in self.calls)

    def fail(self, number: int, code: int, *names: str) -> None:
        """The call of that number (from 0, of those named) fails with ``code``, and no other."""
        left = [number]

        def trouble(call: Call) -> int:
            if call.name in names:
                left[0] -= 1
                return code if left[0] == -1 else 0
            return 0

        self.trouble = trouble

    def gate(self, holds: Callable[[Call], bool]) -> Gate:
        self.gates.append(Gate(holds))
        return self.gates[-1]

    def arrives(self, call: Call) -> int:
        self.calls.append(call)
        self.passes(call)
        return self.trouble(call)

    def passes(self, call: Call) -> None:
        for gate in list(self.gates):
            if not gate.opened.is_set() and gate.holds(call):
                gate.entered.set()
                assert gate.opened.wait(20)


class WatchedFile(HostFile):
    """A file that tells its `Host` of each change, before it is made. Reads that come to the pool
    only pass its gates.
    """

    host: Host

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.writes_in_turn = False  # who waits at a gate is in nobody's way

    def _quick(self) -> None:
        """What is made in the loop cannot wait at a gate."""

    def _call(self, name: str, *ranges: tuple[int, int], data: tuple[Buffer, ...] = ()) -> int:
        return self.host.arrives(Call(name, os.path.basename(self.path), ranges, data))

    def _write_batch(self, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
        ranges = [(offset, len(data)) for data, offset in pieces]
        code = self._call("write", *ranges, data=tuple(data for data, _ in pieces))
        if not code:
            return super()._write_batch(pieces)
        done = len(pieces) // 2  # the others not at all
        error = OSError(code, os.strerror(code), self.path)
        return [*super()._write_batch(pieces[:done]), *[error] * (len(pieces) - done)]

    def _read_into(self, view: memoryview, offset: int) -> int:
        name = os.path.basename(self.path)
        self.host.passes(Call("read", name, ((offset, len(view)),)))
        return super()._read_into(view, offset)

    def _sync(self) -> None:
        code = self._call("sync")
        if code:
            self.sync_failed = True
            raise OSError(code, os.strerror(code), self.path)
        super()._sync()

    def _resize(self, size: int) -> None:
        code = self._call("resize", (size, 0))
        if code:
            raise OSError(code, os.strerror(code), self.path)
        super()._resize(size)

    def _fallocate_errno(self, mode: int, offset: int, length: int) -> int:
        return self._call("fallocate", (offset, length)) or super()._fallocate_errno(
            mode, offset, length
        )


@contextmanager
def watched() -> Iterator[Host]:
    """Files that are opened inside are watched."""
    host = Host()
    kind: Any = type("WatchedFile", (WatchedFile,), {"host": host})
    with patch("pynbd.block.file.HostFile", kind):
        yield host


def no_space(call: Call) -> int:
    """Of everything that needs space."""
    return errno.ENOSPC if call.name == "write" else 0
