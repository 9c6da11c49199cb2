"""Who opens a damaged image for writing: the judgement of one case.

1. The outcome is REFUSED (one line; nothing was changed, unless a dirty image was repaired), FOUND
   (a request met damage: from then on the image says that it is corrupt, and is only read), EIO
   (some requests fail, others do not) or SERVED. Everything else is a defect, an exception here.
2. Nothing but the image and its data file is changed, and the file stays within what is allocated.
3. What was acknowledged reads back, what nobody wrote to is as it was, the snapshots too, and
   there are no more corruptions than before.
4. UNCOUNTED: not all of 3 holds, in an image with references that no refcount counts. It has to
   hold all the same for clusters that nobody wrote to, if they are counted and nobody else's.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from interop import peers
from interop.checking import qemu_check
from interop.damage import beside_qemu, guest
from interop.damage.generator import Case
from interop.damage.guest import Guest
from interop.damage.reading import Reading, check_line
from interop.damage.watching import (
    MOST_MEMORY,
    WRITES,
    MiB,
    data_files,
    named_files,
    peak,
    reset_peak,
    state,
)
from interop.damage.workers import Judge
from interop.damage.writing_metadata import Metadata, examined
from interop.damage.writing_model import Change, Model, changes
from pynbd.cli import complaints
from pynbd.errors import ImageError
from pynbd.server.serving import serve
from tests.conformance.client import Errno, Mode, Peer

_FOUND = "only read from now on"
_SNAPSHOT = "1"  # the ID of the first one in all images that have any
_MOST_GROWTH = 8 * MiB


class Outcome(StrEnum):
    REFUSED = "refused"
    FOUND = "found"
    EIO = "EIO"
    SERVED = "served"
    UNCOUNTED = "uncounted"


def make_judge(folder: Path, qemu_every: int = 0, *, untrusted: bool = False) -> Judge:
    """A judge for a process of `interop.damage.workers`; so many images are seen by QEMU, too."""
    writing = Writing(folder, untrusted=untrusted)

    def judge(number: int, case: Case) -> tuple[str, str]:
        return writing.write(case, qemu=bool(qemu_every) and number % qemu_every == 0)

    return judge


@dataclass(frozen=True)
class Seen:
    """An image as those see it who only read it. ``guest``: None if it is refused."""

    metadata: Metadata
    guest: Guest | None
    snapshot: Guest | None


class Writing(Reading):
    """Judges one case after the other, in this process."""

    def __init__(self, folder: Path, *, untrusted: bool = False) -> None:
        super().__init__(folder)
        self._untrusted = untrusted
        self._writable = os.fspath(folder)
        self._guarded = False
        sys.addaudithook(self._guard)

    def _guard(self, event: str, args: tuple[object, ...]) -> None:
        """An image that names a file of this machine does not have it written."""
        if self._guarded and event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            path = args[0]
            if isinstance(path, str | bytes) and path not in (os.devnull, b"/dev/null"):
                real = os.path.realpath(os.fsdecode(path))
                if not real.startswith((self._writable, "/proc/")):
                    raise PermissionError(f"{real} is not to be written")

    @contextmanager
    def watched(self, allowed: set[str]) -> Iterator[None]:
        """Nothing but the image and what it names is opened, and memory is bounded."""
        resident = reset_peak()
        self._guarded = True
        try:
            with self._watch.on() as events:
                yield
        finally:
            self._guarded = False
        used = peak() - resident
        self._check_opened(events, allowed)
        self._check_said()
        assert used <= MOST_MEMORY, f"{used >> 20} MiB of memory"

    def write(self, case: Case, *, qemu: bool) -> tuple[Outcome, str]:
        """The outcome, and what was said. An exception is a defect."""
        path, allowed = self.placed(case)
        before = self.seen(path)
        # It repeats names, whatever is in them, and waits for a FIFO or a loop of images.
        qemu = qemu and case.structure not in ("names", "chain")
        checked = _checked_by_qemu(path) if qemu else None
        files = state(self._folder)
        model = Model(before.guest) if before.guest else None
        with self.watched(allowed):
            outcome, said = self._run_of(case, path, model)
        self._check_files(path, files, before, refused=outcome is Outcome.REFUSED)
        if model is None or outcome is Outcome.REFUSED:
            return outcome, said
        worse = self.worse(path, before, model, strictly=True)
        now = _checked_by_qemu(path) if qemu else None
        if checked is not None and now is not None and now > checked:
            worse.append(f"qemu-img check counts {checked} corruptions before, {now} afterwards")
        if worse:
            excused = before.metadata.uncounted and not self._untrusted
            assert excused, "; ".join(worse)
            return Outcome.UNCOUNTED, "; ".join(worse)
        return outcome, said

    def placed(self, case: Case) -> tuple[Path, set[str]]:
        """An image in an empty folder, and what it names."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        path = case.place(self._folder)
        self._said.records.clear()
        self._household.troubles.clear()
        return path, named_files(path)

    def seen(self, path: Path) -> Seen:
        """The image as it is now."""
        first = path.read_bytes()[:72]
        snapshots = first[:4] == b"QFI\xfb" and int.from_bytes(first[60:64])
        return Seen(
            asyncio.run(examined(path)),
            self._read(path),
            self._read(path, _SNAPSHOT) if snapshots else None,
        )

    def _read(self, path: Path, snapshot: str | None = None) -> Guest | None:
        server = serve(path, read_only=True, snapshot=snapshot, socket=self._socket)
        try:
            with self._household.serving(server):
                return beside_qemu.seen(self._socket, path)
        except (ImageError, OSError):
            return None

    def _run_of(self, case: Case, path: Path, model: Model | None) -> tuple[Outcome, str]:
        """Write to the image; ``model`` learns of it."""
        # Who runs this may write the files of this machine that an image gives as its data file.
        confined: dict[str, object] = {}
        inside = (os.path.realpath(name).startswith(self._writable) for name in own_files(path))
        if self._untrusted or not all(inside):
            confined = {"untrusted": True, "format": "qcow2"}
        server = serve(path, socket=self._socket, **confined)  # type: ignore[arg-type]
        failed = 0
        opened = False
        try:
            with self._household.serving(server):
                opened = True
                assert model is not None, "it is written, and cannot be read"
                failed = self._change(case, path, model)
        except (ImageError, OSError) as error:
            said = str(error) if isinstance(error, ImageError) else complaints.said_of(error)
            check_line(said, path)
            if not opened:
                return Outcome.REFUSED, said
            assert self._found(), f"it could not be closed: {said}"
        if self._found():
            self._check_marked(path)
            return Outcome.FOUND, self._found()
        return (Outcome.EIO if failed else Outcome.SERVED), ""

    def _change(self, case: Case, path: Path, model: Model) -> int:
        """How many requests failed."""
        failed = 0
        was_found = False
        with Peer(self._socket) as peer:
            for change, error in done(peer, case, path, model):
                if error == Errno.EPERM:
                    assert was_found, f"{change}: EPERM, and nothing was found"
                else:
                    assert error in (0, Errno.EIO), f"{change}: error {error}"
                    assert error or not (was_found and change.payload), f"{change}: written"
                failed += error != 0
                was_found = bool(self._found())
            peer.disconnect()
        return failed

    def _found(self) -> str:
        """The line about damage that ends all writes, if there was one."""
        said = [record.getMessage() for record in self._said.records]
        found = [line for line in said if _FOUND in line]
        assert len(found) <= 1, found
        return found[0] if found else ""

    def _check_marked(self, path: Path) -> None:
        assert "0x" in self._found(), f"no place is named: {self._found()}"
        header = path.read_bytes()[:80]
        assert header[7] < 3 or header[79] & 2, "damage was found, and the image does not say so"

    def _check_opened(self, events: Sequence[tuple[str, str, bool]], allowed: set[str]) -> None:
        ours = os.fspath(self._socket)
        for event, path, writes in events:
            if path.startswith((ours, "/proc/")) or path == os.devnull:
                continue
            assert path in allowed, f"{path!r} was opened, and the chain does not name it"
            assert not writes or event == "open", f"{event} of {path!r}"

    def _check_files(
        self, path: Path, files: dict[str, tuple[object, ...]], before: Seen, *, refused: bool
    ) -> None:
        now = state(self._folder)
        assert now.keys() == files.keys(), "there are other files"
        changed = {name for name in now if now[name] != files[name]}
        dirty = path.read_bytes()[72:80]  # an image that says so is repaired first
        if refused and changed:
            assert any("not closed properly" in r.getMessage() for r in self._said.records), dirty
        written = {os.path.realpath(name) for name in own_files(path)}
        for name in changed:
            assert os.path.realpath(self._folder / name) in written, f"{name} was changed"
        size, was = path.stat().st_size, files[path.name][2]
        assert isinstance(was, int)
        most = max(was, before.metadata.end) + _MOST_GROWTH
        assert size <= most, f"the file is {size:#x} bytes long, and was {was:#x}"

    def worse(self, path: Path, before: Seen, model: Model, *, strictly: bool) -> list[str]:
        """What is worse than before. What has to be so in any case is asserted, if ``strictly``."""
        after = self.seen(path)
        found: list[str] = []
        if after.guest is None:
            assert not strictly, "it cannot be opened any more"
            return ["it cannot be opened any more"]
        written, unwritten = model.differences(after.guest)
        if len(unwritten):
            taken = before.metadata.of_those_alone(unwritten)
            assert not (strictly and len(taken)), (
                f"guest offset {taken[0]:#x} is changed, and nobody wrote to it"
            )
            found.append(f"guest offset {unwritten[0]:#x} is changed")
        if len(written):
            found.append(f"what was written to guest offset {written[0]:#x} is not there")
        was, now = before.metadata.corruptions, after.metadata.corruptions
        if was is not None and (now is None or now > was):
            found.append(f"{was} corruptions before, {now} afterwards")
        if before.snapshot and not _has(after.snapshot, before.snapshot):
            found.append("the snapshot is changed")
        return found


