"""``pynbd check``: texts, statuses, what is refused; that its numbers are qemu-img's is in
interop/test_check_*.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pynbd.block.creation import create_image
from pynbd.block.engine import Engine
from pynbd.block.file import open_host_file
from pynbd.block.new_file import Preallocation
from pynbd.block.qcow2.builder import Compressed, Data, Image, Written, poke
from tests.cli.looking import pynbd, pynbd_here

K, M = 1 << 10, 1 << 20
CLUSTER = 4 * K


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of 256 clusters; the tests are beside it."""
    monkeypatch.chdir(tmp_path)
    return Path("disk.qcow2")


def write(disk: Path) -> Written:
    clusters = {0: Data(b"a"), CLUSTER: Data(b"b"), 2 * CLUSTER: Compressed(b"c" * CLUSTER)}
    return Image(size=M, cluster_bits=12, clusters=clusters).write(disk)


def with_a_leak(disk: Path) -> None:
    """The header's refcount is 2."""
    write_refcount(disk, write(disk), 0, 2)


def with_a_corruption(disk: Path) -> None:
    """That of the first cluster with data is 0: its COPIED flag is wrong, too."""
    write_refcount(disk, write(disk), 2, 0)


def write_refcount(disk: Path, written: Written, cluster: int, count: int) -> None:
    table = written.header.refcount_table_offset
    block = int.from_bytes(disk.read_bytes()[table : table + 8], "big")
    poke(disk, block + 2 * cluster, count.to_bytes(2, "big"))


def end(disk: Path) -> int:
    return disk.stat().st_size


