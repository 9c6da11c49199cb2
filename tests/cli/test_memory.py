"""Memory that was freed is used again: page faults are counted by the kernel."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.qcow2.builder import large_map
from tests.conformance.client import Cmd, Mode, Peer

SIZE = 1 << 40
ANSWERS = 10
SERVE = [sys.executable, "-m", "pynbd", "serve", "-r"]
QEMU_NBD = [sys.executable, "-m", "pynbd.qemu_nbd", "-r", "-t"]


def page_faults(pid: int) -> int:
    """Those that needed no disk: proc_pid_stat(5), field 10."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[7])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it needs glibc")
@pytest.mark.parametrize("program", [SERVE, QEMU_NBD], ids=["serve", "qemu-nbd"])
def test_answers_share_their_memory(program: list[str], tmp_path: Path) -> None:
    """Each is at least half a megabyte. What comes after the first finds the memory of that one:
    fewer than one page in ten of the bytes that are sent alone is new.
    """
    path = tmp_path / "disk.qcow2"
    large_map(path, SIZE)
    with (
        peers.socket_path() as where,
        peers.listening([*program, "-k", str(where), str(path)], where) as process,
        Peer(where) as peer,
    ):
        peer.negotiate(Mode.EXTENDED, contexts=["base:allocation"])
        sent = 0
        for answer in range(ANSWERS):
            (extents,) = peer.ask(Cmd.BLOCK_STATUS, 0, SIZE).status.values()
            if not answer:
                before = page_faults(process.pid)
            else:
                sent += 16 * len(extents)
        after = page_faults(process.pid)
        peer.disconnect()
    assert sent >= (ANSWERS - 1) << 19
    assert after - before < sent / os.sysconf("SC_PAGE_SIZE") / 10, (after - before, sent)
