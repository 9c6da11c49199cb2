"""pynbd and qemu-nbd are asked the same: a spread over all kinds of images, for a short time.

``python -m interop.differential`` takes longer, and all of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from interop import peers, samples
from interop.differential.asking import NO_FLAGS, Ask
from interop.differential.changes import Change, change
from interop.differential.comparing import Differs, Findings
from interop.differential.differences import COPIED, EVERY
from interop.differential.images import Subject, chains, few, of_matrix, subjects
from interop.differential.runs import by_pynbd, by_qemu_nbd, pair, read, write
from tests.conformance.client import Cmd, CmdFlag, Mode

SEED = 1
DAMAGED = (
    "plain, L2 table misaligned",
    "plain, data misaligned",
    "plain, compressed far away",
    "extended, a subcluster both allocated and zero",
    "bitmaps, bitmap data in data",
)
ROWS = Path(__file__).parents[1] / "docs" / "protocol-support.md"

BY_NAME = {subject.name: subject for subject in subjects()}
READ = [*(s.name for s in few(chains())), "raw odd", *(f"damaged {name}" for name in DAMAGED)]
WRITTEN = [*(s.name for s in few(of_matrix())), "raw sectors"]


@pytest.fixture(autouse=True, scope="module")
def _peers() -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd")


@pytest.mark.parametrize("name", READ)
def test_read(name: str, tmp_path: Path) -> None:
    findings = Findings()
    read(BY_NAME[name], tmp_path, 240, SEED, findings)
    findings.judge()
    assert findings.counts["read"] > 40
    assert findings.counts["status"] > 20


@pytest.mark.parametrize("name", WRITTEN)
def test_written(name: str, tmp_path: Path) -> None:
    findings = Findings()
    write(BY_NAME[name], tmp_path, 240, SEED, findings)
    findings.judge()
    assert findings.counts["write"] > 30
    assert findings.counts["zeroes"] > 15


def test_every_rule_names_rows_of_the_protocol() -> None:
    rows = set(re.findall(r"^\| ([A-Z]\d+) \|", ROWS.read_text(), re.MULTILINE))
    assert {row for rule in EVERY for row in re.findall(r"[A-Z]\d+", rule.row)} <= rows


CONTEXTS = ("base:allocation", "qemu:allocation-depth")
PLAIN = Subject("of this test", lambda folder: folder, 64 << 10, 64 << 10)


@contextmanager
def served(images: tuple[Path, Path], *options: str) -> Iterator[tuple[Path, Path]]:
    """The sockets of pynbd with the first image, and of qemu-nbd with the second."""
    with (
        by_pynbd(images[0], "-f", "qcow2", "-A", *options) as ours,
        by_qemu_nbd(images[1], "-f", "qcow2", "-A", *options) as theirs,
    ):
        yield ours, theirs


def overlays(folder: Path, options: str, *commands: str) -> tuple[Path, Path]:
    """Two that are alike, of 1 MiB, above a raw image without zeroes."""
    images = folder / "ours.qcow2", folder / "theirs.qcow2"
    base = folder / "base.raw"
    base.write_bytes(b"\1" * (1 << 20))
    for image in images:
        below = ["-o", options, "-b", base.name, "-F", "raw"]
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", *below, image)
        samples.qemu_io(image, *commands)
    return images


@pytest.mark.parametrize(
    "command, told",
    [
        ("write -q -P 2 70000 1", "the data differ from 70000 on"),
        ("write -q -z -u 256k 64k", "base:allocation is"),
        ("write -q -P 1 512k 64k", "qemu:allocation-depth is"),
    ],
)
def test_what_differs_is_found(command: str, told: str, tmp_path: Path) -> None:
    """Each server has an image of its own, and they differ in one thing."""
    images = overlays(tmp_path, "compat=1.1", "write -q -P 1 0 300k")
    samples.qemu_io(images[1], command)
    findings = Findings()
    with (
        served(images, "-r") as sockets,
        pair(PLAIN, sockets, Mode.EXTENDED, CONTEXTS, findings) as both,
    ):
        both.all_of_it()
    with pytest.raises(Differs, match=told):
        findings.judge()


@pytest.fixture(scope="module")
def zeroes_in_two_ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A cluster of zeroes here, zero bytes there."""
    images = overlays(tmp_path_factory.mktemp("zeroes"), "compat=1.1")
    samples.qemu_io(images[0], "write -q -z -u 512k 64k")
    samples.qemu_io(images[1], "write -q -P 0 512k 64k")
    with served(images, "-r") as sockets:
        yield sockets


