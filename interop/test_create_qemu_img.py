"""pynbd create beside qemu-img create: the same options make the same image, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from interop import peers, samples
from interop.transferring import pynbd_here, same
from tests.block.devices import loop_device

M = 1 << 20
EXTENDED = "extended_l2=on,cluster_size=64k"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A backing file, in both folders: 3 MiB and a sector, with data at 1M."""
    peers.require("qemu-img", "qemu-io")
    for folder in "ours", "theirs":
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "base.qcow2"
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(3 * M + 512))
        samples.qemu_io(path, "write -q -P 7 1M 100k")
    return tmp_path


def described(path: Path) -> dict[str, Any]:
    """What qemu-img info says of the image, without how long its files are and what they take."""
    told: dict[str, Any] = json.loads(peers.run("qemu-img", "info", "--output=json", path).stdout)
    for name in "actual-size", "children", "filename", "full-backing-filename":
        told.pop(name, None)
    told.get("format-specific", {}).get("data", {}).pop("data-file", None)
    return told


def mapped(path: Path, format_name: str = "qcow2") -> list[tuple[int, ...]]:
    """The map without host offsets, which merges what only they kept apart.

    QEMU writes the end of a preallocated file, so that a part of its last cluster is no hole.
    """
    line = ["map", "--output=json", "-f", format_name, path]
    rows: list[tuple[int, ...]] = []
    for run in json.loads(peers.run("qemu-img", *line).stdout):
        row = (run["start"] + run["length"], run["depth"], run["data"], run["present"])
        if rows and rows[-1][1:] == row[1:]:
            rows.pop()
        rows.append(row)
    return rows


def both(folder: Path, options: str, *rest: str) -> tuple[Path, Path]:
    """Images of the same options, made in folders of their own, both clean."""
    made = []
    for who in "ours", "theirs":
        path = folder / who / "new.qcow2"
        *words, size = (word.replace("FOLDER", str(path.parent)) for word in (options, *rest))
        line = ["create", "-q", "-f", "qcow2", "-o", *words, path, *filter(None, [size])]
        if who == "ours":
            assert pynbd_here(*line) == ""
        else:
            peers.run("qemu-img", *line)
        peers.run("qemu-img", "check", "-q", path)
        made.append(path)
    ours, theirs = made
    pynbd_here("check", "-q", ours)
    assert described(ours) == described(theirs)
    assert mapped(ours) == mapped(theirs)
    same(ours, theirs, ("qcow2", "qcow2"))
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=v3,lazy_refcounts=on,compression_type=zstd",
        "compat=0.10",
        "compat=v2,cluster_size=4k",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=8k,refcount_bits=8",
        EXTENDED,
        "cluster_size=16k,extended_l2=on,refcount_bits=32",
        "data_file=FOLDER/d",
        "lazy_refcounts=off,data_file=FOLDER/d,cluster_size=2M",
    ],
)
@pytest.mark.parametrize("size", ["0", "1000", "10M", "3G"])
def test_an_empty_image(options: str, size: str, base: Path) -> None:
    ours, theirs = both(base, options, size)
    if "data_file" not in options and (size, options) != ("3G", "cluster_size=512"):
        # All is in the same place, but for the end of a last cluster that QEMU leaves out. (Tables
        # that need more than one refcount block come to lie where they are needed in QEMU.)
        assert ours.read_bytes().rstrip(b"\0") == theirs.read_bytes().rstrip(b"\0")


@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=0.10,cluster_size=4k",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=1k,refcount_bits=64",
        "cluster_size=2M",
        EXTENDED,
        "data_file=FOLDER/d",
        "data_file=FOLDER/d,extended_l2=on",
    ],
)
@pytest.mark.parametrize("size", ["100001", "9M"])
def test_a_preallocated_image(how: str, options: str, size: str, base: Path) -> None:
    ours, theirs = both(base, f"{options},preallocation={how}", size)
    name = "d" if "data_file" in options else "new.qcow2"
    taken, wanted = (samples.allocated(path.with_name(name)) for path in (ours, theirs))
    if how == "metadata":  # QEMU writes whole tables; what is zero in ours is a hole
        assert taken <= wanted
    else:
        assert abs(taken - wanted) <= (8 * M if "2M" in options else M)  # a few clusters
    samples.qemu_io(ours, "write -q -P 5 0 700")
    peers.run("qemu-img", "check", "-q", ours)