def done(
    peer: Peer, case: Case, path: Path, model: Model, modes: Sequence[Mode] = tuple(Mode)
) -> Iterator[tuple[Change, int]]:
    """The requests of a case, once they are answered, and with which error; ``model`` learns of
    them.
    """
    rng = random.Random(case.name)
    cluster = 1 << min(int.from_bytes(path.read_bytes()[20:24]), 21)
    size, _ = guest.negotiated(peer, rng.choice(modes))
    for change in changes(rng, size, max(cluster, guest.GRANULE)):
        reply = peer.ask(
            change.command,
            change.offset,
            change.length,
            flags=change.flags,
            payload=change.payload,
        )
        model.change(change, done=not reply.error)
        yield change, reply.error


def own_files(path: Path) -> list[str]:
    """The image, and what it says of where its data file is."""
    names = data_files(os.fspath(path))
    own = [name for name in names if os.path.isabs(name) and "\0" not in name]
    return [os.fspath(path), *own]


def _has(now: Guest | None, then: Guest) -> bool:
    """Whether what could be read then is still there."""
    if now is None:
        return not then.pieces
    _, lost = Model(then).differences(now)
    return not len(lost)


def _checked_by_qemu(path: Path) -> int | None:
    peers.require("qemu-img")
    report = qemu_check(path).report
    if not report or report["check-errors"]:
        return None
    flags = asyncio.run(examined(path)).flags
    return int(report.get("corruptions", 0)) - flags
