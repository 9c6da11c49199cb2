"""nbdinfo --map: the table that people read, its totals, and the JSON of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import serving

# What `layers` wrote, in the words of nbdinfo(1).
MAPS = {
    "base:allocation": """\
         0       65536    0  data
     65536       65536    3  hole,zero
    131072      131072    0  data
    262144      786432    3  hole,zero
""",
    "qemu:allocation-depth": """\
         0       65536    2  backing depth 2
     65536       65536    1  local
    131072       65536    2  backing depth 2
    196608       65536    1  local
    262144      786432    0  absent
""",
    "qemu:dirty-bitmap:b": """\
         0       65536    0  clean
     65536       65536    1  dirty
    131072       65536    0  clean
    196608        4096    1  dirty
    200704      847872    0  clean
""",
}
TOTALS = {
    "base:allocation": """\
    196608  18.8%   0 data
    851968  81.2%   3 hole,zero
""",
    "qemu:allocation-depth": """\
    786432  75.0%   0 absent
    131072  12.5%   1 local
    131072  12.5%   2 backing depth 2
""",
    "qemu:dirty-bitmap:b": """\
    978944  93.4%   0 clean
     69632   6.6%   1 dirty
""",
}


def layers(folder: Path) -> Path:
    """A MiB of clusters: two of the base, then one zeroed and one partly written over it."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    create = ["create", "-q", "-f", "qcow2"]
    peers.run("qemu-img", *create, base, "1M")
    samples.qemu_io(base, "write -q -P 1 0 192k")
    peers.run("qemu-img", *create, "-b", base.name, "-F", "qcow2", top, "1M")
    # The whole of the cluster has bytes on the host: what of it is a hole is the host's affair.
    samples.qemu_io(top, "write -q -P 3 192k 64k")
    peers.run("qemu-img", "bitmap", "--add", "-g", "4k", top, "b")
    samples.qemu_io(top, "write -q -z 64k 64k", "write -q -P 2 193k 3k")
    return top


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    peers.require("qemu-img", "qemu-io", "nbdinfo")
    with serving(layers(tmp_path_factory.mktemp("layers")), "-r") as uri:
        yield uri


@pytest.mark.parametrize("context", MAPS)
def test_text(uri: str, context: str) -> None:
    assert peers.run("nbdinfo", f"--map={context}", uri).stdout == MAPS[context]


@pytest.mark.parametrize("context", TOTALS)
def test_totals(uri: str, context: str) -> None:
    assert peers.run("nbdinfo", f"--map={context}", "--totals", uri).stdout == TOTALS[context]


@pytest.mark.parametrize("context", MAPS)
def test_json(uri: str, context: str) -> None:
    columns = ("offset", "length", "type", "description")
    rows = [line.split(maxsplit=3) for line in MAPS[context].splitlines()]
    expected = [[int(offset), int(length), int(kind), word] for offset, length, kind, word in rows]
    said = json.loads(peers.run("nbdinfo", "--json", f"--map={context}", uri).stdout)
    assert [[row[column] for column in columns] for row in said] == expected


def test_context_that_is_not_there(uri: str) -> None:
    said = peers.run("nbdinfo", "--map=qemu:dirty-bitmap:none", uri, check=False)
    assert said.returncode == 1
    assert "does not support metadata context" in said.stderr


@pytest.mark.parametrize("name", ["top", "middle", "raw"])
def test_same_as_qemu_nbd(name: str, tmp_path: Path) -> None:
    """Each layer of a chain by itself, and whatever nbdinfo can print of it."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    image = samples.chain(tmp_path)
    image = {"top": image, "middle": tmp_path / "middle.qcow2", "raw": tmp_path / "base.raw"}[name]
    bitmaps = ["-B", "b0", "-B", "b1"] if name == "top" else []
    options = ["-r", "-f", image.suffix[1:], "-A", *bitmaps]
    dirty = [f"qemu:dirty-bitmap:{name}" for name in bitmaps[1::2]]
    with serving(image, *options) as pynbd, peers.qemu_nbd(image, *options) as qemu:
        for context in ["base:allocation", "qemu:allocation-depth", *dirty]:
            for shape in [], ["--totals"], ["--json"], ["--json", "--totals"]:
                line = ["nbdinfo", f"--map={context}", *shape]
                assert peers.run(*line, pynbd).stdout == peers.run(*line, qemu).stdout