def asked(command: Cmd, kilobytes: int, length: int, flags: CmdFlag = NO_FLAGS) -> Change:
    payload = bytes(length << 10) if command == Cmd.WRITE else b""
    ask = Ask("of this test", command, kilobytes << 10, length << 10, flags, payload)
    return change(ask, detecting=True)


@pytest.mark.parametrize(
    "changes, open_",
    [
        # What covers the cluster leaves nothing open, however it is made zero.
        ([asked(Cmd.WRITE_ZEROES, 512, 64)], False),
        ([asked(Cmd.WRITE_ZEROES, 512, 64, CmdFlag.NO_HOLE)], False),
        ([asked(Cmd.WRITE, 448, 192)], False),
        ([asked(Cmd.TRIM, 512, 64)], False),
        # What covers a part of it does, unless it does nothing, or something else came after it.
        ([asked(Cmd.WRITE_ZEROES, 512, 63)], True),
        ([asked(Cmd.WRITE, 513, 4)], True),
        ([asked(Cmd.WRITE_ZEROES, 512, 63), asked(Cmd.TRIM, 514, 62)], True),
        ([asked(Cmd.WRITE_ZEROES, 512, 63), asked(Cmd.TRIM, 512, 64)], False),
        ([asked(Cmd.TRIM, 514, 62)], False),
        # Another cluster is another cluster.
        ([asked(Cmd.WRITE_ZEROES, 577, 62), asked(Cmd.WRITE_ZEROES, 500, 12)], False),
        ([], False),
    ],
)
def test_zeroes_may_be_kept_in_two_ways_only_where_a_part_was_zeroed(
    changes: list[Change], open_: bool, zeroes_in_two_ways: tuple[Path, Path]
) -> None:
    findings = Findings(changes=changes)
    with pair(PLAIN, zeroes_in_two_ways, Mode.EXTENDED, CONTEXTS, findings) as both:
        both.all_of_it()
    if open_:
        findings.judge()
        assert findings.rules.total() == 1
    else:
        with pytest.raises(Differs, match="base:allocation is 3 here, 0 there"):
            findings.judge()


@pytest.mark.parametrize("shared", [True, False])
def test_subclusters_between_what_is_copied_and_what_is_written(
    shared: bool, tmp_path: Path
) -> None:
    """Of the first cluster subclusters 2 and 20 are there, and shared with a snapshot; 10 is
    written. qemu-nbd then has all from 2 to 20, and pynbd three of them.
    """
    data = "write -q -P 2 4k 2k", "write -q -P 2 40k 2k"
    images = overlays(tmp_path, "extended_l2=on", *data)
    for image in images if shared else ():
        peers.run("qemu-img", "snapshot", "-c", "s", image)
    subject = Subject("of this test", lambda folder: folder, 64 << 10, 2 << 10, snapshot="s")
    findings = Findings()
    with (
        served(images) as sockets,
        pair(subject, sockets, Mode.EXTENDED, CONTEXTS, findings, writable=True) as both,
    ):
        both.exchange([Ask("write", Cmd.WRITE, 20 << 10, 2 << 10, payload=b"w" * 2048)])
        both.all_of_it()
    findings.judge()
    assert findings.rules[COPIED] == findings.rules.total() == (7 + 9 if shared else 0)


def test_the_servers_end_with_a_run_that_is_ended() -> None:
    line = ["-m", "interop.differential", "--way", "read", "--only", "raw odd", "--each", "1000000"]
    with subprocess.Popen([sys.executable, *line], start_new_session=True) as run:
        while sum(b"disk.raw" in command for command in commands_of(run.pid)) < 2:
            assert run.poll() is None
            time.sleep(0.01)
        run.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM
        assert not commands_of(run.pid)


def commands_of(session: int) -> list[bytes]:
    """The command lines of its processes, as the kernel has them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, FileNotFoundError):
            if os.getsid(int(process.name)) == session:
                found.append((process / "cmdline").read_bytes())
    return found
