"""Images that are named by options: qemu-img and pynbd see the same disk, or both refuse."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interop import peers
from interop.samples import qemu_io, sparse_file
from pynbd.block.chain import open_image
from pynbd.block.image_options import parse_image_opts
from pynbd.block.node import BlockNode
from pynbd.errors import PynbdError
from tests.block.devices import loop_device
from tests.block.reading import contents, merged, rows

SAME = [
    "driver=raw,file.driver=file,file.filename=odd.raw",
    "driver=raw,file.filename=odd.raw,",
    "driver=file,filename=odd.raw",
    "file.filename=odd.raw",
    "file.driver=file,file.filename=top.qcow2",
    "driver=file,filename=top.qcow2",
    "driver=raw,file.filename=comma,,name.raw",
    "driver=raw,file.filename=odd.raw,file.filename=comma,,name.raw",
    "driver=raw,offset=512,file.filename=odd.raw",
    "driver=raw,offset=512,size=1024,file.filename=odd.raw",
    "driver=raw,offset=512,size=69632,file.filename=odd.raw",
    "driver=raw,offset=1k,size=0x200,file.filename=odd.raw",
    "driver=raw,size=0.5k,file.filename=odd.raw",
    "driver=raw,size=+512,file.filename=odd.raw",
    "driver=raw,size=70144,file.filename=odd.raw",
    "driver=raw,size=1K,offset=64k,file.filename=odd.raw",
    "driver=raw,offset=512,file.driver=raw,file.offset=512,file.file.filename=odd.raw",
    "driver=qcow2,file.driver=file,file.filename=top.qcow2",
    "driver=qcow2,file.filename=top.qcow2",
    "driver=qcow2,file.filename=top.qcow2,backing=",
    "driver=raw,file.filename=odd.raw,backing=",
    "driver=qcow2,file.driver=raw,file.file.driver=file,file.file.filename=top.qcow2",
    "driver=qcow2,file.driver=raw,file.offset=1536,file.size=SIZE,file.file.filename=archive",
    "driver=qcow2,file.driver=raw,file.offset=1536,file.file.filename=archive",
    "driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=odd.raw",
    "driver=qcow2,file.filename=top.qcow2,backing.file.filename=odd.raw",
    "driver=qcow2,file.filename=top.qcow2,backing.offset=4096",
    "driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.offset=4096,backing.size=8k",
    "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=alone.qcow2",
    "driver=qcow2,file.filename=data.qcow2",
    "driver=qcow2,file.filename=data.qcow2,data-file.driver=file,data-file.filename=copy.data",
    "driver=qcow2,file.filename=top.qcow2,cache.direct=on,file.aio=threads,file.locking=off",
    "driver=qcow2,file.filename=top.qcow2,l2-cache-size=1M,lazy-refcounts=off,node-name=n",
    "driver=raw,file.filename=odd.raw,read-only=on,auto-read-only=off,discard=unmap",
    "driver=raw,file.filename=odd.raw,detect-zeroes=off,force-share=on,cache.no-flush=on",
    "driver=raw,file.driver=qcow2,file.file.filename=alone.qcow2",
    "driver=raw,offset=512,size=64k,file.driver=qcow2,file.file.filename=alone.qcow2",
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"backing":null}',
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}',
    "json:{'driver':'qcow2', 'file.driver':'file', 'file.filename':'top.qcow2'}",
    'json:{"driver":"raw","offset":512,"size":1024,"file":{"driver":"file","filename":"odd.raw"}}',
    'json:{"driver":"raw","offset":"1k","file":{"filename":"odd.raw"},"read-only":true}',
    'json:{"file":{"driver":"file","filename":"top.qcow2"},"backing":{"driver":"raw","size":8192}}',
    "json:{'driver':'raw','file':{'filename':'it\\'s \"odd\".raw'}}",
]

REFUSED = [
    "",
    "top.qcow2",
    "filename=odd.raw",
    "=x,driver=raw",
    "driver=raw",
    "driver=qcow2,filename=top.qcow2",
    "driver=qcow2,file=top.qcow2",
    "driver=qcow2,file.driver=file",
    "driver=raw,file.filename=",
    "driver=raw,file=odd.raw,file.filename=odd.raw",
    "driver=raw,,file.filename=odd.raw",
    "driver=bogus,file.filename=odd.raw",
    "driver=raw,file.driver=bogus,file.filename=odd.raw",
    "driver=raw,file.filename=missing",
    "driver=raw,file.filename=file:odd.raw",
    "driver=raw,file.filename=odd.raw,bogus=1",
    "driver=raw,file.filename=odd.raw,file.bogus=1",
    "driver=raw,file.filename=odd.raw,a..b=1",
    "driver=raw,file.filename=odd.raw,id=x",
    "driver=raw,file.filename=odd.raw,offset",
    "driver=raw,file.filename=odd.raw,offset=",
    "driver=raw,file.filename=odd.raw,offset=-1",
    "driver=raw,file.filename=odd.raw,offset=1e3",
    "driver=raw,file.filename=odd.raw,offset=1kk",
    "driver=raw,file.filename=odd.raw,offset=1M",
    "driver=raw,file.filename=odd.raw,size=1000",
    "driver=raw,file.filename=odd.raw,size=1M",
    "driver=raw,file.filename=odd.raw,offset=1024,size=70144",
    "driver=raw,file.filename=odd.raw,discard=bogus",
    "driver=raw,file.filename=odd.raw,detect-zeroes=bogus",
    "driver=raw,file.filename=odd.raw,cache.direct=maybe",
    "driver=raw,file.filename=odd.raw,cache.bogus=on",
    "driver=raw,file.filename=odd.raw,file.aio=bogus",
    "driver=raw,file.filename=odd.raw,file.locking=bogus",
    "driver=host_device,filename=odd.raw",
    "driver=raw,file.driver=host_device,file.filename=odd.raw",
    "driver=qcow2,file.filename=odd.raw",
    "driver=qcow2,file.filename=top.qcow2,offset=512",
    "driver=qcow2,file.filename=top.qcow2,backing=base",
    "driver=qcow2,file.filename=top.qcow2,backing.bogus=1",
    "driver=qcow2,file.filename=top.qcow2,backing.filename=base.raw",
    "driver=qcow2,file.filename=alone.qcow2,backing.offset=512",
    "driver=qcow2,file.driver=raw,file.offset=512,file.file.filename=top.qcow2",
    "driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=top.qcow2",
    "driver=raw,file.driver=raw,file.size=1M,file.file.filename=odd.raw",
    "driver=raw,offset=2M,file.driver=qcow2,file.file.filename=alone.qcow2",
    "driver=raw,file.filename=odd.raw,backing.file.filename=base.raw",
    "json:{}",
    "json:",
    "json:[1]",
    'json:{"driver":"raw"',
    'json:{"driver":"raw","file":{"filename":7}}',
    'json:{"driver":"raw","file":null}',
    'json:{"driver":"raw","offset":1.5,"file":{"filename":"odd.raw"}}',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that qemu-img made."""
    peers.require("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("names")
    for name in ("odd.raw", "comma,name.raw", 'it\'s "odd".raw'):
        sparse_file(folder / name, 70000, seed=len(name))
    sparse_file(folder / "base.raw", 300_032)
    create = ["create", "-q", "-f", "qcow2"]
    top, alone, data = (folder / name for name in ("top.qcow2", "alone.qcow2", "data.qcow2"))
    peers.run("qemu-img", *create, "-b", "base.raw", "-F", "raw", top, "1M", cwd=folder)
    qemu_io(top, "write -q -P 3 64k 64k", "write -q -P 4 512k 100k")
    peers.run("qemu-img", *create, alone, "200k")
    qemu_io(alone, "write -q -P 5 0 1k")
    peers.run("qemu-img", *create, "-o", f"data_file={folder / 'd'}", data, "256k")
    qemu_io(data, "write -q -P 6 64k 64k")
    (folder / "copy.data").write_bytes(os.urandom(256 << 10))
    image = alone.read_bytes()
    (folder / "archive").write_bytes(b"h" * 1536 + image + b"t" * 3000)
    return folder


def named(name: str, folder: Path) -> tuple[str, list[str]]:
    name = name.replace("SIZE", str((folder / "alone.qcow2").stat().st_size))
    return name, [] if name.startswith("json:") else ["--image-opts"]


async def opened(name: str) -> BlockNode:
    image = name if name.startswith("json:") else parse_image_opts(name)
    return await open_image(image, whole_sectors=True)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", SAME)
async def test_the_same_disk(folder: Path, name: str) -> None:
    name, how = named(name, folder)
    said = peers.run("qemu-img", "map", *how, "--output=json", name, cwd=folder).stdout
    copy = folder / "copy"
    peers.run("qemu-img", "convert", *how, "-O", "raw", name, copy, cwd=folder)
    with inside(folder):
        node = await opened(name)
        try:
            assert node.size == copy.stat().st_size
            assert await contents(node) == copy.read_bytes()
            ours = await rows(node)
        finally:
            await node.close()
    # Where nothing is present they have no depth, and where a layer ends we name it. A window in a
    # window counts its offsets from its own beginning.
    nested = name.startswith("driver=raw,offset=512,file.driver=raw")
    theirs = [
        (
            row["start"],
            row["start"] + row["length"],
            row["zero"],
            row["data"],
            row["offset"] - 512 * nested if row["data"] else None,
            0,
        )
        for row in json.loads(said)
        if row["length"]
    ]
    assert merged([(*row[:5], 0) for row in ours]) == merged(theirs)


@pytest.mark.parametrize("name", REFUSED)
async def test_both_refuse(folder: Path, name: str) -> None:
    name, how = named(name, folder)
    done = peers.run("qemu-img", "map", *how, "--output=json", name, cwd=folder, check=False)
    assert done.returncode == 1, done.stdout
    before = len(os.listdir("/proc/self/fd"))
    with inside(folder), pytest.raises(PynbdError) as caught:
        await (await opened(name)).close()
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "name", ["driver=raw,file.driver={},file.filename={}", "driver={},filename={}"]
)
@pytest.mark.parametrize("driver", ["file", "host_device"])
async def test_devices(folder: Path, name: str, driver: str) -> None:
    disk = folder / "device"
    content = sparse_file(disk, 128 << 10)
    with loop_device(disk) as device:
        text = name.format(driver, device)
        done = peers.run("qemu-img", "info", "--image-opts", text, check=False)
        try:
            node = await opened(text)
        except PynbdError:
            assert done.returncode == 1
            assert driver == "file"
        else:
            assert done.returncode == 0
            assert await contents(node) == content
            await node.close()


