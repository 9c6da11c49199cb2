"""open_image: what it opens, what it refuses with which line; nothing stays open then."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from interop import peers
from pynbd.block.chain import open_image
from pynbd.block.engine import Engine
from pynbd.block.limits import ImageLimits
from pynbd.block.node import BlockNode
from pynbd.block.qcow2.builder import Data, Image, InternalSnapshot
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.errors import CorruptImage, ImageError, ImageLocked, UnsupportedFeature
from tests.block.reading import contents, qemu_contents, qemu_rows, rows

SIZE = 1 << 20


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[BlockNode]:
    node = await open_image(path, **options)
    try:
        yield node
    finally:
        await node.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def refused(path: Path, kind: type[ImageError], *parts: str | Path, **options: Any) -> None:
    """The image is refused with one line that begins with a file's name and has all ``parts``."""
    before = open_files()
    with pytest.raises(ImageError) as caught:
        await open_image(path, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text
    assert text.startswith(str(path.parent))
    for part in parts:
        assert str(part) in text
    assert open_files() == before


def overlay(path: Path, backing: str, backing_format: str | None = "raw", **options: Any) -> Path:
    Image(size=SIZE, backing_file=backing, backing_format=backing_format, **options).write(path)
    return path


def raw(path: Path, data: bytes = b"", size: int = SIZE) -> Path:
    path.write_bytes(data.ljust(size, b"\0"))
    return path


# What is opened


async def test_a_guessed_raw_image_is_guarded_only_when_it_can_be_written(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk", b"hello")
    header = b"QFI\xfb\0\0\0\3"
    async with opened(path, read_only=False) as node:
        assert (node.format, node.size, node.read_only) == ("raw", SIZE, False)
        (error,) = await node.pwrite_batch([(0, header)])
        assert error is not None
        assert await node.pread(0, 5) == b"hello"
    async with opened(path, format="raw", read_only=False) as node:
        assert await node.pwrite_batch([(0, header)]) == [None]
    async with opened(path, format="raw") as node:
        assert node.read_only
        assert await node.pread(0, 8) == header


async def test_names_are_relative_to_the_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a/b", "c"):
        (tmp_path / folder).mkdir(parents=True)
    raw(tmp_path / "c" / "base: 1.raw", b"base")
    Image(
        size=SIZE,
        clusters={65536: Data(b"middle")},
        backing_file="./base: 1.raw",
        backing_format="raw",
    ).write(tmp_path / "c" / "middle")
    overlay(tmp_path / "a/b/top", "../../c/middle", "qcow2", clusters={131072: Data(b"top")})
    monkeypatch.chdir(tmp_path / "a")
    async with opened(Path("b/top")) as node:
        assert [layer.format for layer in node.chain()] == ["qcow2", "qcow2", "raw"]
        assert (await node.pread(0, 4), await node.pread(65536, 6)) == (b"base", b"middle")
        assert await node.pread(131072, 3) == b"top"


async def test_only_the_top_is_opened_for_writing(tmp_path: Path) -> None:
    raw(tmp_path / "base")
    os.chmod(tmp_path / "base", 0o400)
    async with opened(overlay(tmp_path / "top", "base")) as node:
        assert node.backing is not None
        assert node.backing.read_only
        assert not node.backing.file.writable


async def test_probe_backing(tmp_path: Path) -> None:
    raw(tmp_path / "base", b"raw")
    path = overlay(tmp_path / "top", "base", None)
    rebase = "qemu-img rebase -u -F FORMAT -b FILE records it"  # without -b it is dropped
    await refused(path, ImageError, "'base'", "not recorded", "--probe-backing", rebase)
    async with opened(path, probe_backing=True) as node:
        assert await node.pread(0, 3) == b"raw"
    raw(tmp_path / "base", b"KDMV")
    await refused(path, UnsupportedFeature, tmp_path / "base", "vmdk", probe_backing=True)


async def test_an_engine_can_be_shared(tmp_path: Path) -> None:
    engine = Engine(1)
    for name in ("a", "b"):
        node = await open_image(raw(tmp_path / name), engine=engine)
        assert node.own_engine is None
        await node.close()
    assert await engine.run(int, "7") == 7
    engine.close()


async def test_the_depth_past_the_end_of_a_short_backing_file(tmp_path: Path) -> None:
    """The short layer decides, as QEMU's allocation depth has it."""
    peers.require("qemu-nbd", "nbdinfo")
    raw(tmp_path / "base", b"x", 200 * 1024)
    overlay(tmp_path / "middle", "base", "raw", clusters={0: Data(b"m")})
    path = overlay(tmp_path / "top", "middle", "qcow2", clusters={524288: Data(b"t")})
    with peers.qemu_nbd(path, "-r", "-f", "qcow2", "-A") as uri:
        said = peers.run("nbdinfo", "--map=qemu:allocation-depth", "--json", uri).stdout
    theirs = [depth for row in json.loads(said) for depth in [row["type"]] * (row["length"] // 512)]
    ours: list[int] = []
    async with opened(path) as node:
        for start, end, _, _, depth in await node.map(0, node.size, want_zero=False):
            ours += [depth] * ((end - start) // 512)
    assert ours == theirs


async def test_a_chain_of_all_kinds(tmp_path: Path) -> None:
    """Five layers of different sizes and formats that qemu-img made: contents and map."""
    peers.require("qemu-img", "qemu-io")
    chance = random.Random(5)
    below: Path | None = None
    for number, (kind, options, size) in enumerate(
        [
            ("raw", "", 6 << 20),
            ("qcow2", "compat=0.10,cluster_size=4k", 4 << 20),
            ("qcow2", "extended_l2=on", 8 << 20),
            ("qcow2", f"data_file={tmp_path}/external.data", 5 << 20),
            ("qcow2", "cluster_size=512,compression_type=zstd", 7 << 20),
        ]
    ):
        path = tmp_path / f"layer{number}"
        line = ["create", "-q", "-f", kind, *(["-o", options] if options else [])]
        if below is not None:
            line += ["-b", below.name, "-F", "raw" if number == 1 else "qcow2"]
        peers.run("qemu-img", *line, path, str(size))
        writes = [
            f"write -P {number + 1} {chance.randrange(size - 70000) // 512 * 512} {length}"
            for length in (512, 4096, 65536, 1024)
        ]
        peers.run("qemu-io", "-f", kind, path, stdin="\n".join(writes) + "\n")
        below = path
    assert below is not None
    async with opened(below) as node:
        assert len(list(node.chain())) == 5
        assert await contents(node) == qemu_contents(below)
        theirs = [(*row[:5], row[5] if row[3] else None) for row in qemu_rows(below)]
        ours = [(*row[:5], row[5] if row[3] else None) for row in await rows(node)]
        assert [row for row in ours if row[3]] == [row for row in theirs if row[3]]


# What is refused


@pytest.mark.parametrize(
    "name",
    ["json:{}", "nbd://localhost/", "http://h/x", "nbd:unix:/s", "file:base", "a:b", ":x", "fd:3"],
)
@pytest.mark.parametrize("role", ["backing file", "data file"])
async def test_protocol_names(tmp_path: Path, name: str, role: str) -> None:
    path = tmp_path / "top"
    if role == "backing file":
        overlay(path, name)
    else:
        Image(size=SIZE, data_file="x").write(path)
        path.write_bytes(path.read_bytes().replace(*renamed("x", name)))
    await refused(path, UnsupportedFeature, path, repr(name), role)


def renamed(old: str, new: str) -> tuple[bytes, bytes]:
    """The data file extension with another name; there is room, as zeroes follow it."""

    def extension(name: str) -> bytes:
        data = name.encode()
        return b"DATA" + len(data).to_bytes(4, "big") + data + bytes(-len(data) % 8)

    return extension(old), extension(new)


async def test_a_name_is_judged_before_its_format(tmp_path: Path) -> None:
    path = overlay(tmp_path / "top", "nbd://localhost/", None)
    await refused(path, UnsupportedFeature, path, "not a plain file name")


async def test_a_name_of_several_lines_is_told_in_one(tmp_path: Path) -> None:
    image = Image(size=512, backing_file="a\n\x1b[2Jb", backing_format="raw")
    image.write(tmp_path / "x")
    with pytest.raises(ImageError, match=r"a\?\?\[2Jb: cannot be opened") as refused:
        await open_image(tmp_path / "x")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["a\0b", "\0"])
async def test_names_with_zero_bytes(tmp_path: Path, name: str) -> None:
    path = overlay(tmp_path / "top", name, None)
    await refused(path, CorruptImage, path, "cannot be a file name")


async def test_a_data_file_that_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / "top"
    Image(size=SIZE, data_file="x").write(path)
    path.write_bytes(path.read_bytes().replace(b"DATA\0\0\0\1", b"NONE\0\0\0\1"))
    await refused(path, ImageError, path, "does not name")


async def test_a_data_file_that_is_the_image(tmp_path: Path) -> None:
    """Which is no loop: it is not looked into."""
    path = tmp_path / "top"
    Image(size=SIZE, data_file="x").write(path)
    (tmp_path / "x").unlink()
    (tmp_path / "x").symlink_to(path)
    said = f"in the chain already, as {path}: no file of its own (data file of {path})"
    await refused(path, ImageError, said)


async def test_missing_files(tmp_path: Path) -> None:
    await refused(tmp_path / "none", ImageError, tmp_path / "none", "No such file")
    path = overlay(tmp_path / "top", "none")
    await refused(path, ImageError, tmp_path / "none", "No such file", f"backing file of {path}")
    Image(size=SIZE, data_file="data").write(path)
    (tmp_path / "data").unlink()
    await refused(path, ImageError, tmp_path / "data", "No such file", f"data file of {path}")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "FIFO"])
async def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "odd")
    await refused(tmp_path / "odd", ImageError, tmp_path / "odd")
    path = overlay(tmp_path / "top", "odd")
    await refused(path, ImageError, tmp_path / "odd", "backing file of")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
async def test_what_no_file_can_be_called(tmp_path: Path, name: str) -> None:
    """JSON has such strings."""
    await refused(tmp_path / name, ImageError, "it cannot be the name of a file")
    await refused(tmp_path / name, ImageError, "cannot be", format="raw", read_only=False)
    options = {"driver": "raw", "file.filename": str(tmp_path / name)}
    with pytest.raises(ImageError, match="cannot be the name of a file"):
        await open_image(options)


async def test_many_nodes_on_one_another(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk", b"bottom")
    options: dict[str, object] = {"driver": "file", "filename": str(path)}
    for _ in range(300):
        options = {"driver": "raw", "file": options}
    node = await open_image(options)
    assert await node.pread(0, 6) == b"bottom"
    await node.close()


@pytest.mark.parametrize("read_only", [True, False])
async def test_loops(tmp_path: Path, read_only: bool) -> None:
    """Whether or not the image is locked, which is in the way of nobody else here."""
    path = overlay(tmp_path / "self", "self", "qcow2")
    await refused(path, ImageError, "loop", read_only=read_only)
    overlay(tmp_path / "a", "b", "qcow2")
    overlay(tmp_path / "b", "link", "qcow2")
    os.link(tmp_path / "a", tmp_path / "link")
    loop = tmp_path / "link", tmp_path / "a", "loop"
    await refused(tmp_path / "a", ImageError, *loop, read_only=read_only)


async def test_layers(tmp_path: Path) -> None:
    raw(tmp_path / "1", b"bottom", 4096)
    for number in range(2, ImageLimits().layers + 2):
        kind = "raw" if number == 2 else "qcow2"
        image = Image(size=4096, cluster_bits=9, backing_file=str(number - 1), backing_format=kind)
        image.write(tmp_path / str(number))
    async with opened(tmp_path / "200") as node:
        assert len(list(node.chain())) == 200
        assert await node.pread(0, 6) == b"bottom"
    await refused(tmp_path / "201", ImageError, tmp_path / "201", "200 layers", "--max-layers")
    async with opened(tmp_path / "201", limits=ImageLimits(layers=201)):
        pass
    await refused(tmp_path / "3", ImageError, "more than 2 layers", limits=ImageLimits(layers=2))


async def test_formats(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk", b"KDMV")
    await refused(path, UnsupportedFeature, path, "vmdk", "-f raw")
    await refused(path, UnsupportedFeature, path, "vmdk", format="vmdk")
    await refused(path, ImageError, path, "not a qcow2 image", "vmdk", format="qcow2")
    await refused(overlay(tmp_path / "top", "disk", "vmdk"), UnsupportedFeature, "vmdk", path)
    await refused(overlay(tmp_path / "top", "disk", "qcow2"), ImageError, path, "not a qcow2")
    async with opened(overlay(tmp_path / "top", "disk", "raw")) as node:
        assert await node.pread(0, 4) == b"KDMV"


async def test_unknown_features_and_encryption(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    # Bit 17 of the incompatible features; crypt_method 2.
    for offset, value, said in ((77, b"\2", "17"), (35, b"\2", "encrypted")):
        Image(size=SIZE).write(path)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(value)
        await refused(path, UnsupportedFeature, path, said)


async def test_a_backing_file_that_is_damaged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    Image(size=SIZE).write(base)
    base.write_bytes(base.read_bytes()[:50])
    await refused(overlay(tmp_path / "top", "base", "qcow2"), CorruptImage, base)


async def test_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    Image(size=SIZE, snapshots=[InternalSnapshot("one", {})]).write(path)
    await refused(path, ImageError, path, "'two'", "'one'", snapshot="two")
    Image(size=SIZE).write(path)
    await refused(path, ImageError, path, "it has none", snapshot="two")
    await refused(raw(tmp_path / "raw"), ImageError, "raw", "no internal snapshots", snapshot="x")


async def test_locks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = raw(tmp_path / "base")
    top = overlay(tmp_path / "top", "base")
    async with opened(path, format="raw", read_only=False):
        await refused(path, ImageLocked, path, format="raw", read_only=False)
        await refused(top, ImageLocked, path, f"backing file of {top}")
        assert not caplog.records
        async with opened(top, force_share=True) as node:
            assert await node.pread(0, 1) == b"\0"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    async with opened(top):
        pass


async def test_a_writer_shares_with_nobody(tmp_path: Path) -> None:
    """Unless the options say that there are no locks."""
    path = raw(tmp_path / "disk")
    with pytest.raises(ImageError, match="force-share: "):
        await open_image(path, read_only=False, force_share=True)
    options = {"driver": "raw", "file.filename": str(path), "file.locking": "off"}
    async with opened(path, format="raw"):
        node = await open_image(options, read_only=False)
        await node.close()


async def test_a_long_chain_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """Its layers keep no more L2 tables together than one image does, whichever they are of."""
    layers, tables, cluster = 10, 32, 512
    below: dict[str, Any] = {}
    for number in range(layers):
        clusters = {table * 64 * cluster + number * cluster: Data(b"x") for table in range(tables)}
        image = Image(size=SIZE, cluster_bits=9, clusters=clusters, **below)
        image.write(tmp_path / str(number))
        below = {"backing_file": str(number), "backing_format": "qcow2"}
    for kept, limit in ((layers * tables, 1 << 20), (7, 7 * cluster), (1, 1)):
        async with opened(tmp_path / "9", limits=ImageLimits(tables=limit)) as node:
            for at in range(0, SIZE, 64 * cluster):
                assert await node.pread(at, 1) == b"x"
            chain = [each for each in node.chain() if isinstance(each, Qcow2Node)]
            assert sum(len(each.mapping.tables) for each in chain) == kept
            assert sum(each.mapping.tables.loads for each in chain) >= layers * tables


@pytest.mark.parametrize("broken", ["top.qcow2", "x.data", "base"])
@pytest.mark.parametrize("call", ["preadv", "lseek"])
async def test_a_file_that_cannot_be_read(
    tmp_path: Path, broken: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host does not know whose bytes they are; the line does."""
    raw(tmp_path / "base")
    clusters = {0: Data(b"a")}
    path = tmp_path / "top.qcow2"
    if broken == "x.data":
        Image(size=SIZE, clusters=clusters, data_file="x.data").write(path)
    else:
        overlay(path, "base", clusters=clusters)
    real = getattr(os, call)

    def failing(fd: int, *rest: Any) -> Any:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(broken):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    monkeypatch.setattr(os, call, failing)
    if broken == "x.data":  # of which nothing is read
        await (await open_image(path)).close()
    else:
        named = [] if broken == path.name else [f"(backing file of {path})"]
        problem = f"{tmp_path / broken}: cannot be opened: Input/output error"
        await refused(path, ImageError, problem, *named)
