"""Every example that ``--help``, the man pages and docs/reference.md end with, as it stands there.

Only what no test can have is in another place: /run, the home folder, a host called backup.example.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from interop import peers, samples, terminal
from interop.documented import programs
from pynbd.cli.main import commands
from pynbd.cli.pages import page_of
from pynbd.cli.qemu_nbd.command import qemu_nbd
from pynbd.tls import throwaway

SOCKET = "nbd+unix:///?socket=/run/disk.sock"
# What is there before an example is run: the lines of the first of these that is in it.
BEFORE = {
    "nbd://localhost/before": (
        "nbdkit -f file dir=named &",
        "until nbdinfo --size nbd://localhost/after > size; do sleep 0.05; done 2> /dev/null",
    ),
    "nbd://backup.example": ("pynbd serve -x disk disk.qcow2 &",),
    "nbd://localhost": ("pynbd serve -x disk disk.qcow2 &",),
    f"disk.raw '{SOCKET}": ("pynbd serve -f raw -k /run/disk.sock other.raw &",),
    f"'{SOCKET}": ("pynbd serve -k /run/disk.sock disk.qcow2 &",),
    "/run/disks.sock": ("pynbd serve -k /run/disks.sock disk.qcow2 &",),
    "-L -k /run/disk.sock": ("pynbd serve -k /run/disk.sock disk.qcow2 &",),
    "family/": ("pynbd demo family > top 2> /dev/null",),
    "~/.config/fish": ("mkdir -p ~/.config/fish/completions",),
    "~/.zfunc": ("mkdir ~/.zfunc",),
}
SERVERS = ("pynbd serve", "pynbd-qemu-nbd -k")
KNOCK = f"until nbdinfo --size '{SOCKET}' > size 2> /dev/null; do sleep 0.05; done"


def examples() -> Iterator[str]:
    for root in (page_of(commands, "pynbd"), page_of(qemu_nbd, "pynbd-qemu-nbd")):
        for page in root.all():
            for section in page.sections:
                if section.title == "Examples":
                    yield from section.lines


def prepare(folder: Path) -> None:
    """The files that the examples speak of."""
    disk = folder / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "8M")
    for bitmap in ("backup-1", "monday"):
        peers.run("qemu-img", "bitmap", "--add", disk, bitmap)
    samples.qemu_io(disk, "write -q -P 1 0 1M", "write -q -z 4M 1M")
    peers.run("qemu-img", "snapshot", "-c", "before-upgrade", disk)
    (folder / "named").mkdir()
    (folder / "pki").mkdir()
    throwaway.make(folder / "pki", hosts=[], psk=False)
    for name in ("disk.raw", "other.raw", "copy-of-monday.raw", "named/before", "named/after"):
        peers.run("qemu-img", "convert", "-O", "raw", disk, folder / name)
    for name in ("running.qcow2", "copy.qcow2", "base.qcow2", "upload.qcow2"):
        (folder / name).write_bytes(disk.read_bytes())
    (folder / "heat.py").write_text(programs()["heat.py"])


def test_what_is_there_before_is_needed() -> None:
    assert not [part for part in BEFORE if not any(part in line for line in examples())]


@pytest.fixture(autouse=True)
def ports() -> Iterator[None]:
    with terminal.documented_ports():
        yield


@pytest.mark.parametrize("example", list(examples()))
def test_example(example: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "nbdinfo", "nbdkit")
    prepare(tmp_path)
    home = {"HOME": str(tmp_path)}

    with peers.socket_path() as path:

        def run(line: str, shown: str = "...") -> None:
            line = line.replace("/run/", f"{path.parent}/").replace("backup.example", "localhost")
            status, output = shell.run(line, shown)
            assert status == 0, f"{line}: status {status}\n{output}"
            assert "Traceback" not in output

        with closing(terminal.Terminal(tmp_path, terminal.environment() | home)) as shell:
            for line in next((lines for part, lines in BEFORE.items() if part in example), ()):
                run(line, "nbd...\n" if line.startswith("pynbd serve") else "...")
            *first, example = example.split(" && ")  # the last one may be a server
            for line in first:
                run(line)
            if not example.startswith(SERVERS):
                run(example)
                if "--fork" in example:
                    run(KNOCK)
                    run("kill $(cat /run/disk.pid)")
                return
            run(f"{example} &", "nbd...\n" if example.startswith("pynbd serve") else "...")
            if example.startswith("pynbd-qemu-nbd"):
                run(KNOCK)
            run("kill $! 2> /dev/null; wait $!")
