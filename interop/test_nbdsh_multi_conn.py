"""nbdsh with four connections to one export (NBD_FLAG_CAN_MULTI_CONN)."""

from __future__ import annotations

from pathlib import Path

from interop import peers
from interop.conftest import PynbdServe

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
assert open({image!r}, "rb").read() == whole
for handle in handles:
    for start in range(0, size, 1 << 20):
        assert handle.pread(1 << 20, start) == whole[start : start + (1 << 20)]
    handle.shutdown()
"""


def test_disjoint_writes_and_one_flush(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdsh")
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(SIZE))
    uri = pynbd_serve(image, "-f", "raw")
    peers.nbdsh(SCRIPT.format(uri=uri, image=str(image)))


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
