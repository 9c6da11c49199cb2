"""pynbd map of exports of real servers, next to nbdinfo's of the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from interop import peers, samples, storage_daemon
from interop.conftest import serving
from pynbd.cli.map import map as map_command
from pynbd.errors import PynbdError

SHAPES = ([], ["--json"], ["--totals"], ["--totals", "--json"])
DIRTY = ["-B", "b0", "-B", "b1"]


def pynbd_map(*args: str) -> str:
    said = CliRunner().invoke(map_command, args, catch_exceptions=False)
    assert (said.exit_code, said.stderr) == (0, "")
    return said.stdout


def server(name: str, folder: Path) -> AbstractContextManager[str]:
    """A server and an image for it."""
    if name.startswith("nbdkit"):
        raw = folder / "disk.raw"
        samples.sparse_file(raw, (4 << 20) + 512)
        return peers.nbdkit(*(["--no-sr"] if "simple" in name else []), "file", str(raw))
    top = samples.chain(folder)
    if name == "qemu-nbd":
        return peers.qemu_nbd(top, "-r", "-f", "qcow2", "-A", *DIRTY)
    return serving(top, "-r", "-A", *DIRTY)


@pytest.mark.parametrize("name", ["pynbd", "qemu-nbd", "nbdkit"])
def test_as_nbdinfo(name: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdkit")
    contexts = ["base:allocation"]
    if name != "nbdkit":
        contexts += ["qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
    with server(name, tmp_path) as uri:
        for context in contexts:
            for shape in SHAPES:
                expected = peers.run("nbdinfo", f"--map={context}", *shape, uri).stdout
                assert pynbd_map("-c", context, *shape, uri) == expected


@pytest.mark.parametrize("name", ["pynbd", "qemu-nbd"])
def test_side_by_side_as_the_image(name: str, tmp_path: Path) -> None:
    """Over the network and here: one table. The filter of the reply's contexts is used, or not."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    with server(name, tmp_path) as uri:
        for contexts in (["depth", "qemu:dirty-bitmap:b1"], ["allocation", "depth"]):
            line = ["-c", contexts[0], "-c", contexts[1]]
            assert pynbd_map(*line, uri) == pynbd_map(*line, str(tmp_path / "top.qcow2"))


@pytest.mark.parametrize(
    "name,there",
    [
        (
            "pynbd",
            "base:allocation, qemu:allocation-depth, qemu:dirty-bitmap:b0, qemu:dirty-bitmap:b1",
        ),
        ("nbdkit", "base:allocation"),
    ],
)
def test_a_context_that_is_not_there(name: str, there: str, tmp_path: Path) -> None:
    peers.require("qemu-img", "qemu-io", "nbdkit")
    with server(name, tmp_path) as uri, pytest.raises(PynbdError) as refused:
        pynbd_map("-c", "qemu:dirty-bitmap:none", uri)
    assert str(refused.value) == (
        f"{uri}: no metadata context 'qemu:dirty-bitmap:none'; there are: {there}"
    )


def test_a_context_that_is_not_there_where_one_client_is_let_in(tmp_path: Path) -> None:
    """Nobody waits for a place that this very command holds."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    top = samples.chain(tmp_path)
    line = ["-r", "-f", "qcow2", "-A", "--shared=1"]
    with peers.qemu_nbd(top, *line) as uri, pytest.raises(PynbdError) as refused:
        pynbd_map("-c", "nonsense", uri)
    assert str(refused.value) == (
        f"{uri}: no metadata context 'nonsense'; there are: base:allocation, qemu:allocation-depth"
    )


def test_a_context_that_is_not_there_and_a_server_that_ends(tmp_path: Path) -> None:
    """It was there for one client, and nobody can be asked what it had."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd")
    top = samples.chain(tmp_path)
    with peers.socket_path() as path:
        peers.run("qemu-nbd", "--fork", f"--socket={path}", "-r", "-f", "qcow2", top)
        uri = peers.unix_uri(path)
        with pytest.raises(PynbdError) as refused:
            pynbd_map("-c", "nonsense", uri)
    assert str(refused.value) == f"{uri}: no metadata context 'nonsense'"


def test_a_context_that_is_not_there_but_elsewhere(tmp_path: Path) -> None:
    """What other exports of the server have is not told."""
    peers.require("qemu-img", "qemu-io", "qemu-storage-daemon")
    top = samples.chain(tmp_path)
    disk = f"driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename={top}"
    deep = {"node_name": "disk", "name": "deep", "allocation_depth": True}
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, disk, export="disk", writable=False) as (daemon, uri),
    ):
        daemon.execute("block-export-add", type="nbd", id="deep", **deep)
        with pytest.raises(PynbdError) as refused:
            pynbd_map("-c", "depth", uri)
    assert str(refused.value) == (
        f"{uri}: no metadata context 'qemu:allocation-depth'; there are: base:allocation"
    )


def test_a_server_without_contexts(tmp_path: Path) -> None:
    peers.require("nbdkit")
    with server("nbdkit, simple replies", tmp_path) as uri, pytest.raises(PynbdError) as refused:
        pynbd_map(uri)
    assert (
        str(refused.value) == f"{uri}: the server has only simple replies, and they tell no status"
    )


@contextmanager
def empty(folder: Path) -> Iterator[str]:
    image = folder / "empty.raw"
    image.touch()
    with serving(image, "-r", "-f", "raw") as uri:
        yield uri


@pytest.mark.parametrize("shape", SHAPES, ids=" ".join)
def test_an_empty_disk(shape: list[str], tmp_path: Path) -> None:
    peers.require("nbdinfo")
    with empty(tmp_path) as uri:
        expected = peers.run("nbdinfo", "--map", *shape, uri).stdout
        assert pynbd_map(*shape, uri) == expected
        assert pynbd_map(*shape, "-f", "raw", str(tmp_path / "empty.raw")) == expected
