"""pynbd-qemu-nbd as a command line: what it takes, what it refuses, and how it begins and ends.

What it does beside qemu-nbd is in ``interop/test_qemu_nbd_side_by_side.py``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from interop import peers
from pynbd.cli.qemu_nbd.command import qemu_nbd
from pynbd.cli.qemu_nbd.options import QemuNbdOptions

PROGRAM = [sys.executable, "-m", "pynbd.qemu_nbd"]


def options(*args: str) -> QemuNbdOptions:
    """What click makes of a command line."""
    context = qemu_nbd.make_context("test", list(args))
    return QemuNbdOptions(**context.params)


# Numbers, as strtol(3) with base 0 reads them
NUMBERS: dict[str, int | None] = {
    "0": 0,
    "2": 2,
    "010": 8,
    "0x10": 16,
    "0X1f": 31,
    " 2": 2,
    "\t+2": 2,
    "00": 0,
    "08": None,
    "": None,
    " ": None,
    "+": None,
    "-1": None,
    "2 ": None,
    "1M": None,
    "0x": None,
    "1e3": None,
    "1_000": None,
    "٣": None,
}


@pytest.mark.parametrize("text", NUMBERS)
@pytest.mark.parametrize("option", ["--shared", "--offset", "--handshake-limit", "--port"])
def test_numbers(option: str, text: str) -> None:
    number = NUMBERS[text]
    if number is None:
        with pytest.raises(click.BadParameter, match="is not a whole number, 0 to "):
            options(f"{option}={text}", "disk")
    else:
        found: Any = getattr(options(f"{option}={text}", "disk"), option[2:].replace("-", "_"))
        assert found == number


@pytest.mark.parametrize("option, most", [("-e", 2**31 - 1), ("-o", 2**63 - 1), ("-p", 65535)])
def test_largest_numbers(option: str, most: int) -> None:
    options(option, str(most), "disk")
    with pytest.raises(click.BadParameter):
        options(option, str(most + 1), "disk")


def test_version() -> None:
    """What callers parse: the word after the name is the version of qemu-nbd that it is like."""
    said = CliRunner().invoke(qemu_nbd, ["-V"]).output
    assert said.startswith("qemu-nbd 10.0.0 (pynbd ")


def test_every_option_has_help() -> None:
    for parameter in qemu_nbd.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_its_front_is_light() -> None:
    """With --fork the process is doubled before numpy or a loop bring threads."""
    script = (
        "import sys, pynbd.cli.qemu_nbd.command as _; print({'numpy', 'uvloop'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout == b"set()\n"


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_a_signal_at_any_moment(delay: float, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with peers.socket_path() as path:
        line = [*PROGRAM, "-t", "-f", "raw", "-k", str(path), str(disk)]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not blocks(process.pid, signal.SIGTERM):
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(process.pid, signal.SIGTERM)
            said = process.communicate(timeout=10)
            assert (process.returncode, *said) == (0, b"", b"")
        assert not path.exists()


def blocks(pid: int, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigBlk:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    raise AssertionError("no SigBlk")


@pytest.mark.parametrize("verbose", [["-v"], []])
def test_connect_what_is_no_nbd_device(verbose: list[str], tmp_path: Path) -> None:
    """In the background as well, it is told, and nothing stays."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with peers.socket_path() as path:
        line = [*PROGRAM, "-c", "/dev/null", "-f", "raw", "-k", str(path), str(disk), *verbose]
        done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=20)
        assert not path.exists()
    assert done.returncode == 1
    assert "pynbd-qemu-nbd: /dev/null: " in done.stderr
