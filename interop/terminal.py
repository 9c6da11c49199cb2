"""What the documentation shows is what happens: its command lines are run, their output compared.

A fenced block is run by its language:

* ``console``: a terminal. ``$ `` begins a command, which must succeed; what follows is its output,
  in which ``...`` stands for any text, alone on a line for any lines. The blocks of a document are
  one session, in one folder. A command that ends in ``&`` goes on while the next ones run.
* ``sh``: commands on their own, one a line. A server must listen, and end well when it is told to.

Everything else (``python``, ``text``, none) is not run here. The session has a network of its own
where the machine lends one, so that ports and hosts are as they are written.
"""

from __future__ import annotations

import fcntl
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from interop import peers

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "-- the command has ended with status "
_PATIENCE = 30.0


@dataclass(frozen=True)
class Step:
    """A command of a document, at a line of it, and the output that is shown."""

    line: int
    command: str
    output: str


def blocks(document: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the blocks in a language."""
    text = document.read_text()
    for block in _BLOCK.finditer(text):
        if block[1] == language:
            yield text.count("\n", 0, block.start(2)) + 1, block[2]


def steps(document: Path) -> Iterator[Step]:
    """What is typed in the ``console`` blocks."""
    for first, text in blocks(document, "console"):
        assert text.startswith("$ "), f"{document.name}:{first}: a command comes first"
        at = first
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command += "\n" + more
            yield Step(at, command, output)
            at += part.count("\n")


def matches(output: str, shown: str) -> bool:
    """Whether an output is the one that is shown."""
    pattern = re.escape(shown).replace(r"\.\.\.\n", r"(?:.*\n)*?").replace(r"\.\.\.", ".*?")
    return re.fullmatch(pattern, output) is not None


class Terminal:
    """A shell in a folder. What it started ends with it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        shell = ["bash", "--noprofile", "--norc"]
        if lends_a_network():
            shell = ["unshare", "-rn", "bash", "-c", "ip link set lo up; exec " + " ".join(shell)]
        self._process = subprocess.Popen(
            shell,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as output:
            for line in output:
                self._lines.put(line)

    def run(self, command: str, shown: str) -> tuple[int, str]:
        """The status and output of a command; that of a server when it is what is ``shown``."""
        assert self._process.stdin
        print(command, f"printf '%s%s\\n' '{_MARK}' $?", sep="\n", file=self._process.stdin)
        self._process.stdin.flush()
        output, status = "", None
        deadline = time.monotonic() + _PATIENCE
        while status is None or (command.endswith("&") and not matches(output, shown)):
            try:
                line = self._lines.get(timeout=deadline - time.monotonic())
            except (queue.Empty, ValueError):
                raise AssertionError(f"{command}: nothing more comes after\n{output}") from None
            before, mark, said = line.partition(_MARK)
            output += before if mark else line
            status = int(said) if mark else status
        return status, output

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(_PATIENCE)
        self._reader.join(_PATIENCE)


def lends_a_network() -> bool:
    """Whether this machine gives away empty networks."""
    if not all(map(shutil.which, ("unshare", "ip"))):
        return False
    asked = ["unshare", "-rn", "ip", "link", "set", "lo", "up"]
    return not subprocess.run(asked, check=False, capture_output=True, timeout=20).returncode


@contextmanager
def documented_ports() -> Iterator[None]:
    """Where there is no network of one's own, the documented ports are for one test at a time."""
    with open(Path(tempfile.gettempdir()) / "pynbd-documented-ports", "w") as lock:
        if not lends_a_network():
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment() -> dict[str, str]:
    """In which the documented programs are found: ours, and the peers."""
    places = [str(Path(sys.executable).parent), str(Path(peers.find("nbdinfo")).parent)]
    return os.environ | {
        "PATH": os.pathsep.join([*places, os.environ["PATH"]]),
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }


def links(document: Path) -> list[str]:
    """The files of this project that a document leads to."""
    found = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    return [target for target in found if "://" not in target]
