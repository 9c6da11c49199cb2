"""The command lines with which programs start qemu-nbd, given to pynbd-qemu-nbd.

They stand here as ovirt-imageio (``qemu_nbd.py``), virtnbdbackup (``qemu/util.py``), OpenNebula
(its backup drivers) and libnbd (``nbdinfo``, its own tests) have them.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from interop import drop_in, peers, samples
from interop.certificates import Pki
from interop.drop_in import OURS, free_port, start, stop, wait_until

READ_ONLY = ["--read-only", "--cache=none", "--aio=native"]
NO_EFFECT = ["--discard=unmap", "--detect-zeroes=unmap"]
COMPRESSED = "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=flat.qcow2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "nbdinfo", "nbdcopy", "nbdsh")
    folder = tmp_path_factory.mktemp("images")
    drop_in.images(folder)
    return folder


def content(image: str | Path, folder: Path) -> str:
    """What qemu-img reads of an image, as a hash."""
    raw = folder / "content.raw"
    peers.run("qemu-img", "convert", "-O", "raw", image, raw, cwd=folder)
    return hashlib.sha256(raw.read_bytes()).hexdigest()


def copied(*source: str) -> str:
    """What nbdcopy reads of a URI or of a server that it starts, as a hash."""
    line = [*peers.command("nbdcopy"), *source, "-"]
    done = subprocess.run(line, check=True, capture_output=True, timeout=30)
    return hashlib.sha256(done.stdout).hexdigest()


def contexts(uri: str) -> list[str]:
    listing = json.loads(peers.run("nbdinfo", "--json", uri).stdout)
    names: list[str] = listing["exports"][0]["contexts"]
    return names


# ovirt-imageio -----------------------------------------------------------------------------------


def test_ovirt_version() -> None:
    """The second word of the first line is a version, of 5.2.0 or later."""
    first = drop_in.refused(OURS, "--version", folder=Path.cwd()).stdout.splitlines()[0]
    version = tuple(int(number) for number in first.split(None, 2)[1].split("."))
    assert version >= (5, 2, 0)


def ovirt(image: dict[str, Any], *args: str, depth: bool = True) -> list[str]:
    line = ["--export-name=", "--persistent", "--shared=8", *READ_ONLY, *NO_EFFECT, *args]
    return [*line, *(["--allocation-depth"] if depth else []), f"json:{json.dumps(image)}"]


def test_ovirt_qcow2_chain(folder: Path) -> None:
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(folder / "top.qcow2")}}
    line = ovirt(image, "--bitmap=b0")
    with drop_in.running(OURS, *line, folder=folder) as run:
        assert copied(run.uri) == content("top.qcow2", folder)
        assert contexts(run.uri) == [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:b0",
        ]
    assert run.status == 0


def test_ovirt_qcow2_without_its_backing_chain(folder: Path) -> None:
    """What is not in the top layer reads as zeroes, and is absent."""
    top = {"driver": "file", "filename": str(folder / "top.qcow2")}
    image = {"driver": "qcow2", "file": top, "backing": None}
    with drop_in.running(OURS, *ovirt(image), folder=folder) as run:
        assert copied(run.uri) == content(f"json:{json.dumps(image)}", folder)
        said = peers.run("nbdinfo", "--json", "--map=qemu:allocation-depth", run.uri).stdout
    assert {extent["description"] for extent in json.loads(said)} == {"absent", "local"}


def test_ovirt_range_of_a_raw_file(folder: Path) -> None:
    disk = folder / "disk.raw"
    image = {
        "driver": "raw",
        "file": {"driver": "file", "filename": str(disk)},
        "offset": 65536,
        "size": 131072,
    }
    with drop_in.running(OURS, *ovirt(image, depth=False), folder=folder) as run:
        expected = disk.read_bytes()[65536 : 65536 + 131072]
        assert copied(run.uri) == hashlib.sha256(expected).hexdigest()


def test_ovirt_disk_in_an_ova(folder: Path, tmp_path: Path) -> None:
    """A qcow2 image inside a tar file."""
    ova = tmp_path / "vm.ova"
    with tarfile.open(ova, "w") as archive:
        archive.add(folder / "odd.raw", "vm.ovf")
        archive.add(folder / "flat.qcow2", "disk")
    with tarfile.open(ova) as archive:
        member = archive.getmember("disk")
    image = {
        "driver": "qcow2",
        "file": {
            "driver": "raw",
            "file": {"driver": "file", "filename": str(ova)},
            "offset": member.offset_data,
            "size": member.size,
        },
    }
    with drop_in.running(OURS, *ovirt(image), folder=folder) as run:
        assert copied(run.uri) == content("flat.qcow2", folder)


def test_ovirt_upload_to_a_raw_disk(folder: Path, tmp_path: Path) -> None:
    """Written sparsely: zeroes that a client writes as data become holes."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"old" * 349526)  # a MiB, and 2 bytes
    source = folder / "disk.raw"
    image = {"driver": "raw", "file": {"driver": "file", "filename": str(disk)}}
    line = [word for word in ovirt(image, depth=False) if word != "--read-only"]
    with drop_in.running(OURS, *line, folder=folder) as run:
        script = f"""
data = open({str(source)!r}, "rb").read()
for at in range(0, len(data), {samples.BLOCK}):
    h.pwrite(data[at:at + {samples.BLOCK}], at)
h.flush()
"""
        peers.nbdsh(script, run.uri)
    data = source.read_bytes()
    assert disk.read_bytes()[: 1 << 20] == data
    blocks = [data[at : at + samples.BLOCK] for at in range(0, 1 << 20, samples.BLOCK)]
    zero = sum(not any(block) for block in blocks)
    assert zero
    # The 2 bytes after the MiB take a block of the file system.
    assert samples.allocated(disk) == (len(blocks) - zero) * samples.BLOCK + 4096


