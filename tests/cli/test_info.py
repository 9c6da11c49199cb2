"""``pynbd info`` of an image as people read it; that its JSON is qemu-img's is in
interop/test_info_*.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.looking import K, M, pynbd, pynbd_here, write_chain

TEXT = """\
image:     top.qcow2
format:    qcow2, version 3 (compat 1.1)
size:      1 MiB (1048576 bytes)
on disk:   {size}
clusters:  64 KiB, compression zlib

Backing chain, 2 layers, the active one first:
  FILE               FORMAT  SIZE   ON DISK
  top.qcow2          qcow2   1 MiB  {size}   1 snapshot, 3 bitmaps
  └─ below.qcow2     qcow2   1 MiB  {size}   1 bitmap

Internal snapshots:
  ID  NAME    TAKEN                VM STATE  VM CLOCK
  7   before  {date}  -         0:00:00.000

Dirty bitmaps:
  NAME       GRANULARITY  RECORDING  DIRTY
  recording  4 KiB        yes        8 KiB (0.8%)
  resting    64 KiB       no         0 B (0.0%)
  torn       64 KiB       -          unknown: not saved by who has it in use, or had

Dirty bitmaps of below.qcow2:
  NAME   GRANULARITY  RECORDING  DIRTY
  older  64 KiB       yes        64 KiB (6.2%)
"""


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return write_chain(tmp_path)


def test_text(top: Path) -> None:
    done = pynbd("info", top.name, cwd=top.parent)
    assert (done.returncode, done.stderr) == (0, "")
    said = re.sub(r" +", " ", done.stdout)
    pattern = re.escape(re.sub(r" +", " ", TEXT))
    pattern = pattern.replace(r"\{size\}", r"\d+ KiB").replace(r"\{date\}", r"[-\d]+ [\d:]+")
    assert re.fullmatch(pattern, said), done.stdout


@pytest.mark.parametrize("environment,bold", [({}, True), ({"NO_COLOR": "1"}, False)])
def test_headings_on_a_terminal(top: Path, environment: dict[str, str], bold: bool) -> None:
    ours, theirs = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "pynbd", "info", str(top)],
            stdout=theirs,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"}
            | environment,
            timeout=30,
            check=True,
        )
        said = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert ("\x1b[1mDirty bitmaps:\x1b[0m" in said) == bold
    assert ("\x1b" in said) == bold


def test_json(top: Path) -> None:
    """The image alone, or all of the chain."""
    alone = json.loads(pynbd("info", "--json", top).stdout)
    chain = json.loads(pynbd("info", "--json", "--backing-chain", top).stdout)
    assert chain[0] == alone
    assert [image["filename"] for image in chain] == [str(top), str(top.parent / "below.qcow2")]
    assert alone["format-specific"]["data"]["bitmaps"] == [
        {"name": "recording", "granularity": 4 * K, "flags": ["auto"], "dirty-bytes": 8 * K},
        {"name": "resting", "granularity": 64 * K, "flags": [], "dirty-bytes": 0},
        {"name": "torn", "granularity": 64 * K, "flags": ["in-use"]},
    ]


def test_a_raw_image_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1001))
    done = pynbd("info", "--json", "-f", "raw", tmp_path / "disk.raw")
    assert json.loads(done.stdout)["virtual-size"] == 1001


def test_a_chain_that_is_broken(top: Path) -> None:
    """What is there is told; status 1 says that something is not, and one line what."""
    (top.parent / "below.qcow2").unlink()
    why = (
        "pynbd: below.qcow2: cannot be opened: No such file or directory"
        " (backing file of top.qcow2)\n"
    )
    done = pynbd("info", top.name, cwd=top.parent)
    assert (done.returncode, done.stderr) == (1, why)
    assert "backing:   below.qcow2, which is not looked at\n" in done.stdout
    assert "torn" in done.stdout
    done = pynbd("info", "--json", top.name, cwd=top.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["backing-filename"] == "below.qcow2"
    done = pynbd("info", "--json", "--backing-chain", top.name, cwd=top.parent)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", why)


@contextmanager
def written_by_another(image: Path) -> Iterator[None]:
    """QEMU's locks of a writer, in this process: it writes, and others may not."""
    with image.open("r+b") as file:
        for byte in (100, 101, 201):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        yield


def test_an_image_in_use(top: Path) -> None:
    """It is refused with the way out, which works, and warns."""
    with written_by_another(top):
        done = pynbd("info", top)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"pynbd: .*top\.qcow2: .*\(--force-share .*\)\n", done.stderr)
        for option in ("-U", "--force-share"):
            done = pynbd("info", option, top)
            assert done.returncode == 0
            assert "another process writes this image" in done.stderr
            assert "1 MiB" in done.stdout


@pytest.mark.parametrize(
    "args,status,said",
    [
        (["-"], 1, "-: cannot be opened: No such file or directory"),
        (["."], 1, ".: cannot be opened: not a regular file or a block device"),
        ([""], 2, "the name of an image or an NBD URI is expected"),
        (
            ["--backing-chain", "nbd://localhost"],
            2,
            "--backing-chain is for images: a server does not tell of its chain",
        ),
        (
            ["-U", "nbd://localhost"],
            2,
            "--force-share is for images: how an export is opened is the server's",
        ),
        (
            ["nbds://localhost?tls-type=anon"],
            2,
            "nbds://localhost/?tls-type=anon: tls-type: 'anon': x509 or psk is expected",
        ),
        (
            ["nbd+unix:///?socket=none"],
            1,
            "nbd+unix:///?socket=none: No such file or directory",
        ),
    ],
)
def test_refused(
    args: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = pynbd_here(monkeypatch, capsys, "info", *args)
    assert done == (status, "", f"pynbd: {said}\n")


def test_names_cannot_command_a_terminal(tmp_path: Path) -> None:
    name = "evil\x1b[2Jdisk.raw"
    (tmp_path / name).write_bytes(bytes(M))
    assert "\x1b" not in pynbd("info", "-f", "raw", name, cwd=tmp_path).stdout


def test_an_error_is_one_line(tmp_path: Path) -> None:
    """Whatever the name of the file, it is no command to a terminal."""
    done = pynbd("info", "no\x1b[2J\nsuch\udcff.raw", cwd=tmp_path)
    said = "pynbd: no?[2J?such?.raw: cannot be opened: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_closed_standard_output(top: Path) -> None:
    line = f'exec "{sys.executable}" -m pynbd info "{top}" >&-'
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
