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
from pynbd.cli.qemu_nbd import qemu_nbd
from pynbd.cli.qemu_options import QemuNbdOptions
from pynbd.errors import PynbdError, UnsupportedFeature, UsageError

PROGRAM = [sys.executable, "-m", "pynbd.qemu_nbd"]


def options(*args: str) -> QemuNbdOptions:
    """What click makes of a command line."""
    context = qemu_nbd.make_context("test", list(args))
    return QemuNbdOptions(**context.params)


def refusal(*args: str, activated: bool = False) -> PynbdError:
    with pytest.raises(PynbdError) as caught:
        options(*args).check(activated=activated)
    return caught.value


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


def test_defaults() -> None:
    wanted = options("disk")
    wanted.check(activated=False)
    assert (wanted.host, wanted.tcp_port, wanted.socket_path) == ("0.0.0.0", 10809, None)
    assert (wanted.shared, wanted.persistent, wanted.handshake_limit) == (1, False, 10)
    assert (wanted.cache_mode, wanted.unmap, wanted.reads_only) == ("writeback", False, False)


@pytest.mark.parametrize(
    "args, mode",
    [
        (["-n"], "none"),
        (["--nocache"], "none"),
        (["--cache=off"], "none"),
        (["--cache=directsync"], "directsync"),
    ],
)
def test_cache_modes(args: list[str], mode: str) -> None:
    assert options(*args, "disk").cache_mode == mode


def test_a_kernel_device_has_a_socket_of_its_own() -> None:
    assert options("-c", "/dev/nbd7", "disk").socket_path == "/var/lock/qemu-nbd-nbd7"
    assert options("-c", "/dev/nbd7", "-k", "/s", "disk").socket_path == "/s"


def test_a_socket_wins_over_an_address() -> None:
    wanted = options("-k", "/s", "-b", "127.0.0.1", "-p", "1", "disk")
    wanted.check(activated=False)
    assert wanted.socket_path == "/s"


LIST_CLASHES = ["-x e", "-D t", "-o 1", "-c /dev/nbd0", "-d", "-f raw", "-l s", "-B b", "-A"]
LIST_CLASHES += ["--aio=threads", "--discard=off", "--cache=none", "-n", "--fork"]


@pytest.mark.parametrize("clash", LIST_CLASHES)
def test_list_excludes(clash: str) -> None:
    error = refusal("-L", *clash.split())
    assert isinstance(error, UsageError)
    assert str(error).startswith("--list: it does not go with --")


@pytest.mark.parametrize("others", ["-t -e 3 -v -r -s", "--pid-file=p --handshake-limit=1"])
def test_list_takes(others: str) -> None:
    options("-L", *others.split()).check(activated=False)


@pytest.mark.parametrize(
    "args, says",
    [
        ("", "one FILE is expected, not 0"),
        ("a b", "one FILE is expected, not 2"),
        ("-L disk", "--list: it takes no FILE"),
        ("-k s disk", "--socket: an absolute path of at most 107 bytes is expected"),
        ("--selinux-label=x disk", "--selinux-label: it is for --socket and --connect"),
        ("--image-opts -f raw disk", "--image-opts excludes --format: driver= is the format"),
        ("--aio=native disk", "--aio=native needs --cache=none or --cache=directsync"),
        ("--detect-zeroes=unmap disk", "--detect-zeroes=unmap needs --discard=unmap"),
        ("-o 1 -l s disk", "--offset excludes --load-snapshot"),
    ],
)
def test_no_sense(args: str, says: str) -> None:
    error = refusal(*args.split())
    assert isinstance(error, UsageError)
    assert str(error) == says


@pytest.mark.parametrize("bitmap", ["-o 1", "-l s"])
def test_bitmaps_of_a_part(bitmap: str) -> None:
    assert str(refusal("-B", "b", *bitmap.split(), "disk")).startswith("--bitmap: ")


@pytest.mark.parametrize(
    "args",
    [
        "-s disk",
        "--object secret,id=s disk",
        "-r --tls-creds t disk",
        "-L --tls-hostname t",
    ],
)
def test_not_yet(args: str) -> None:
    error = refusal(*args.split())
    assert isinstance(error, UnsupportedFeature)
    assert "not supported yet" in str(error)


@pytest.mark.parametrize("args", ["-s -r", "-l s --detect-zeroes=on", "-r --detect-zeroes=on"])
def test_without_effect_on_what_is_read_only(args: str) -> None:
    options(*args.split(), "disk").check(activated=False)


@pytest.mark.parametrize("option", ["-c/dev/nbd0", "-k/s", "-b::1", "-p1", "--selinux-label=x"])
def test_activated(option: str) -> None:
    error = refusal(option, "disk", activated=True)
    assert str(error).endswith(": not with socket activation (LISTEN_FDS)")


def test_list_activated() -> None:
    assert str(refusal("-L", activated=True)).startswith("--list: not with socket activation")


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
    script = "import sys, pynbd.cli.qemu_nbd as _; print({'numpy', 'uvloop'} & set(sys.modules))"
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