@pytest.mark.parametrize("backing", [True, False], ids=["chain", "backing null"])
def test_ovirt_upload_to_a_qcow2_disk(backing: bool, folder: Path, tmp_path: Path) -> None:
    """As it uploads into a new overlay, or into one layer of a chain by itself."""
    base, source = folder / "base.raw", folder / "disk.raw"
    disk = tmp_path / "disk.qcow2"
    below = ["-b", str(base), "-F", "raw"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *below, disk, "6M")
    image: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}}
    if not backing:
        image["backing"] = None
    line = [word for word in ovirt(image) if word != "--read-only"]
    with drop_in.running(OURS, *line, folder=folder) as run:
        script = f"""
data = open({str(source)!r}, "rb").read()
for at in range(0, len(data), 30000):
    h.pwrite(data[at:at + 30000], at)
h.zero(100000, 2 << 20)
h.flush()
"""
        peers.nbdsh(script, run.uri)
    assert run.status == 0
    peers.run("qemu-img", "check", disk)
    expected = bytearray(base.read_bytes())
    expected[: 1 << 20] = source.read_bytes()
    expected[2 << 20 : (2 << 20) + 100000] = bytes(100000)
    if not backing:  # parts of clusters got zeroes around them
        end = (2 << 20) + 2 * samples.BLOCK
        expected[(2 << 20) + 100000 : end] = bytes(end - (2 << 20) - 100000)
    assert content(disk, tmp_path) == hashlib.sha256(expected).hexdigest()


def test_ovirt_on_tcp(folder: Path) -> None:
    image = {"driver": "raw", "file": {"driver": "file", "filename": str(folder / "disk.raw")}}
    port = free_port()
    line = ["--bind=127.0.0.1", f"--port={port}", "--fork", "--pid-file=tcp.pid"]
    done = start(OURS, *line, *ovirt(image, depth=False), folder=folder)
    assert (done.returncode, done.stdout) == (0, "")
    try:
        assert copied(f"nbd://127.0.0.1:{port}") == content("disk.raw", folder)
    finally:
        stop(int((folder / "tcp.pid").read_text()))


# virtnbdbackup -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bitmap", ["--bitmap=b0", "--"])
def test_virtnbdbackup_backup(bitmap: str, folder: Path) -> None:
    with peers.socket_path() as path:
        pid_file = Path(f"{path}.pid")
        line = ["-r", "--format=qcow2", "-x", "sda", "top.qcow2", "-k", str(path), "-t", "-e 2"]
        line += ["--fork", "--detect-zeroes=on", f"--pid-file={pid_file}", bitmap]
        done = start(OURS, *line, folder=folder)
        assert (done.returncode, done.stdout) == (0, "")
        pid = int(pid_file.read_text())
        try:
            uri = peers.unix_uri(path, "sda")
            assert copied(uri) == content("top.qcow2", folder)
            assert ("qemu:dirty-bitmap:b0" in contexts(uri)) == (bitmap != "--")
        finally:
            stop(pid)


def test_virtnbdbackup_remote_backup(folder: Path) -> None:
    """Without -t: it ends by itself when the backup is done."""
    port = free_port()
    line = ["-r", "--format=qcow2", "-x", "sda", "top.qcow2", "-p", str(port)]
    line += ["--pid-file", "remote.pid", "--fork", "-b", "127.0.0.1", "--bitmap=b0"]
    done = start(OURS, *line, folder=folder)
    assert (done.returncode, done.stdout) == (0, "")
    pid = int((folder / "remote.pid").read_text())
    try:
        assert copied(f"nbd://127.0.0.1:{port}/sda") == content("top.qcow2", folder)
        wait_until(lambda: not drop_in.alive(pid))
    finally:
        if drop_in.alive(pid):
            stop(pid)


@pytest.mark.parametrize("connections", ["1", "4"])
def test_virtnbdbackup_restore(connections: str, folder: Path, tmp_path: Path) -> None:
    """Into a new image, in the background, by a client that leaves when it is done."""
    target = tmp_path / "restored.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", target, "1M")
    with peers.socket_path() as path:
        pid_file = Path(f"{path}.pid")
        line = ["--discard=unmap", "--format=qcow2", "-x", "sda", str(target), "-k", str(path)]
        line += ["-e", connections, "--fork", f"--pid-file={pid_file}"]
        done = start(OURS, *line, folder=folder)
        assert (done.returncode, done.stdout) == (0, "")
        pid = int(pid_file.read_text())
        copy = ["nbdcopy", "--flush", f"--connections={connections}"]
        peers.run(*copy, folder / "disk.raw", peers.unix_uri(path, "sda"))
        wait_until(lambda: not drop_in.alive(pid))
    peers.run("qemu-img", "check", target)
    assert content(target, tmp_path) == content(folder / "disk.raw", tmp_path)


