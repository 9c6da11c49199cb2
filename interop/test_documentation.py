"""Every command line of the documentation, and the output that it shows."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import peers, samples, terminal

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tls.md"]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# What is in their blocks is run by other tests.
ELSEWHERE = {
    "docs/library.md": "tests/test_library.py",
    "docs/reference.md": "interop/test_examples.py",
}
SERVER = "pynbd serve"


def lines() -> Iterator[tuple[str, str]]:
    """(place, command) of each line of the ``sh`` blocks."""
    for document in DOCUMENTS:
        for first, text in terminal.blocks(document, "sh"):
            for number, line in enumerate(text.splitlines(), first):
                words = shlex.split(line, comments=True)
                if words:
                    yield f"{document.name}:{number}", line


@pytest.fixture(autouse=True)
def ports() -> Iterator[None]:
    with terminal.documented_ports():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the documents speak of."""
    peers.require("qemu-img", "nbdinfo")
    samples.chain(tmp_path)
    disk = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
    samples.qemu_io(disk, "write -q -P 1 0 1M", "write -q -P 2 8M 64k", "write -q -z 16M 1M")
    peers.run("qemu-img", "snapshot", "-c", "before-upgrade", disk)
    peers.run("qemu-img", "bitmap", "--add", disk, "backup-1")
    samples.qemu_io(disk, "write -q -P 3 32M 256k")
    samples.sparse_file(tmp_path / "disk.img", 4 << 20)
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "upload.qcow2", "4M")
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_terminal(document: Path, folder: Path) -> None:
    with ExitStack() as stack:
        shell = terminal.Terminal(folder, terminal.environment())
        stack.callback(shell.close)
        for step in terminal.steps(document):
            status, output = shell.run(step.command, step.output)
            where = f"{document.name}:{step.line}: {step.command}"
            assert terminal.matches(output, step.output), f"{where}\n{output}"
            assert status == 0, f"{where}: status {status}\n{output}"


@pytest.mark.parametrize("place, command", list(lines()))
def test_command(place: str, command: str, folder: Path) -> None:
    words = shlex.split(command, comments=True)
    line = ["unshare", "-rn"] if terminal.lends_a_network() else []
    line += ["sh", "-c", f"ip link set lo up; exec {command}"]
    serves = command.startswith(SERVER)
    with subprocess.Popen(
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=terminal.environment(),
        text=True,
    ) as process:
        if serves:
            assert process.stdout
            first = process.stdout.readline()
            process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, f"{place}: {shlex.join(words)}\n{output}{errors}"
    if serves:
        assert first.startswith("nbd"), f"{place}: {first}{output}{errors}"


def test_the_program_of_the_first_page(folder: Path) -> None:
    (program,) = [text for _, text in terminal.blocks(ROOT / "README.md", "python")]
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    first, status = done.stdout.splitlines()
    assert first == r"bytearray(b'\x01\x01\x01\x01')"
    assert status.startswith("[(1048576, 0), (")


def test_make() -> None:
    """What is said of make is in the Makefile."""
    text = "".join(page.read_text() for page in PAGES)
    lines = set(re.findall(r"(?m)(?:^|`)(make \w[^`\n]*)", text))
    assert {"make serve", "make test", "make help"} <= lines
    for line in lines:
        subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_typed_is_run(page: Path) -> None:
    """No page has command lines that no test runs."""
    name = str(page.relative_to(ROOT))
    if name in ELSEWHERE:
        assert page.name in (ROOT / ELSEWHERE[name]).read_text()
    elif page not in DOCUMENTS:
        assert not [*terminal.blocks(page, "console"), *terminal.blocks(page, "sh")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_dead_link_is_not_shown(page: Path) -> None:
    """Every relative link leads to a file, or to a heading of the same page."""
    for target in terminal.links(page):
        assert (page.parent / target).exists(), target
    headings = [
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"(?m)^#+ (.*)$", page.read_text())
    ]
    for anchor in re.findall(r"\]\(#([^)]*)\)", page.read_text()):
        assert anchor in headings
