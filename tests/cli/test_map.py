"""``pynbd map`` as people type it; that its lines are nbdinfo's is in interop/test_map_*.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from interop import peers, samples
from pynbd.block.qcow2.builder import Data, Image
from tests.cli.looking import K, M, pynbd, pynbd_here, write_chain

TABLE = """\
    offset      length  base:allocation    qemu:allocation-depth  qemu:dirty-bitmap:recording
         0       65536  data               backing depth 2        clean
     65536        8192  data               local                  dirty
     73728       57344  data               local                  clean
    131072       65536  hole,zero          local                  clean
    196608      851968  hole,zero          absent                 clean
"""
THERE = (
    "base:allocation, qemu:allocation-depth, qemu:dirty-bitmap:recording, qemu:dirty-bitmap:resting"
)
TORN = "is in use, or was when its last writer ended: nobody knows what is dirty"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return write_chain(tmp_path)


def test_base_allocation_is_the_default(top: Path) -> None:
    done = pynbd("map", top)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "         0      131072    0  data\n    131072      917504    3  hole,zero\n"
    )


def test_a_table(top: Path) -> None:
    """Short names, and a context twice."""
    contexts = ["-c", "allocation", "-c", "depth", "-c", "base:allocation"]
    done = pynbd("map", *contexts, "--context", "qemu:dirty-bitmap:recording", top)
    assert (done.returncode, done.stdout, done.stderr) == (0, TABLE, "")


def test_all_contexts_that_begin_so(top: Path) -> None:
    """Not the inconsistent one; and not the one of the backing file, which has to be named, and is
    shown with a warning.
    """
    done = pynbd("map", "-c", "qemu:dirty-bitmap:", top)
    names = ("recording", "resting")
    assert done.stdout.split("\n")[0].split()[2:] == [f"qemu:dirty-bitmap:{n}" for n in names]
    assert done.stderr == ""
    done = pynbd("map", "-c", "qemu:dirty-bitmap:older", top)
    assert (done.returncode, done.stdout != "") == (0, True)
    assert "bitmap 'older' is of the backing file" in done.stderr


@pytest.mark.parametrize(
    "args,status,said",
    [
        (["-"], 1, "-: cannot be opened: No such file or directory"),
        (["missing.qcow2"], 1, "missing.qcow2: cannot be opened: No such file or directory"),
        ([""], 2, "the name of an image or an NBD URI is expected"),
        ([], 2, "missing argument 'IMAGE|URI'"),
        (
            ["-c", "nonsense", "top.qcow2"],
            1,
            f"top.qcow2: no metadata context 'nonsense'; there are: {THERE}",
        ),
        (
            ["-c", "qemu:dirty-bitmap:torn", "top.qcow2"],
            1,
            f"top.qcow2: bitmap 'torn' {TORN}",
        ),
        (["-f", "vmdk", "top.qcow2"], 2, "--format: 'vmdk' is not one of 'raw', 'qcow2'"),
        (
            ["-f", "raw", "nbd://localhost"],
            2,
            "--format is for images: how an export is opened is the server's",
        ),
        (
            ["--image", "disk.bmp", "top.qcow2"],
            2,
            "--image: disk.bmp: the name has to end in .svg or .png",
        ),
        (
            ["--image", "disk.svg", "--json", "top.qcow2"],
            2,
            "--image draws all there is: without --context, --json and --totals",
        ),
        (
            ["--image", "disk.svg", "nbd://localhost"],
            2,
            "--image draws images: a server does not tell of its layers",
        ),
        (
            ["nbd:localhost"],
            2,
            "NBD URI 'nbd:localhost': nbd: is followed by //",
        ),
    ],
)
def test_refused(
    args: list[str],
    status: int,
    said: str,
    top: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(top.parent)
    done = pynbd_here(monkeypatch, capsys, "map", *args)
    assert done == (status, "", f"pynbd: {said}\n")
    assert not list(top.parent.glob("disk.*"))


def test_a_file_that_looks_like_a_uri(top: Path) -> None:
    name = "nbd:disk"
    (top.parent / name).write_bytes(bytes(K))
    done = pynbd("map", "-f", "raw", f"./{name}", cwd=top.parent)
    assert (done.returncode, done.stderr) == (0, "")


def test_bitmaps_below_a_slice_are_not_its_own(top: Path) -> None:
    """They speak of other offsets; QEMU does not see them either."""
    file = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}}
    name = "json:" + json.dumps({"driver": "raw", "offset": 64 * K, "file": file})
    done = pynbd("map", "-c", "depth", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("         0      131072    1  local\n")
    done = pynbd("map", "-c", "qemu:dirty-bitmap:recording", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("no bitmap 'recording'; there is none\n")


def test_a_snapshot(tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io")
    disk = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M")
    samples.qemu_io(disk, "write -q 0 64k")
    peers.run("qemu-img", "snapshot", "-c", "before", disk)
    samples.qemu_io(disk, "write -q 512k 64k")
    done = pynbd("map", "--totals", "-l", "before", disk)
    assert done.stdout.split()[:5] == ["65536", "6.2%", "0", "data", "983040"]
    assert pynbd("compare", "-q", disk, disk).returncode == 0
    done = pynbd("compare", "-l", "before", disk, disk)
    assert (done.returncode, done.stdout) == (1, "The contents differ at offset 524288.\n")
    done = pynbd("map", "-l", "before", "nbd://localhost")
    assert done.stderr.startswith("pynbd: --load-snapshot is for images")


def test_damaged_metadata(tmp_path: Path) -> None:
    """What is in order is printed, then one line says which file is not."""
    image = Image(size=K * M, clusters={0: Data(b"x"), 512 * M: Data(b"y")})
    written = image.write(tmp_path / "a.qcow2")
    with (tmp_path / "a.qcow2").open("r+b") as file:
        file.seek(written.entry_offset(512 * M))
        file.write((0x1234).to_bytes(8))  # a host offset that is not at a cluster
    done = pynbd("map", "a.qcow2", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "pynbd: a.qcow2: corrupt metadata in the range"


def test_a_picture(top: Path) -> None:
    done = pynbd("map", "--image", "disk.svg", top.name, cwd=top.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = " ".join(ElementTree.parse(top.parent / "disk.svg").getroot().itertext())
    for word in ("top.qcow2", "below.qcow2", "recording", "resting"):
        assert word in text


def test_a_reader_that_leaves(top: Path) -> None:
    """Not a word; 141 is what a shell gives for SIGPIPE."""
    line = [sys.executable, "-m", "pynbd", "map", str(top)]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, timeout=20, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk(top: Path) -> None:
    line = [sys.executable, "-m", "pynbd", "map", str(top)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr == b"pynbd: standard output: No space left on device\n"