@pytest.mark.parametrize("options", ["", f",{EXTENDED}", ",preallocation=full"])
def test_a_raw_data_file(options: str, base: Path) -> None:
    ours, _ = both(base, f"data_file=FOLDER/d,data_file_raw=on{options}", "5M")
    assert (ours.parent / "d").read_bytes() == bytes(5 * M)
    samples.qemu_io(ours, "write -q -P 5 1M 700")
    assert (ours.parent / "d").read_bytes()[M : M + 700] == b"\5" * 700
    peers.run("qemu-img", "check", "-q", ours)


@pytest.mark.parametrize("size", ["", "1M", "4M"])
@pytest.mark.parametrize(
    "options",
    ["backing_file=base.qcow2,backing_fmt=qcow2", "cluster_size=512,compat=0.10", EXTENDED]
    + [f"{EXTENDED},preallocation={how}" for how in ("metadata", "falloc", "full")],
)
def test_an_overlay(options: str, size: str, base: Path) -> None:
    below = [] if "backing_file" in options else ["-b", "base.qcow2", "-F", "qcow2"]
    both(base, options, *below, size)


def test_an_overlay_of_a_raw_file_and_a_data_file(base: Path) -> None:
    for folder in base.iterdir():
        (folder / "odd,name").write_bytes(b"\6" * 100_001)
    options = "backing_file=odd,,name,data_file=FOLDER/d"
    ours, _ = both(base, options, "-F", "raw", "")
    assert described(ours)["virtual-size"] == 100_352


def test_what_is_there_is_overwritten(base: Path) -> None:
    for who in "ours", "theirs":
        (base / who / "new.qcow2").write_bytes(b"\xa5" * (5 * M))
        (base / who / "d").write_bytes(b"\xa5" * (5 * M))
    both(base, "data_file=FOLDER/d", "2M")
    assert (base / "ours" / "d").read_bytes() == bytes(2 * M)


@pytest.mark.parametrize(
    "line",
    [
        "-o cluster_size=256 NEW 1G",
        "-o cluster_size=4M NEW 1G",
        "-o cluster_size=3000 NEW 1G",
        "-o extended_l2=on,cluster_size=8k NEW 1G",
        "-o compat=0.10,lazy_refcounts=on NEW 1G",
        "-o compat=0.10,refcount_bits=8 NEW 1G",
        "-o compat=0.10,extended_l2=on NEW 1G",
        "-o compat=0.10,compression_type=zstd NEW 1G",
        "-o compat=0.10,data_file=D NEW 1G",
        "-o compat=1.2 NEW 1G",
        "-o refcount_bits=3 NEW 1G",
        "-o refcount_bits=128 NEW 1G",
        "-o data_file_raw=on NEW 1G",
        "-o preallocation=some NEW 1G",
        "-o compression_type=bzip2 NEW 1G",
        "-o extended_l2=perhaps NEW 1G",
        "-o what=1 NEW 1G",
        "-o size=1M NEW 1M",
        "-b BASE NEW",
        "-b BASE -F qcow2 -o preallocation=metadata NEW",
        "-b BASE -F qcow2 -o data_file=D,data_file_raw=on NEW",
        "-b BASE -F none NEW 1M",
        "-b gone -F qcow2 NEW 1M",
        "-b gone -F qcow2 -u NEW",
        "-b gone -u NEW 1M",
        "-b BASE -F qcow2 BASE 1M",
        "NEW",
        "NEW 100X",
        "NEW 8E",
        "NEW 7E",
        "-o cluster_size=512 NEW 129G",
        "nowhere/NEW 1M",
        "-f raw -o preallocation=metadata NEW 1M",
        "-f raw -o cluster_size=64k NEW 1M",
        "-f raw -b BASE -F qcow2 NEW 1M",
    ],
)
def test_what_both_refuse(line: str, base: Path) -> None:
    names = {"NEW": base / "new", "BASE": base / "ours" / "base.qcow2", "D": base / "data"}
    words = [str(names.get(word, word)).replace("=D", f"={names['D']}") for word in line.split()]
    command = ["create", *([] if "-f" in words else ["-f", "qcow2"])]
    before = names["BASE"].read_bytes()
    assert peers.run("qemu-img", *command, "-q", *words, check=False).returncode == 1
    names["NEW"].unlink(missing_ok=True)
    names["D"].unlink(missing_ok=True)
    status = 1 if ("gone" in line and "-u" not in line) or "nowhere" in line else 2
    pynbd_here(*command, *words, status=status, says=" ")
    assert not names["NEW"].exists()
    assert not names["D"].exists()
    assert names["BASE"].read_bytes() == before


