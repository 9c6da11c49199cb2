"""Who opens a damaged image for reading: the judgement of one case.

1. The outcome is REFUSED (one line, which names the file), EIO (some of the guest's bytes cannot be
   had; all others can, by the same connection) or SERVED. Everything else is a defect, which is an
   exception here.
2. No file is changed, none is opened but those that the chain names, no memory is taken beyond
   `MOST_MEMORY`.
3. The map and the data of a guest agree, however they are asked for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import uvloop
from click.testing import CliRunner

from interop.damage import guest
from interop.damage.generator import Case, Damage
from interop.damage.guest import ALLOCATION, Guest
from interop.damage.images import sound
from interop.damage.watching import MOST_MEMORY, Watch, named_files, peak, reset_peak, state
from interop.damage.workers import DEADLINE, Judge
from pynbd.cli import complaints
from pynbd.cli.check import check
from pynbd.cli.info import info
from pynbd.cli.map import map as map_command
from pynbd.cli.output import one_line
from pynbd.errors import ImageError
from pynbd.server.serving import Serving, serve
from tests.conformance.client import Mode, Peer

_LONGEST_LINE = 300
_SNAPSHOT = "1"  # the ID of the first one in all images that have any


class Outcome(StrEnum):
    REFUSED = "refused"
    EIO = "EIO"
    SERVED = "served"


def make_judge(folder: Path, commands_every: int = 4) -> Judge:
    """A judge for a process of `interop.damage.workers`."""
    reading = Reading(folder)
    return lambda number, case: reading.judge(case, commands=number % commands_every == 0)


class Household:
    """Servers in a thread of their own."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self.troubles: list[str] = []
        self._loop.set_exception_handler(lambda _, context: self.troubles.append(repr(context)))
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @contextmanager
    def serving(self, server: AbstractAsyncContextManager[Serving]) -> Iterator[None]:
        self._run(server.__aenter__())
        try:
            yield
        finally:
            self._run(server.__aexit__(None, None, None))

    def _run(self, step: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(step, self._loop).result(DEADLINE)


class Reading:
    """Judges one case after the other, in this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "images"
        self._socket = folder / "socket"
        self._watch = Watch()
        self._said = _Said()
        logging.getLogger("pynbd").addHandler(self._said)
        logging.getLogger("pynbd").propagate = False
        self._household = Household()
        self._warm_up()

    def _warm_up(self) -> None:
        """What libraries import when they are first used is not opened because of an image."""
        self._folder.mkdir()
        path = sound("everything").place(self._folder)
        self._served(path)
        _command_lines(path)

    def judge(self, case: Case, *, commands: bool = False) -> tuple[Outcome, str]:
        """The outcome, and what was said. An exception is a defect. ``commands``: of the command
        line, too.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        path = case.place(self._folder)
        allowed = named_files(path)
        before = state(self._folder)
        self._said.records.clear()
        self._household.troubles.clear()
        resident = reset_peak()
        with self._watch.on() as events:
            outcome = self._served(path, case)
            if case.structure.startswith("snapshot"):
                self._served(path, case, snapshot=_SNAPSHOT)
            if commands:
                _command_lines(path)
        used = peak() - resident
        assert state(self._folder) == before, "a file was changed"
        self._check_events(events, allowed)
        self._check_said()
        assert used <= MOST_MEMORY, f"{used >> 20} MiB of memory"
        return outcome

    def _served(
        self, path: Path, case: Case | None = None, *, snapshot: str | None = None
    ) -> tuple[Outcome, str]:
        server = serve(path, read_only=True, snapshot=snapshot, socket=self._socket)
        rng = random.Random(case.name if case else 0)
        try:
            with self._household.serving(server):
                found = look(self._socket, rng, guest.granule_of(path))
        except ImageError as error:
            said = str(error)
            check_line(said, path)
            return Outcome.REFUSED, said
        except OSError as error:
            said = complaints.said_of(error)
            check_line(said, path)
            return Outcome.REFUSED, said
        if isinstance(case, Damage) and case.harms is not None and snapshot is None:
            guest.check_unharmed(found, sound(case.image).guest, case.harms)
        return (Outcome.EIO if found.lost else Outcome.SERVED), ""

    def _check_events(self, events: Sequence[tuple[str, str, bool]], allowed: set[str]) -> None:
        ours = os.fspath(self._socket)
        for event, path, writes in events:
            if path.startswith(ours) or path == os.devnull:
                continue  # a command opens that in the place of descriptors that are closed
            assert not writes, f"{event} of {path!r}"
            assert path in allowed, f"{path!r} was opened, and the chain does not name it"

    def _check_said(self) -> None:
        assert not self._household.troubles, self._household.troubles
        for record in self._said.records:
            text = one_line(record.getMessage())
            assert not record.exc_info, (text, record.exc_info)
            assert len(text) <= _LONGEST_LINE, f"a long line in the log: {text}"


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def look(socket: Path, rng: random.Random, granule: int) -> Guest:
    """What a guest sees, by several connections that have to see the same."""
    with Peer(socket, deadline=DEADLINE) as peer:
        size, ids = guest.negotiated(peer, Mode.EXTENDED)
        found = guest.read(peer, size, granule)
        guest.map_all(peer, found, ids, granule)
        guest.check_map(found)
        guest.check_pieces(peer, found, rng)
        peer.disconnect()
    mode = rng.choice([Mode.SIMPLE, Mode.STRUCTURED])
    with Peer(socket, deadline=DEADLINE) as peer:
        again, ids = guest.negotiated(peer, mode, [ALLOCATION])
        assert again == size
        if ids:
            alone = Guest(size)
            guest.map_all(peer, alone, ids, granule)
            # What has no status has no bytes, either.
            for offset, length in alone.unmapped[:100]:
                assert found.bytes_at(offset, length) is None, f"{offset:#x} has bytes, no status"
            alone.pieces, alone.lost = found.pieces, found.lost
            guest.check_map(alone)
        guest.check_pieces(peer, found, rng)
        peer.disconnect()
    return found


def check_line(said: str, path: Path) -> None:
    """An error is one line that is not long, and names the image."""
    line = one_line(said)  # as a command says it
    assert len(line) <= _LONGEST_LINE, f"{len(line)} characters: {line}"
    assert os.fspath(path.parent) in line, f"it names no file: {line}"


def _command_lines(path: Path) -> None:
    """``pynbd check``, ``info`` and ``map``: they end with a status, or with one line."""
    for command, *args in (check,), (check, "--json"), (info,), (info, "--json"), (map_command,):
        done = CliRunner().invoke(command, [*args, os.fspath(path)], standalone_mode=False)
        error = done.exception
        if isinstance(error, ImageError):
            check_line(str(error), path)
        elif isinstance(error, OSError):
            assert error.filename or error.strerror, repr(error)
        elif error is not None and not isinstance(error, SystemExit):
            raise error