def test_sound(disk: Path) -> None:
    write(disk)
    done = pynbd("check", disk)
    assert done.stdout == (
        "No errors were found on the image.\n"
        "3/256 = 1.17% allocated, 33.33% fragmented, 33.33% compressed clusters\n"
        f"Image end offset: {end(disk)}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_leaks(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_leak(disk)
    status, out, err = pynbd_here(monkeypatch, capsys, "check", disk)
    assert status == 3
    assert err == "disk.qcow2: cluster 0: the refcount is 2, with 1 references: a leak\n"
    assert out.startswith("1 leaked cluster was found on the image: ")


def test_corruptions(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_corruption(disk)
    status, out, err = pynbd_here(monkeypatch, capsys, "check", disk)
    assert status == 2
    assert "disk.qcow2: cluster 2: the refcount is 0, with 1 references: a corruption\n" in err
    assert out.startswith("2 errors were found on the image: ")


@pytest.mark.parametrize("option", [["--json"], ["--output=json"], ["--output", "json", "--json"]])
def test_json(
    option: list[str],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is zero is left out, but for the check errors."""
    with_a_leak(disk)
    status, out, _ = pynbd_here(monkeypatch, capsys, "check", *option, disk)
    assert status == 3
    assert json.loads(out) == {
        "filename": "disk.qcow2",
        "format": "qcow2",
        "check-errors": 0,
        "image-end-offset": end(disk),
        "leaks": 1,
        "total-clusters": 256,
        "allocated-clusters": 3,
        "fragmented-clusters": 1,
        "compressed-clusters": 1,
    }


def test_quiet(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_corruption(disk)
    assert pynbd_here(monkeypatch, capsys, "check", "-q", disk) == (2, "", "")
    with_a_leak(disk)
    assert pynbd_here(monkeypatch, capsys, "check", "-q", "--json", disk) == (3, "", "")


def test_repair_of_leaks(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_leak(disk)
    status, out, err = pynbd_here(monkeypatch, capsys, "check", "-r", "leaks", disk)
    assert (status, err) == (0, "")
    assert out.startswith("Repaired: 1 leaked cluster, 0 errors.\nNo errors were found")
    assert pynbd_here(monkeypatch, capsys, "check", "-q", disk)[0] == 0


def test_repair_of_leaks_leaves_corruptions(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_corruption(disk)
    before = disk.read_bytes()
    assert pynbd_here(monkeypatch, capsys, "check", "-q", "-r", "leaks", disk)[0] == 2
    assert disk.read_bytes() == before


def test_repair_of_all(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_corruption(disk)
    status, out, _ = pynbd_here(monkeypatch, capsys, "check", "--repair=all", "--json", disk)
    assert status == 0
    report = json.loads(out)
    assert report["corruptions-fixed"] == 2
    assert "corruptions" not in report
    assert "leaks-fixed" not in report


DIRTY = (
    "it was not closed properly: its refcounts are out of date, which opening it for writing, or"
    " -r all, mends"
)
CORRUPT = "it is marked corrupt: it is not opened for writing before -r all has cleared that"
NOT_DIRTY = "it was not closed properly: it was marked dirty, and is not any more"
NOT_CORRUPT = "it was marked corrupt, and is not any more"
BOTH = 1 << 0 | 1 << 1  # "Incompatible features": the dirty bit, the corrupt bit


def marked(disk: Path, incompatible: int) -> None:
    write(disk)
    poke(disk, 72, incompatible.to_bytes(8, "big"))


@pytest.mark.parametrize(
    "incompatible, options, told, left",
    [
        (0, [], [], 0),
        (1, [], [DIRTY], 1),
        (2, [], [CORRUPT], 2),
        (BOTH, [], [DIRTY, CORRUPT], BOTH),
        (BOTH, ["--json"], [], BOTH),
        (BOTH, ["--output=json"], [], BOTH),
        (BOTH, ["-q"], [], BOTH),
        (1, ["-r", "leaks"], [NOT_DIRTY], 0),
        (BOTH, ["-r", "all"], [NOT_DIRTY, NOT_CORRUPT], 0),
        (BOTH, ["-r", "all", "--json"], [], 0),
    ],
)
def test_marks(
    incompatible: int,
    options: list[str],
    told: list[str],
    left: int,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are no errors by themselves: status and numbers are qemu-img's."""
    marked(disk, incompatible)
    status, _, err = pynbd_here(monkeypatch, capsys, "check", *options, disk)
    assert (status, err) == (0, "".join(f"disk.qcow2: {line}\n" for line in told))
    assert int.from_bytes(disk.read_bytes()[72:80], "big") == left


def test_a_mark_that_stays(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """-r leaks leaves the corruption, and so the mark of it."""
    with_a_corruption(disk)
    poke(disk, 72, (2).to_bytes(8, "big"))
    _, _, err = pynbd_here(monkeypatch, capsys, "check", "-r", "leaks", disk)
    assert err.endswith(f"disk.qcow2: {CORRUPT}\n")


def test_not_all_could_be_checked(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refcount block that is not at a cluster."""
    written = write(disk)
    poke(disk, written.header.refcount_table_offset, (512).to_bytes(8, "big"))
    status, out, err = pynbd_here(monkeypatch, capsys, "check", disk)
    assert status == 1
    assert "8 times the check could not look at something" in out
    assert err.endswith("pynbd: disk.qcow2: not all of it could be checked\n")


@pytest.mark.parametrize("options", [[], ["-f", "raw"], ["-r", "all"], ["--json"]])
def test_raw(
    options: list[str],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk.write_bytes(bytes(M))
    said = "pynbd: disk.qcow2: its format is raw, of which there is no check\n"
    assert pynbd_here(monkeypatch, capsys, "check", *options, disk) == (63, "", said)
    assert disk.read_bytes() == bytes(M)


@pytest.mark.parametrize(
    "line, status, said",
    [
        (["-r", "some"], 2, "--repair: 'some' is not one of 'leaks', 'all'"),
        (["--output=xml"], 2, "--output: 'xml' is not one of 'human', 'json'"),
        (["-f", "vmdk"], 2, "--format: 'vmdk' is not one of 'raw', 'qcow2'"),
        (
            ["-U", "-r", "all"],
            2,
            "--repair excludes --force-share: nobody else may use the image meanwhile",
        ),
        (["-f", "qcow2"], 1, "disk.qcow2: it is not a qcow2 image; it looks like raw"),
    ],
)
def test_refused(
    line: list[str],
    status: int,
    said: str,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk.write_bytes(bytes(M))
    done = pynbd_here(monkeypatch, capsys, "check", *line, disk)
    assert done == (status, "", f"pynbd: {said}\n")


@pytest.mark.parametrize("options", [[], ["-r", "all"]])
def test_nothing_there(
    options: list[str],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "pynbd: disk.qcow2: cannot be opened: No such file or directory\n"
    assert pynbd_here(monkeypatch, capsys, "check", *options, disk) == (1, "", said)


@pytest.mark.parametrize("name", ["", "nbd://localhost"])
def test_names_of_no_files(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = f"pynbd: IMAGE: {name!r} is not the name of a file\n"
    assert pynbd_here(monkeypatch, capsys, "check", name) == (2, "", said)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT] * 2])
def test_interrupted(disk: Path, numbers: list[signal.Signals]) -> None:
    """In one line, with the status of a signal. Those that come together are one."""
    line = [sys.executable, "-m", "pynbd", "check", str(disk)]
    # Long enough to be met: 2^23 clusters, in a sparse file.
    asyncio.run(create_image(str(disk), size=1 << 39, preallocation=Preallocation.METADATA))
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        while not any(
            os.path.realpath(link) == str(disk.resolve())
            for link in Path(f"/proc/{process.pid}/fd").iterdir()
        ):
            time.sleep(0.01)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.001)
        assert process.communicate()[1] == "pynbd: interrupted\n"
    assert process.returncode == 128 + signal.SIGTERM


def test_closed_standard_descriptors(disk: Path) -> None:
    """What it opens does not become its standard error, or anything else that is written to."""
    with_a_leak(disk)
    line = f'exec "{sys.executable}" -m pynbd check -r all "{disk}" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", line], check=False, timeout=30).returncode == 0
    assert pynbd("check", disk).returncode == 0


def test_somebody_writes(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then only --force-share looks at it, with a warning; nobody repairs it."""
    with_a_leak(disk)
    engine = Engine(1)
    writer = open_host_file(engine, str(disk), writable=True)
    try:
        for options in ([], ["-r", "leaks"]):
            status, _, err = pynbd_here(monkeypatch, capsys, "check", *options, disk)
            assert status == 1
            assert "another process" in err
        done = pynbd("check", "--force-share", disk)
        assert done.returncode == 3
        assert "another process writes this image" in done.stderr
    finally:
        writer.close()
        engine.close()


def test_somebody_reads(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_leak(disk)
    engine = Engine(1)
    reader = open_host_file(engine, str(disk), writable=False)
    try:
        assert pynbd_here(monkeypatch, capsys, "check", "-q", disk)[0] == 3
        # No hint at -r: here it is another option than that of `pynbd serve`.
        said = "pynbd: disk.qcow2: another process uses it\n"
        assert pynbd_here(monkeypatch, capsys, "check", "-r", "all", disk) == (1, "", said)
    finally:
        reader.close()
        engine.close()
