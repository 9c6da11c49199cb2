"""nbdsh writes to a qcow2 image until the host has no more space for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import serving

CLUSTER = 1 << 16
LIMIT = 32 * CLUSTER

# Writes cluster after cluster until one fails, which then is as it was; then gives two back, and
# has place for two again. What was written and flushed is there.
SCRIPT = """
import errno

size, full = {cluster}, None
def write(at):
    h.pwrite(bytes([at % 251 + 1]) * size, at * size)

write(0)
h.flush()
for at in range(1, 64):
    try:
        write(at)
    except nbd.Error as error:
        assert error.errno == "ENOSPC", error
        full = at
        break
assert 8 < full < 32
for _ in range(2):
    assert h.pread(size, full * size) == b"z" * size
    try:
        write(full)
        raise AssertionError("there is no space")
    except nbd.Error as error:
        assert error.errno == "ENOSPC", error
h.flush()
h.pwrite(b"in place", 0)
h.trim(2 * size, 2 * size)
h.flush()
write(full)
write(full + 1)
h.flush()
print(full)
"""


@pytest.mark.parametrize("options", ["", "--detect-zeroes=unmap"])
def test_a_full_host(options: str, tmp_path: Path) -> None:
    peers.require("nbdsh", "qemu-img", "qemu-io")
    (tmp_path / "base").write_bytes(b"z" * (64 * CLUSTER))
    image = tmp_path / "disk.qcow2"
    below = ["-b", "base", "-F", "raw"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *below, image)
    samples.qemu_io(image, "write -q 0 64k")
    limited = ["prlimit", f"--fsize={LIMIT}"]
    # What fails is told once for each place.
    line = r"pynbd: .*disk.qcow2: NBD_CMD_WRITE .*\n"
    with serving(image, *options.split(), under=limited, says=f"({line})+") as uri:
        full = int(peers.nbdsh(SCRIPT.format(cluster=CLUSTER), uri))
    assert image.stat().st_size <= LIMIT
    peers.run("qemu-img", "check", image)
    raw = tmp_path / "raw"
    peers.run("qemu-img", "convert", "-O", "raw", image, raw)
    expected = [bytes([at % 251 + 1]) * CLUSTER for at in range(full + 2)]
    expected[0] = b"in place" + expected[0][8:]
    expected[2:4] = [bytes(CLUSTER)] * 2
    expected += [b"z" * CLUSTER] * (62 - full)
    assert raw.read_bytes() == b"".join(expected)


def test_an_end_that_fails(tmp_path: Path) -> None:
    """There is no space for the bits of a bitmap: that is told, and what was flushed is there."""
    peers.require("nbdsh", "qemu-img", "qemu-io")
    image = tmp_path / "disk.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    samples.qemu_io(image, "write -q 0 64k")
    peers.run("qemu-img", "bitmap", "--add", image, "b")
    line = ["prlimit", f"--fsize={image.stat().st_size}", sys.executable, "-m", "pynbd", "serve"]
    with peers.socket_path() as path:
        line += ["-k", str(path), str(image)]
        with subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            assert process.stdout.readline()
            peers.nbdsh("h.pwrite(b'x' * 4096, 0); h.flush()", peers.unix_uri(path))
            process.terminate()
            _, said = process.communicate(timeout=20)
    assert said == f"pynbd: {image}: it could not be finished: File too large\n"
    assert process.returncode == 1
    assert peers.run("qemu-img", "check", image, check=False).returncode in (0, 3)
    peers.run("qemu-io", "-f", "qcow2", "-c", "read -P 0x78 0 4k", image)
