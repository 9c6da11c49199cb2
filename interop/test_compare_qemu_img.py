"""pynbd compare beside qemu-img compare: the same status, for the same pairs."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe
from interop.transferring import compared, pynbd_here

M = 1 << 20
SECTOR = 512  # what qemu-img tells offsets in


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One MiB that reads as zeroes, by name of how it comes to; and others."""
    peers.require("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("images")
    create = ["create", "-q", "-f", "qcow2"]

    def qcow2(name: str, *commands: str, backing: str = "", options: str = "compat=1.1") -> None:
        below = ["-b", f"{backing}.qcow2", "-F", "qcow2"] if backing else []
        path = folder / f"{name}.qcow2"
        peers.run("qemu-img", *create, "-o", options, *below, path, "1M")
        samples.qemu_io(path, *commands)

    samples.empty_file(folder / "hole.raw", M)
    samples.empty_file(folder / "long.raw", 2 * M)
    (folder / "written.raw").write_bytes(bytes(M))
    (folder / "beyond.raw").write_bytes(bytes(2 * M - 1) + b"x")
    (folder / "late.raw").write_bytes(bytes(700_416) + b"x" + bytes(M - 700_417))
    qcow2("nothing")
    qcow2("zero", "write -q -z 0 1M")
    qcow2("data", "write -q -P 0 0 1M")
    qcow2("mixed", "write -q -P 0 0 128k", "write -q -z 256k 128k")
    qcow2("preallocated", options="preallocation=metadata")
    qcow2("above-nothing", backing="nothing")
    qcow2("above-data", backing="data")
    qcow2("other", "write -q -P 7 512k 64k")
    return {path.name: path for path in sorted(folder.iterdir())}


def test_statuses(images: dict[str, Path]) -> None:
    """Of every pair; with --strict, but for zeroes of which one image knows the host offset and the
    other does not: only QEMU takes that for a difference.
    """
    pairs = combinations_with_replacement(images, 2)
    for (a, b), strict in product(pairs, (False, True)):
        said = peers.run(
            "qemu-img",
            "compare",
            *(["-s"] if strict else []),
            *("-f", a.rpartition(".")[2], "-F", b.rpartition(".")[2]),
            images[a],
            images[b],
            check=False,
        )
        ours = compared(images[a], images[b], strict=strict)
        if strict and {"hole.raw", "zero.qcow2"} == {a, b}:
            assert (said.returncode, ours.difference) == (1, None)
            continue
        assert said.returncode == int(ours.difference is not None), (a, b, strict, said, ours)
        if "mismatch at offset" in said.stdout:
            assert ours.offset // SECTOR * SECTOR == int(
                said.stdout.split(" offset ")[1].rstrip("!\n")
            )


def test_what_is_said(images: dict[str, Path]) -> None:
    hole, late, beyond = (images[f"{name}.raw"] for name in ("hole", "late", "beyond"))
    assert pynbd_here("compare", hole, late, status=1) == "The contents differ at offset 700416.\n"
    assert pynbd_here("compare", "-q", hole, late, status=1) == ""
    assert pynbd_here("compare", hole, beyond, status=1) == (
        "The sizes differ: A has 1048576 bytes, B 2097152; beyond the shorter one zeroes are"
        " expected.\nThe contents differ at offset 2097151.\n"
    )
    assert pynbd_here("compare", "-s", hole, beyond, status=1) == (
        "The sizes differ: A has 1048576 bytes, B 2097152.\n"
    )
    said = pynbd_here("compare", "-s", hole, images["data.qcow2"], status=1)
    assert said == "The allocation differs at offset 0.\n"
    told = json.loads(pynbd_here("compare", "--json", "--all", late, beyond, status=1))
    assert told == {
        "identical": False,
        "sizes": [M, 2 * M],
        "difference": "content",
        "offset": 700_416,
        "ranges": [{"offset": 700_416, "length": 512}, {"offset": 2 * M - 512, "length": 512}],
    }
    told = json.loads(pynbd_here("compare", "--json", hole, images["zero.qcow2"]))
    assert told == {"identical": True, "sizes": [M, M]}


def test_errors(images: dict[str, Path], tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """2 where it cannot be opened, as qemu-img, and where the arguments are wrong; 4 where it
    cannot be read.
    """
    hole, nowhere = images["hole.raw"], tmp_path / "nowhere"
    for args in ([hole, nowhere], ["-f", "qcow2", hole, hole]):
        assert peers.run("qemu-img", "compare", *args, check=False).returncode == 2
        pynbd_here("compare", *args, status=2, says=str(args[-1]))
    pynbd_here("compare", hole, status=2, says="argument")
    pynbd_here("compare", "", hole, status=2, says="A: ")
    pynbd_here("compare", "-f", "raw", "nbd://localhost", hole, status=2, says="--format")
    pynbd_here("compare", "-R", "0", hole, hole, status=2, says="--requests")
    raw = ["-f", "raw", "-F", "raw"]
    with peers.nbdkit("--filter=error", "pattern", "1M", "error-pread-rate=100%") as uri:
        assert peers.run("qemu-img", "compare", *raw, hole, uri, check=False).returncode == 4
        # Which of the requests in flight fails first is not said.
        pynbd_here("compare", hole, uri, status=4, says="cannot read 262144 bytes at offset ")
    with peers.nbdkit("--filter=error", "memory", "1M", "error-extents-rate=100%") as uri:
        assert peers.run("qemu-img", "compare", *raw, hole, uri, check=False).returncode == 3
        pynbd_here("compare", hole, uri, status=3, says="cannot map 1048576 bytes at offset 0")


def test_over_nbd(images: dict[str, Path], tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """Two copies of one noisy disk, in one of which a byte changes."""
    image, other = tmp_path / "a.raw", tmp_path / "b.raw"
    content = bytearray(samples.sparse_file(image, 8 * M))
    other.write_bytes(content)
    uris = pynbd_serve(image, "-r"), pynbd_serve(other, "-f", "raw")
    assert compared(*uris).difference is None
    for place in 5 * M + 77, 5 * M + 600, 5 * M + 1024, 8 * M - 1:
        byte = content[place] ^ 1
        samples.qemu_io(uris[1], f"write -q -P {byte} {place} 1", driver="raw")
    result = compared(*uris)
    assert (result.difference, result.offset) == ("content", 5 * M + 77)
    assert result.ranges == [(5 * M, 5 * M + 1536), (8 * M - 512, 8 * M)]
