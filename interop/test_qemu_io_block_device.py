"""qemu-io on a block device: a loop device, where this machine lets us have one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import serving

SIZE = 4 << 20
MIB = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A loop device of 4 MiB, all 0x11."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\x11" * SIZE)
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", str(backing)],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device is to be had (root, and the kernel's loop module): {error}")
    path = made.stdout.strip()
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


def test_written_zeroed_discarded_and_read(device: str) -> None:
    peers.require("qemu-io", "nbdinfo")
    with serving(device, "-f", "raw") as uri:
        assert peers.run("nbdinfo", "--size", uri).stdout.strip() == str(SIZE)
        samples.qemu_io(
            uri,
            "write -P 7 1M 1M",
            "write -z 1M 64k",
            "write -z -u 1200k 64k",
            "discard 3M 512k",
            "write -f -P 9 1000 24",
            "flush",
            "read -P 0 1M 64k",
            "read -P 0 1200k 64k",
            "read -P 7 1100k 100k",
            driver="raw",
        )
    content = Path(device).read_bytes()
    assert content[1000:1024] == b"\x09" * 24
    assert content[:1000] == b"\x11" * 1000
    assert content[MIB : MIB + 65536] == bytes(65536)
    assert content[1264 * 1024 : 2 * MIB] == b"\x07" * (784 * 1024)