@pytest.mark.parametrize("offset", [0, 512, 4096, 65536 - 512, 100 << 10, 1 << 20])
@pytest.mark.parametrize("image", ["odd.raw", "top.qcow2", "alone.qcow2"])
async def test_offsets(folder: Path, image: str, offset: int) -> None:
    """qemu-nbd --offset: size, contents and depth."""
    peers.require("qemu-nbd", "nbdinfo", "nbdcopy")
    driver = "raw" if image == "odd.raw" else "qcow2"
    path = folder / image
    try:
        node = await open_image(path, format=driver, offset=offset, whole_sectors=True)
    except PynbdError:
        line = ["qemu-nbd", "-r", "-f", driver, "-o", str(offset), "-k", folder / "s", path]
        assert peers.run(*line, check=False).returncode == 1
        return
    size = node.size
    data = await contents(node)
    depths: list[int] = []
    for start, end, _, _, depth in await node.map(0, size) if size else ():
        depths += [depth] * ((end - start + 511) // 512)
    await node.close()
    with peers.qemu_nbd(path, "-r", "-f", driver, "-A", "-o", str(offset)) as uri:
        assert int(peers.run("nbdinfo", "--size", uri).stdout) == size
        if not size:
            return
        copy = folder / "copy.nbd"
        peers.run("nbdcopy", uri, copy)
        assert copy.read_bytes() == data
        said = peers.run("nbdinfo", "--map=qemu:allocation-depth", "--json", uri).stdout
    theirs = [
        depth for row in json.loads(said) for depth in [row["type"]] * (-(-row["length"] // 512))
    ]
    assert depths[: size // 512] == theirs