def test_a_backing_file_that_is_not_there(base: Path) -> None:
    path = base / "new"
    line = ["create", "-b", "gone", "-F", "qcow2", "-u", path, "1M"]
    pynbd_here(*line)
    assert (
        json.loads(peers.run("qemu-img", "info", "-U", "--output=json", path).stdout)[
            "backing-filename"
        ]
        == "gone"
    )
    pynbd_here("create", "-b", "new", "-F", "raw", "-u", path, "1M", status=2, says="is new")


@pytest.mark.parametrize("how", ["off", "falloc", "full"])
def test_a_raw_image(how: str, tmp_path: Path) -> None:
    peers.require("qemu-img")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    line = ["create", "-q", "-f", "raw", "-o", f"preallocation={how}"]
    pynbd_here(*line, ours, "1000001")
    peers.run("qemu-img", *line, theirs, "1000001")
    assert ours.read_bytes() == theirs.read_bytes()
    assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 8


def test_files_that_others_have_open(base: Path) -> None:
    peers.require("qemu-nbd")
    path = base / "ours" / "base.qcow2"
    data_file = base / "data"
    data_file.write_bytes(b"\xa5" * M)
    before = path.read_bytes()
    for how in ["-r"], []:
        for used, kind, line in (
            (path, "qcow2", [path]),
            (data_file, "raw", ["--data-file", data_file, base / "new"]),
        ):
            with peers.qemu_nbd(used, "-f", kind, *how) as uri:
                peers.run("qemu-img", "info", uri)  # it listens before it opens the image
                said = f"{used}: another process uses it"
                pynbd_here("create", *line, "1M", status=1, says=said)
    assert path.read_bytes() == before
    assert data_file.read_bytes() == b"\xa5" * M
    assert not (base / "new").exists()


@pytest.mark.parametrize("options", ["compat=1.1", "preallocation=metadata,cluster_size=4k"])
def test_a_block_device(options: str, tmp_path: Path) -> None:
    """What was on it before is not seen, and nothing beyond the image is touched."""
    peers.require("qemu-img", "qemu-io")
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xa5" * (12 * M))
    with loop_device(disk) as device:
        pynbd_here("create", "-q", "-o", options, device, "8M")
        samples.qemu_io(device, "read -q -P 0 0 8M", "write -q -P 7 3M 1M")
        peers.run("qemu-img", "check", "-q", "-f", "qcow2", device)
        pynbd_here("create", device, "8G", "--preallocation=metadata", status=1, says="are needed")
        peers.run("qemu-img", "check", "-q", "-f", "qcow2", device)
    assert disk.read_bytes()[-M:] == b"\xa5" * M


def test_large_tables(tmp_path: Path) -> None:
    """A refcount table of several clusters; L2 tables that are written in pieces."""
    peers.require("qemu-img")
    path = tmp_path / "new"
    pynbd_here("create", "-q", "-o", "preallocation=metadata,cluster_size=4k", path, "8G")
    peers.run("qemu-img", "check", "-q", path)
    assert mapped(path) == [(8 << 30, 0, True, True)]
    pynbd_here("create", "-q", "-o", "cluster_size=512,refcount_bits=64", path, "128G")
    peers.run("qemu-img", "check", "-q", path)
