"""pynbd copy to qcow2: qemu-img compares, checks and maps what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import peers, samples
from interop.transferring import pynbd, pynbd_here, same

M = 1 << 20
SIZE = (8 << 20) + (32 << 10)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One disk in several forms."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    folder = tmp_path_factory.mktemp("sources")
    top, raw = samples.chain(folder), folder / "disk.raw"
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, raw)
    with ExitStack() as stack:
        yield {
            "raw": str(raw),
            "chain": str(top),
            "qemu-nbd": stack.enter_context(peers.qemu_nbd(top, "-r", "-f", "qcow2")),
        }


def check(image: Path, raw: str) -> None:
    """It is clean, and the same disk as ``raw``."""
    peers.run("qemu-img", "check", "-q", "-f", "qcow2", image)
    pynbd_here("check", "-q", image)
    same(raw, image, ("raw", "qcow2"))


def data_runs(image: Path) -> list[tuple[int, int]]:
    """Where data begins and ends."""
    told = json.loads(peers.run("qemu-img", "map", "--output=json", "-f", "qcow2", image).stdout)
    rows: list[tuple[int, int]] = []
    for run in told:
        start, end = run["start"], run["start"] + run["length"]
        if run["data"]:
            if rows and rows[-1][1] == start:
                start = rows.pop()[0]
            rows.append((start, end))
    return rows


@pytest.mark.parametrize("source", ["chain", "qemu-nbd"])
@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=512,compat=0.10",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=2M,lazy_refcounts=on",
        "extended_l2=on,cluster_size=128k,compression_type=zstd",
        "preallocation=metadata",
        "preallocation=full,cluster_size=16k,extended_l2=on",
        "data_file=DATA",
        "data_file=DATA,data_file_raw=on",
    ],
)
def test_a_new_image(source: str, options: str, disks: dict[str, str], tmp_path: Path) -> None:
    new, data = tmp_path / "new.qcow2", tmp_path / "data"
    line = ["-o", options.replace("DATA", str(data))] if options else []
    assert pynbd_here("copy", *line, disks[source], new) == ""
    check(new, disks["raw"])
    if "raw=on" in options:
        same(disks["raw"], data)


@pytest.mark.parametrize("source", ["raw", "chain"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=512"])
def test_it_is_as_sparse_as_that_of_qemu_img(
    source: str, options: str, disks: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    formats = ["-f", "raw" if source == "raw" else "qcow2", "-O", "qcow2", "-o", options]
    pynbd_here("copy", *formats, disks[source], ours)
    peers.run("qemu-img", "convert", *formats, disks[source], theirs)
    assert data_runs(ours) == data_runs(theirs)
    # In a cluster that is partly data QEMU writes zeroes where ours has a hole of the file.
    assert samples.allocated(ours) <= samples.allocated(theirs) + (256 << 10)


def test_an_odd_size(tmp_path: Path) -> None:
    """The disk ends with a sector."""
    peers.require("qemu-img")
    source, new = tmp_path / "source", tmp_path / "new.qcow2"
    samples.sparse_file(source, 3 * M + 1234)
    pynbd("copy", source, new)
    check(new, str(source))
    back = tmp_path / "back"
    pynbd_here("copy", new, back)
    assert back.read_bytes() == source.read_bytes().ljust(3 * M + 1536, b"\0")


def test_an_image_that_is_there(disks: dict[str, str], tmp_path: Path) -> None:
    old, before = tmp_path / "old", tmp_path / "before"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=16k", old, "9M")
    samples.qemu_io(old, "write -q -P 7 0 9M")
    peers.run("qemu-img", "snapshot", "-c", "before", old)
    shutil.copy(old, before)
    pynbd_here("copy", disks["chain"], old, status=1, says="looks like qcow2; -O raw or -O qcow2")
    assert old.read_bytes() == before.read_bytes()

    left = 9 * M - SIZE
    pynbd("copy", "-n", disks["chain"], old, says=f"its last {left} bytes are left as they are")
    peers.run("qemu-img", "check", "-q", old)
    raw = tmp_path / "raw"
    peers.run("qemu-img", "convert", "-O", "raw", old, raw)
    content = raw.read_bytes()
    assert content[:SIZE] == Path(disks["raw"]).read_bytes()
    assert content[SIZE:] == b"\7" * left
    line = ["convert", "-l", "before", "-O", "raw", old, raw]
    peers.run("qemu-img", *line)
    assert raw.read_bytes() == b"\7" * (9 * M)

    pynbd_here("copy", "-O", "qcow2", disks["chain"], old)
    check(old, disks["raw"])
    assert peers.run("qemu-img", "snapshot", "-l", old).stdout == ""


def test_a_raw_image_that_is_there(disks: dict[str, str], tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"\7" * 9 * M)
    pynbd("copy", "-n", disks["chain"], old, says="bytes are left as they are")
    assert old.read_bytes() == Path(disks["raw"]).read_bytes() + b"\7" * (9 * M - SIZE)
    old.write_bytes(b"\7" * M)
    pynbd_here("copy", "-n", disks["chain"], old, status=1, says="it has 1048576 bytes, and the so")
    assert old.read_bytes() == b"\7" * M
    pynbd_here("copy", "-n", disks["chain"], new, status=1, says="-n is for a target that is there")
    assert not new.exists()


def test_images_that_do_not_do(disks: dict[str, str], tmp_path: Path) -> None:
    small, marked = tmp_path / "small", tmp_path / "marked"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", small, "8M")
    before = small.read_bytes()
    pynbd_here("copy", "-n", disks["raw"], small, status=1, says="8388608 bytes, and the source")
    assert small.read_bytes() == before
    with peers.qemu_nbd(small, "-f", "qcow2") as uri:
        peers.run("qemu-img", "info", uri)
        for line in (["-n"], ["-O", "qcow2"], ["-O", "raw"]):
            pynbd_here("copy", *line, disks["raw"], small, status=1, says="another process uses")
    assert small.read_bytes() == before
    peers.run("qemu-img", "create", "-q", "-f", "vmdk", marked, "9M")
    pynbd_here("copy", "-n", disks["raw"], marked, status=1, says="it looks like vmdk; what is wri")
    for line in (["-O", "qcow2"], ["-n", "-O", "qcow2"]):
        pynbd_here("copy", *line, disks["chain"], disks["chain"], status=2, says="is the source")


def test_an_overlay(disks: dict[str, str], tmp_path: Path) -> None:
    """What differs from its backing file, and no more, comes into it."""
    base, changed = tmp_path / "base.raw", tmp_path / "changed.raw"
    shutil.copy(disks["raw"], base)
    shutil.copy(base, changed)
    samples.qemu_io(changed, "write -q -P 9 3M 100k", "write -q -z 5M 1M", driver="raw")
    for backing_format, options in (
        ("raw", "compat=1.1"),
        ("qcow2", "extended_l2=on"),
        ("raw", "compat=0.10,cluster_size=4k"),
    ):
        name = "base.raw" if backing_format == "raw" else "base.qcow2"
        if backing_format == "qcow2":
            peers.run("qemu-img", "convert", "-O", "qcow2", base, tmp_path / name)
        overlay = tmp_path / "overlay.qcow2"
        overlay.unlink(missing_ok=True)
        pynbd_here("copy", "-B", name, "-F", backing_format, "-o", options, changed, overlay)
        check(overlay, str(changed))
        own = json.loads(peers.run("qemu-img", "map", "--output=json", overlay).stdout)
        ours = [(run["start"], run["start"] + run["length"]) for run in own if run["depth"] == 0]
        places = [(3 * M, 3 * M + (128 << 10)), (5 * M, 6 * M)]
        assert ours
        assert all(any(a <= start and end <= b for a, b in places) for start, end in ours)
    assert base.read_bytes() == Path(disks["raw"]).read_bytes()


def test_an_overlay_of_something_else(disks: dict[str, str], tmp_path: Path) -> None:
    """Backing files that are shorter, longer, and have nothing in common with the source."""
    for size in 5 * M + 512, 12 * M:
        base, overlay = tmp_path / "base", tmp_path / "overlay"
        base.write_bytes(b"\xa5" * size)
        pynbd_here("copy", "-O", "qcow2", "-B", "base", "-F", "raw", disks["qemu-nbd"], overlay)
        check(overlay, disks["raw"])


def test_what_is_dirty(tmp_path: Path) -> None:
    """An incremental backup into a qcow2 image."""
    peers.require("qemu-img", "qemu-io")
    disk, backup = tmp_path / "disk.qcow2", tmp_path / "backup.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "20M")
    samples.qemu_io(disk, "write -q -P 1 0 10M")
    peers.run("qemu-img", "bitmap", "--add", disk, "b")
    pynbd_here("copy", disk, backup)
    samples.qemu_io(disk, "write -q -P 2 1M 100k", "write -q -z 3M 1M", "write -q -P 3 15M 1")
    pynbd_here("copy", "--bitmap", "b", disk, backup)
    same(disk, backup, ("qcow2", "qcow2"))
    peers.run("qemu-img", "check", "-q", backup)
    pynbd_here("copy", "--bitmap", "b", disk, tmp_path / "gone", status=1, says="an earlier copy")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    peers.require("nbdkit")
    new, data = tmp_path / "new.qcow2", tmp_path / "data"
    bad = f"pread=[ $4 -lt {M >> 1} ] || {{ echo EIO bad >&2; exit 1; }}; head -c $3 /dev/urandom"
    with peers.nbdkit("eval", f"get_size=echo {M}", bad) as uri:
        line = ["copy", "-o", f"data_file={data}", uri, new]
        pynbd_here(*line, status=1, says="cannot read 262144 bytes at offset ")
    assert not list(tmp_path.iterdir())
