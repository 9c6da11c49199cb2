"""What a server has imported by the time that it listens, and what it has not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pynbd.block.qcow2.builder import Data, Image
from pynbd.block.qcow2.format import Incompatible
from pynbd.cli.imports import LATE

M = 1 << 20
WRITING = {"pynbd.block.qcow2.writer", "pynbd.block.qcow2.zeroing"}
REPAIR = {"pynbd.block.qcow2.repair"}

# What is late and not used is in sys.modules, but no plain module yet.
TOLD_AT_THE_END = """
import atexit, gc, json, sys, types

@atexit.register
def tell():
    modules = [name for name, module in sys.modules.items() if type(module) is types.ModuleType]
    print(json.dumps({"modules": modules, "collecting": gc.isenabled()}))
"""
SERVE = "from pynbd.__main__ import main; sys.argv[0] = 'pynbd'; main()"
QEMU_NBD = "from pynbd.qemu_nbd import main; sys.argv[0] = 'pynbd-qemu-nbd'; main()"


def wait_for_greeting(process: subprocess.Popen[str], path: Path) -> None:
    """Until the loop runs: a signal before that ends the program at once."""
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(str(path)):
            assert process.poll() is None
            time.sleep(0.01)
        assert client.recv(8) == b"NBDMAGIC"


def served(*args: str | Path, program: str = SERVE, tmp_path: Path) -> dict[str, Any]:
    """What a server without clients has to tell of itself, and how many threads it has."""
    line = [sys.executable, "-c", TOLD_AT_THE_END + program]
    path = tmp_path / "socket"
    with subprocess.Popen(
        [*line, *args, "-k", str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for_greeting(process, path)
        threads = len(os.listdir(f"/proc/{process.pid}/task"))
        process.terminate()
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    return told | {"threads": threads}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    Image(size=M, clusters={0: Data(b"data")}).write(path)
    return path


@pytest.mark.parametrize("program", [SERVE, QEMU_NBD])
def test_a_server_is_light(program: str, image: Path, tmp_path: Path) -> None:
    """Neither what looks good in a terminal, nor a client, nor what few servers need. Its threads
    are the loop and the one that waits for signals: numpy has none.
    """
    command = ["serve"] if program == SERVE else ["-t"]
    told = served(*command, image, program=program, tmp_path=tmp_path)
    modules = set(told["modules"])
    assert not modules & {"rich", "PIL", "numpy.ma", "numpy.random", "concurrent.futures.process"}
    assert not [name for name in modules if name.startswith("pynbd.client")]
    assert modules & LATE == WRITING
    assert told["collecting"]
    assert told["threads"] == 2


def test_a_server_that_only_reads(image: Path, tmp_path: Path) -> None:
    modules = set(served("serve", "-r", image, tmp_path=tmp_path)["modules"])
    assert not modules & LATE
    assert "pynbd.block.qcow2.refcounts" not in modules


def test_what_is_late_comes_when_it_is_needed(tmp_path: Path) -> None:
    torn = tmp_path / "torn.qcow2"
    Image(size=M, clusters={0: Data(b"data")}, incompatible=Incompatible.DIRTY).write(torn)
    overlaid = served("serve", "--snapshot", torn, tmp_path=tmp_path)["modules"]
    assert set(overlaid) & LATE == {"pynbd.block.overlay"} | WRITING
    repaired = served("serve", torn, tmp_path=tmp_path)["modules"]
    assert set(repaired) & LATE == REPAIR | WRITING
    disk = tmp_path / "disk.py"
    disk.write_text(
        "from pynbd.server.memory import MemoryDisk\ndef disk(): return MemoryDisk(9)\n"
    )
    program = served("serve", "--python", f"{disk}:disk", tmp_path=tmp_path)["modules"]
    assert set(program) & LATE == {"pynbd.cli.python_export"}


def test_a_library_puts_nothing_off() -> None:
    program = "import pynbd.server.connection as c, sys, types; "
    program += "sys.exit(type(sys.modules['pynbd.server.tracing']) is not types.ModuleType)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
