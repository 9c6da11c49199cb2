"""A server process of the tests, and what it may say on standard error."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conformance.client import DEADLINE, Mode, Peer
from tests.conformance.server import pattern

ROOT = Path(__file__).parents[2]
EXPECTED_LINES = re.compile(r"pynbd: \S*/broken\.qcow2: .*")
"""Damage that a request has met is told, a line each time."""


class RunningServer:
    """``tests.conformance.server`` as a process of its own, on a unix socket in ``folder``."""

    program = "tests.conformance.server"
    expected_lines = EXPECTED_LINES

    def __init__(self, folder: Path, loop: str, options: Sequence[str] = ()) -> None:
        self.loop = loop
        self.folder = folder
        self.socket = folder / "socket"
        self._told = 0
        self._stderr = folder / "stderr"
        command = [sys.executable, "-m", self.program, "--loop", loop, *options]
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, self.socket, folder], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first == b"ready\n", self._stderr.read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self) -> Peer:
        """A connection on which nothing has been read or sent."""
        return Peer(self.socket)

    def enter(
        self, mode: Mode = Mode.SIMPLE, export: str = "", contexts: Sequence[str] = ()
    ) -> Peer:
        """A connection in transmission."""
        peer = self.connect()
        peer.negotiate(mode, export, contexts)
        return peer

    def check(self) -> None:
        """The next client is served, as if nothing had happened."""
        assert self.process.poll() is None, self._stderr.read_text()
        with self.enter() as peer:
            assert peer.pread(4096, 32) == pattern(4096, 32)
            peer.disconnect()

    def descriptors(self) -> int:
        """How many files and sockets the process has open."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())

    def wait_for_descriptors(self, count: int) -> None:
        """Every place is free again: no more descriptors are open than ``count``."""
        deadline = time.monotonic() + DEADLINE
        while self.descriptors() > count:
            assert time.monotonic() < deadline, "a connection was not closed"
            time.sleep(0.001)

    @contextmanager
    def flat_memory(self, most: int = 4 << 20) -> Iterator[None]:
        """What is done inside takes no more than ``most`` bytes of the server's memory."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # the peak begins anew
        before = self._memory("VmRSS")
        yield
        assert self._memory("VmHWM") - before <= most

    def _memory(self, which: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{which}:\s*(\d+) kB$", status, re.MULTILINE)
        assert found
        return int(found[1]) << 10

    def unexpected_lines(self) -> list[str]:
        """What standard error holds since the last call that ought not to be there."""
        text = self._stderr.read_text()[self._told :]
        self._told += len(text)
        return [line for line in text.splitlines() if not self.expected_lines.fullmatch(line)]

    def stop(self) -> None:
        """End it in good order: it says nothing and its status is 0."""
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=2 * DEADLINE)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        assert self.unexpected_lines() == []
        assert status == 0