def test_virtnbdbackup_with_tls(folder: Path, tmp_path: Path) -> None:
    pki = Pki.make(tmp_path / "pki")
    port = free_port()
    line = ["-r", "--format=qcow2", "-x", "sda", "flat.qcow2", "-p", str(port), "-b", "127.0.0.1"]
    line += ["--pid-file", "tls.pid", "--fork", "--tls-creds", "tls0", "--object"]
    line += [f"tls-creds-x509,id=tls0,endpoint=server,dir={pki.server},verify-peer=false"]
    done = start(OURS, *line, folder=folder)
    assert (done.returncode, done.stdout) == (0, "")
    pid = int((folder / "tls.pid").read_text())
    try:
        uri = f"nbds://127.0.0.1:{port}/sda?tls-certificates={pki.anonymous}"
        assert copied(uri) == content("flat.qcow2", folder)
        wait_until(lambda: not drop_in.alive(pid))
    finally:
        if drop_in.alive(pid):
            stop(pid)


def test_virtnbdbackup_what_comes_later(folder: Path) -> None:
    line = f"--discard=unmap -x sda --image-opts {COMPRESSED}"
    with peers.socket_path() as path:
        args = [*line.split(), "-k", str(path), "--fork"]
        done = start(OURS, *args, folder=folder)
        assert not path.exists()
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert "'compress' is not supported" in done.stdout


# OpenNebula --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bitmap", [["-B", "b1"], []])
def test_opennebula(bitmap: list[str], folder: Path) -> None:
    with peers.socket_path() as path:
        line = ["-r", "-k", str(path), "-f", "qcow2", "-t", *bitmap, "top.qcow2"]
        with peers.listening([*drop_in.command(OURS, folder), *line], path) as process:
            uri = peers.unix_uri(path)
            assert copied(uri) == content("top.qcow2", folder)
            assert ("qemu:dirty-bitmap:b1" in contexts(uri)) == bool(bitmap)
            os.kill(process.pid, signal.SIGQUIT)
            assert process.wait(10) == 0
        assert not path.exists()


def test_opennebula_reads_a_bitmap_with_qemu_img(folder: Path) -> None:
    args = ["-t", "-r", "-f", "qcow2", "-B", "b0", "top.qcow2"]
    with drop_in.running(OURS, *args, folder=folder) as run:
        path = run.uri.partition("socket=")[2]
        options = (
            "driver=nbd,export=,server.type=unix,x-dirty-bitmap=qemu:dirty-bitmap:b0,"
            f"server.path={path}"
        )
        said = peers.run("qemu-img", "map", "--output=json", "--image-opts", options).stdout
        nbdinfo = ["nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", run.uri]
        extents = json.loads(peers.run(*nbdinfo).stdout)
    # qemu-img shows dirty ranges as those that are no data.
    dirty = {(row["start"], row["length"]) for row in json.loads(said) if not row["data"]}
    assert dirty == {(row["offset"], row["length"]) for row in extents if row["type"] == 1}


# libnbd ------------------------------------------------------------------------------------------


def test_nbdinfo_starts_it(folder: Path) -> None:
    line = ["[", *drop_in.command(OURS, folder), "-f", "qcow2", "top.qcow2", "]"]
    done = peers.run("nbdinfo", "--json", "--", *line)
    export = json.loads(done.stdout)["exports"][0]
    assert export["export-size"] == (8 << 20) + (32 << 10)
    assert not export["is_read_only"]
    assert done.stderr == ""


def test_nbdcopy_starts_it(folder: Path) -> None:
    line = ["--", "[", *drop_in.command(OURS, folder), "-r", "-f", "qcow2", "top.qcow2", "]"]
    assert copied(*line) == content("top.qcow2", folder)


@pytest.mark.parametrize("option", ["-B", "--list", "-A", "--tls-creds", "--handshake-limit"])
def test_the_help_names_what_scripts_look_for(option: str) -> None:
    assert option in drop_in.refused(OURS, "--help", folder=Path.cwd()).stdout


@pytest.mark.parametrize("option", ["-k/tmp/s", "-b127.0.0.1", "-p1", "-L", "-c/dev/nbd0"])
def test_activated_with_an_address(option: str, folder: Path) -> None:
    """qemu-nbd's rule: whoever brings the socket says where it listens."""
    line = [*drop_in.command(OURS, folder), option, *([] if option == "-L" else ["disk.raw"])]
    done = peers.run("nbdinfo", "--", "[", *line, "]", check=False)
    assert done.returncode != 0
    assert "not with socket activation (LISTEN_FDS)" in done.stderr
