"""pynbd copy from every kind of source to every kind of target; qemu-img compare as the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import serving
from interop.transferring import compared, copied, same

SIZE = (8 << 20) + (32 << 10)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One disk in all its forms: files, and URIs of servers that serve them."""
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdkit")
    folder = tmp_path_factory.mktemp("sources")
    top = samples.chain(folder)
    raw, packed = folder / "disk.raw", folder / "packed.qcow2"
    convert = ["convert", "-f", "qcow2", "-O"]
    peers.run("qemu-img", *convert, "raw", top, raw)
    peers.run("qemu-img", *convert, "qcow2", "-c", top, packed)
    with ExitStack() as stack:
        start = stack.enter_context
        yield {
            "raw": str(raw),
            "packed": str(packed),
            "chain": str(top),
            "qemu-nbd": start(peers.qemu_nbd(top, "-r", "-f", "qcow2", export="x")),
            "nbdkit": start(peers.nbdkit("-r", "file", str(raw))),
            "pynbd": start(serving(top, "-r")),
        }


def new_file(folder: Path, stack: ExitStack) -> str:
    return str(folder / "new.raw")


def existing_file(folder: Path, stack: ExitStack) -> str:
    """Longer than the source, without a hole."""
    path = folder / "old.raw"
    path.write_bytes(b"\xa5" * (SIZE + 12345))
    return str(path)


def qemu_nbd(folder: Path, stack: ExitStack) -> str:
    """A qcow2 overlay whose backing file shows wherever nothing is written."""
    existing_file(folder, stack)
    top = folder / "target.qcow2"
    backing = ["-b", "old.raw", "-F", "raw"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *backing, top, str(SIZE))
    return stack.enter_context(peers.qemu_nbd(top, "-f", "qcow2", "--discard=unmap"))


def nbdkit_memory(folder: Path, stack: ExitStack) -> str:
    uri = stack.enter_context(peers.nbdkit("memory", str(SIZE)))
    samples.qemu_io(uri, f"write -q -P 0xa5 0 {SIZE}", driver="raw")
    return uri


@pytest.mark.parametrize("source", ["raw", "packed", "chain", "qemu-nbd", "nbdkit", "pynbd"])
@pytest.mark.parametrize("target", [new_file, existing_file, qemu_nbd, nbdkit_memory])
def test_copy(
    source: str,
    target: Callable[[Path, ExitStack], str],
    disks: dict[str, str],
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        place = target(tmp_path, stack)
        copied(disks[source], place)
        same(disks["raw"], place)
        assert compared(disks[source], place).difference is None


@pytest.mark.parametrize("source", ["packed", "chain", "pynbd"])
@pytest.mark.parametrize("target", [new_file, existing_file])
def test_holes_are_those_of_qemu_img(
    source: str,
    target: Callable[[Path, ExitStack], str],
    disks: dict[str, str],
    tmp_path: Path,
) -> None:
    theirs = tmp_path / "theirs.raw"
    format_name = "raw" if source == "pynbd" else "qcow2"
    peers.run("qemu-img", "convert", "-f", format_name, "-O", "raw", disks[source], theirs)
    ours = Path(target(tmp_path, ExitStack()))
    copied(disks[source], ours)
    assert ours.read_bytes() == theirs.read_bytes()
    assert abs(samples.allocated(ours) - samples.allocated(theirs)) <= samples.BLOCK
    maps = [
        peers.run("qemu-img", "map", "--output=json", "-f", "raw", path).stdout
        for path in (ours, theirs)
    ]
    assert maps[0] == maps[1]
