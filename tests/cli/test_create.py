"""``pynbd create``: its arguments, and what it says. What it makes is judged in interop/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pynbd.block.qcow2.builder import Image
from tests.cli.looking import pynbd_here

M = 1 << 20
BY_NAME = (
    "--cluster-size 128k --extended-l2 --compression zstd --refcount-bits 8 --lazy-refcounts"
    " --compat v3 --preallocation metadata -b base.qcow2 -F qcow2"
)
BY_TEXT = (
    "-o cluster_size=128k,extended_l2=on -o compression_type=zstd,refcount_bits=8"
    " -o lazy_refcounts=on,compat=1.1,preallocation=metadata"
    " -o backing_file=base.qcow2,backing_fmt=qcow2"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image(size=M).write("base.qcow2")
    return tmp_path


def test_both_ways_to_say_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (
        "qcow2, 1 MiB (1048576 bytes), cluster_size=131072, extended_l2=on, compression_type=zstd,"
        " refcount_bits=8, lazy_refcounts=on, preallocation=metadata, backing_file=base.qcow2,"
        " backing_fmt=qcow2\n"
    )
    for name, line in ("a", BY_NAME), ("b", BY_TEXT):
        said = pynbd_here(monkeypatch, capsys, "create", *line.split(), name)
        assert said == (0, f"{name}: {told}", "")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    _, out, _ = pynbd_here(monkeypatch, capsys, "info", "--json", "a")
    assert json.loads(out)["format-specific"]["data"] == {
        "compat": "1.1",
        "compression-type": "zstd",
        "lazy-refcounts": True,
        "refcount-bits": 8,
        "corrupt": False,
        "extended-l2": True,
    }


def test_it_can_be_quiet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["create", "-q", "-f", "raw", "--preallocation", "off", "new", "1.5k"]
    assert pynbd_here(monkeypatch, capsys, *line) == (0, "", "")
    assert (folder / "new").read_bytes() == bytes(1536)
    line = ["create", "-q", "--data-file", "d,1", "--raw-data-file", "new", "1M"]
    assert pynbd_here(monkeypatch, capsys, *line) == (0, "", "")
    assert (folder / "d,1").read_bytes() == bytes(M)


@pytest.mark.parametrize(
    "line, said",
    [
        ("", "missing argument 'FILE'"),
        ("nbd:x 1M", "FILE: 'nbd:x' is not the name of a file"),
        ("new", "size: it is needed where no backing file has one"),
        ("new 1X", "size: '1X' is not a whole number of bytes, 0 or more; with k, M, G, T, P or E"),
        ("new 0.5", "size: '0.5' is not a whole number of bytes"),
        ("new 1M -o size=2M", "-o size: it is given twice, by an option of its own, too"),
        ("new 1M --compat v2 -o compat=1.1", "-o compat: it is given twice"),
        ("new 1M --cluster-size 3000", "--cluster-size: '3000' is not a power of two, 512 to 2m"),
        ("new 1M -o cluster_size=4M", "-o cluster_size: '4M' is not a power of two, 512 to 2m"),
        ("new 1M --refcount-bits 3", "--refcount-bits: '3' is not a power of two, 1 to 64"),
        ("new 1M -o extended_l2=maybe", "-o extended_l2: 'maybe' is not one of on, off"),
        ("new 1M -o extended_l2", "-o extended_l2: a value is expected, extended_l2=VALUE"),
        ("new 1M -o encryption=on", "-o encryption: no option of a new image; size, backing_file,"),
        ("new 1M -o preallocation=x", "'x' is not one of off, metadata, falloc, full"),
        ("new 1M --compression lzo", "--compression"),
        ("new 1M --lazy-refcounts --compat v2", "lazy_refcounts: with compat=0.10 only the"),
        ("new 1M --data-file base.qcow2", "data_file: base.qcow2 looks like qcow2, not raw, and"),
        ("new 1M -b base.qcow2", "backing_fmt: needed, raw or qcow2"),
        ("new 1M -f raw --extended-l2", "extended_l2: raw images have no such thing"),
    ],
)
def test_arguments_that_make_no_sense(
    line: str,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = pynbd_here(monkeypatch, capsys, "create", *line.split())
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("pynbd: ")
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["base.qcow2"]


def test_what_cannot_be_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["create", "-b", "gone", "-F", "raw", "new"]
    status, out, err = pynbd_here(monkeypatch, capsys, *line)
    assert (status, out) == (1, "")
    reason = "cannot be opened: No such file or directory (backing file of the new image)"
    assert err == f"pynbd: gone: {reason}\n"
    assert not (folder / "new").exists()
