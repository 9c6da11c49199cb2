"""nbdsh where 32 bits do not suffice: extents, zeroes and discards longer than 4 GiB.

Extended headers say each in one go; without them no length and no extent exceeds 2^32 - 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

GIB = 1 << 30
SIZE = 9 * GIB
DATA = 7 * GIB  # where the only MiB of data is
EXTENTS = [(DATA, 3), (1 << 20, 0), (2 * GIB - (1 << 20), 3)]

STATUS = """
import json
h.add_meta_context("base:allocation")
h.set_request_extended_headers({extended})
h.connect_uri({uri!r})
found = []
def status(offset, length):
    del found[:]
    h.block_status_64(length, offset, lambda context, at, extents, error: found.extend(extents))
    return list(found)
"""


@pytest.fixture(params=["raw", "qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    peers.require("qemu-img", "qemu-io", "nbdsh")
    path = tmp_path / f"large.{request.param}"
    if request.param == "raw":
        samples.empty_file(path, SIZE)
    else:
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    samples.qemu_io(path, f"write -q -P 5 {DATA} 1M", driver=request.param)
    return path


def test_extended(image: Path, pynbd_serve: PynbdServe) -> None:
    uri = pynbd_serve(image, "-r", "-f", image.suffix[1:])
    script = STATUS.format(extended=True, uri=uri) + f"print(json.dumps(status(0, {SIZE})))"
    assert [tuple(extent) for extent in json.loads(peers.nbdsh(script))] == EXTENTS


def test_structured(image: Path, pynbd_serve: PynbdServe) -> None:
    """Every extent fits 32 bits, and together they are the whole."""
    uri = pynbd_serve(image, "-r", "-f", image.suffix[1:])
    script = (
        STATUS.format(extended=False, uri=uri)
        + f"""
at, map = 0, []
while at < {SIZE}:
    for length, flags in status(at, min({SIZE} - at, 2**32 - 1)):
        assert 0 < length < 2**32
        if map and map[-1][1] == flags:
            length += map.pop()[0]
        map.append((length, flags))
    at = sum(length for length, flags in map)
edges = [status(offset, length) for offset, length in
    [(2**32 - 1, 2), (2**32 - 1, 1), (2**32, 2**32 - 1), (0, 2**32 - 1), ({SIZE} - 1, 1)]]
print(json.dumps([map, edges]))
"""
    )
    extents, edges = json.loads(peers.nbdsh(script))
    assert [tuple(extent) for extent in extents] == EXTENTS
    # The third ends before the data does; the others are one extent from end to end.
    assert edges == [[[2, 3]], [[1, 3]], edges[2], [[2**32 - 1, 3]], [[1, 3]]]
    assert edges[2][:2] == [[DATA - 2**32, 3], [1 << 20, 0]]


@pytest.mark.parametrize("command", ["zero", "trim"])
def test_one_request_clears_all(command: str, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdsh")
    image = tmp_path / "large.raw"
    samples.empty_file(image, SIZE)
    with image.open("r+b") as file:
        for offset in (0, DATA, SIZE - (1 << 20)):
            file.seek(offset)
            file.write(b"\5" * (1 << 20))
    assert samples.allocated(image) >= 3 << 20
    script = (
        STATUS.format(extended=True, uri=pynbd_serve(image, "-f", "raw"))
        + f"""
assert h.pread(4096, {DATA}) == b"\\5" * 4096
h.{command}({SIZE}, 0)
assert h.pread(1 << 20, {DATA}) == bytes(1 << 20)
print(json.dumps(status(0, {SIZE})))
"""
    )
    assert json.loads(peers.nbdsh(script)) == [[SIZE, 3]]
    assert samples.allocated(image) < 1 << 20
