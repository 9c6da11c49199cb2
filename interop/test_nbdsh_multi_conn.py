"""nbdsh with four connections to one export (NBD_FLAG_CAN_MULTI_CONN)."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers
from interop.conftest import PynbdServe, serving

SIZE = 8 << 20

# Each writes every fourth stripe, all at once; one flushes for all, and each sees all.
SCRIPT = """
handles = [nbd.NBD() for _ in range(4)]
for handle in handles:
    handle.connect_uri({uri!r})
    assert handle.can_multi_conn()

size, stripe, cookies, whole = handles[0].get_size(), 50_000, [], b""
for i, start in enumerate(range(0, size, stripe)):
    handle, data = handles[i % 4], bytes([i % 251]) * min(stripe, size - start)
    cookies.append((handle, handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), start)))
    whole += data
while any(handle.aio_in_flight() for handle in handles):
    for handle in handles:
        if handle.aio_in_flight():
            handle.poll(0)
assert all(handle.aio_command_completed(cookie) for handle, cookie in cookies)
handles[2].flush()
{look}
for handle in handles:
    for start in range(0, size, 1 << 20):
        assert handle.pread(1 << 20, start) == whole[start : start + (1 << 20)]
    handle.shutdown()
"""


# What a copy of the file holds then, while the server runs.
LOOK = """
import subprocess
subprocess.run(["cp", {image!r}, {copy!r}], check=True)
convert = [{qemu_img!r}, "convert", "-f", {form!r}, "-O", "raw"]
subprocess.run([*convert, {copy!r}, {raw!r}], check=True)
assert open({raw!r}, "rb").read() == whole
"""


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_disjoint_writes_and_one_flush(form: str, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdsh", "qemu-img")
    image = tmp_path / f"a.{form}"
    peers.run("qemu-img", "create", "-q", "-f", form, image, str(SIZE))
    look = LOOK.format(
        image=str(image),
        copy=str(tmp_path / "copy"),
        raw=str(tmp_path / "raw"),
        form=form,
        qemu_img=peers.find("qemu-img"),
    )
    with serving(image, "-f", form) as uri:
        peers.nbdsh(SCRIPT.format(uri=uri, look=look))
    if form == "qcow2":
        peers.run("qemu-img", "check", image)


# Both write to every cluster, a half of it each; the last cluster is flushed by the other one.
HALVES = """
a, b = nbd.NBD(), nbd.NBD()
for handle in a, b:
    handle.connect_uri({uri!r})
cluster, cookies = 65536, []
for at in range(0, 64 * cluster, cluster):
    for handle, start, byte in (a, at, b"a"), (b, at + cluster // 2, b"b"):
        data = nbd.Buffer.from_bytearray(bytearray(byte * (cluster // 2)))
        cookies.append((handle, handle.aio_pwrite(data, start)))
while a.aio_in_flight() or b.aio_in_flight():
    for handle in a, b:
        if handle.aio_in_flight():
            handle.poll(0)
assert all(handle.aio_command_completed(cookie) for handle, cookie in cookies)
whole = (b"a" * (cluster // 2) + b"b" * (cluster // 2)) * 64
for handle in a, b:
    assert handle.pread(len(whole), 0) == whole
b.pwrite(b"c", 0)
a.flush()
assert a.pread(1, 0) == b"c"
"""


def test_halves_of_clusters_that_are_not_there_yet(tmp_path: Path) -> None:
    """Two connections write to the same new cluster at the same time, over a backing file."""
    peers.require("nbdsh", "qemu-img")
    (tmp_path / "base").write_bytes(b"z" * SIZE)
    image = tmp_path / "a.qcow2"
    below = ["-b", "base", "-F", "raw"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *below, image)
    with serving(image) as uri:
        peers.nbdsh(HALVES.format(uri=uri))
    peers.run("qemu-img", "check", image)
    raw = tmp_path / "raw"
    peers.run("qemu-img", "convert", "-O", "raw", image, raw)
    halves = b"a" * 32768 + b"b" * 32768
    assert raw.read_bytes() == b"c" + (halves * 64)[1:] + b"z" * (SIZE - 64 * 65536)


def test_one_client_at_a_time(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """With ``-e 1`` it is not offered, and the second client waits until the first has left."""
    peers.require("nbdsh")
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(SIZE))
    uri = pynbd_serve(image, "-f", "raw", "-e", "1")
    script = f"""
assert not h.can_multi_conn()
second = nbd.NBD()
second.aio_connect_uri({uri!r})
for _ in range(10):
    second.poll(20)
assert second.aio_is_connecting() or second.aio_is_negotiating()
h.shutdown()
while not second.aio_is_ready():
    second.poll(1000)
print(second.get_size())
second.shutdown()
"""
    assert peers.nbdsh(script, uri) == f"{SIZE}\n"
