"""pynbd and qemu-nbd are asked the same: a spread over all kinds of images, for a short time.

``python -m interop.differential`` takes longer, and all of them.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import peers, samples
from interop.differential.comparing import Differs, Findings
from interop.differential.differences import EVERY
from interop.differential.images import Subject, chains, few, of_matrix, subjects
from interop.differential.runs import by_pynbd, by_qemu_nbd, pair, read, write
from tests.conformance.client import Mode

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


@pytest.fixture(autouse=True)
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


@pytest.mark.parametrize(
    "change, told",
    [
        ("write -q -P 2 70000 1", "the data differ from 70000 on"),
        ("write -q -z -u 256k 64k", "base:allocation is"),
        ("write -q -P 1 512k 64k", "qemu:allocation-depth is"),
    ],
)
def test_what_differs_is_found(change: str, told: str, tmp_path: Path) -> None:
    """Each server has an image of its own, and they differ in one thing."""
    images = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    base = tmp_path / "base.raw"
    base.write_bytes(b"\1" * (1 << 20))
    for image in images:
        line = ["create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", image]
        peers.run("qemu-img", *line)
        samples.qemu_io(image, "write -q -P 1 0 300k")
    samples.qemu_io(images[1], change)
    subject = Subject("of this test", lambda folder: folder, 64 << 10, 64 << 10)
    findings = Findings()
    contexts = ("base:allocation", "qemu:allocation-depth")
    with ExitStack() as stack:
        options = ("-r", "-f", "qcow2", "-A")
        served = (
            stack.enter_context(by_pynbd(images[0], *options)),
            stack.enter_context(by_qemu_nbd(images[1], *options)),
        )
        both = stack.enter_context(pair(subject, served, Mode.EXTENDED, contexts, findings))
        both.all_of_it()
    with pytest.raises(Differs, match=told):
        findings.judge()
