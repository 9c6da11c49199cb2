"""What a disk is told, in the order in which it was told: host files that log, on one timeline.

`recorded` puts a subclass in the place of the engine's `HostFile`, wherever images are opened
meanwhile: the real calls are made on real files, and each is logged with when it began and when it
returned, those of all files and of all threads on one clock. Requests of the guest use the same
clock (`Timeline.tick`), so that what was acknowledged when can be held against what was on disk.

`SteppedEngine` makes a run a function of its seed: calls are made in the loop's own thread, each
after a random number of turns, so that requests meet in every way and the same way each time.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest.mock import patch

from pynbd.block.engine import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    Buffer,
    Engine,
    HostFile,
)
from pynbd.block.pool import Lane

FAULTS = 0.03  # the part of the writes that fail, if any do

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Change:
    """One change of a file: ``data`` written, or ``length`` bytes zeroed, or (``size``) the file
    made that long. ``end`` is None until the call has returned.
    """

    file: str  # the last part of its path
    begin: int
    offset: int = 0
    length: int = 0
    data: bytes | None = None
    size: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.begin}: {self.file} is made {self.size:#x} bytes long"
        what = "zeroed" if self.data is None else "written"
        return f"{self.begin}: {self.file} {self.offset:#x}+{self.length:#x} {what}"


@dataclass(eq=False, slots=True)
class Sync:
    """One fdatasync of a file that has succeeded."""

    file: str
    begin: int
    end: int


@dataclass(slots=True)
class Timeline:
    """The clock, and what has happened to the files. Any thread may use it."""

    changes: list[Change] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)
    now: int = 0
    faults: Random | None = None  # some calls fail, by this
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tick(self) -> int:
        """The next moment; no two events share one."""
        with self._lock:
            self.now += 1
            return self.now

    def fails(self) -> bool:
        """Whether the host has no room for this call."""
        with self._lock:
            return self.faults is not None and self.faults.random() < FAULTS

    def begin(self, change: Change) -> Change:
        with self._lock:
            self.now += 1
            change.begin = self.now
            self.changes.append(change)
        return change

    def forget(self, change: Change) -> None:
        """It has not happened: the host does not do that."""
        with self._lock:
            self.changes.remove(change)

    def synced(self, file: str, begin: int) -> None:
        with self._lock:
            self.now += 1
            self.syncs.append(Sync(file, begin, self.now))


def recording_file(timeline: Timeline) -> type[HostFile]:
    """`HostFile` with its changes on ``timeline``."""

    class RecordingFile(HostFile):
        @property
        def _known_as(self) -> str:
            return Path(self.path).name

        def _write_batch(self, pieces: Sequence[tuple[Buffer, int]]) -> list[OSError | None]:
            # One by one: each has its own moments, and a crash may come between two of them.
            errors: list[OSError | None] = []
            for data, offset in pieces:
                copy = bytes(data)
                fails = timeline.fails()
                if fails:  # with a part of it written
                    copy = copy[: len(copy) // 1024 * 512]
                change = Change(self._known_as, 0, offset, len(copy), data=copy)
                timeline.begin(change)
                (error,) = super()._write_batch([(copy, offset)])
                assert not error
                change.end = timeline.tick()
                errors.append(OSError(errno.ENOSPC, "there is no room") if fails else None)
            return errors

        def _sync(self) -> None:
            # What returned before this moment is on stable storage in the end, whichever of the
            # calls that wait for one another has done it.
            begin = timeline.tick()
            super()._sync()
            timeline.synced(self._known_as, begin)

        def _fallocate_errno(self, mode: int, offset: int, length: int) -> int:
            if timeline.fails():
                return errno.ENOSPC
            if mode == FALLOC_KEEP_SIZE:  # space, and nothing that a reader could see
                return super()._fallocate_errno(mode, offset, length)
            if mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
                assert mode & FALLOC_KEEP_SIZE
                inside = max(min(length, self.size() - offset), 0)
                change = Change(self._known_as, 0, offset, inside)
            else:
                assert not mode, f"fallocate mode {mode:#x} is not known to the recording"
                change = Change(self._known_as, 0, size=max(self.size(), offset + length))
            timeline.begin(change)
            code = super()._fallocate_errno(mode, offset, length)
            change.end = timeline.tick()
            if code:
                timeline.forget(change)
            return code

        def _resize(self, size: int) -> None:
            change = timeline.begin(Change(self._known_as, 0, size=size))
            super()._resize(size)
            change.end = timeline.tick()

    return RecordingFile


@contextmanager
def recorded(faults: Random | None = None) -> Iterator[Timeline]:
    """Files of images that are opened meanwhile are recorded; and some of their writes fail, by
    ``faults``.
    """
    timeline = Timeline(faults=faults)
    with patch("pynbd.block.file.HostFile", recording_file(timeline)):
        yield timeline


class SteppedEngine(Engine):
    """An engine without threads, whose calls come after some turns of the loop, by ``seed``, or at
    once (without ``turns``).
    """

    def __init__(self, seed: int, *, turns: bool = True) -> None:
        super().__init__(1)
        self.quick_writes = None  # writes take their turns, too
        self._rng = Random(seed)
        self._turns = turns

    def start(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.ensure_future(self._stepped(call, *args))

    def start_in_lane(self, lane: Lane, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return self.start(call, *args)

    async def _stepped(self, call: Callable[..., T], *args: Any) -> T:
        if self._turns:
            await self._pause((1, 2, 3, 8, 40, 300), (30, 20, 20, 20, 8, 2))
        result = call(*args)
        if self._turns:
            await self._pause((0, 1, 2), (1, 2, 1))
        return result

    async def _pause(self, turns: Sequence[int], weights: Sequence[int]) -> None:
        for _ in range(*self._rng.choices(turns, weights)):
            await asyncio.sleep(0)
