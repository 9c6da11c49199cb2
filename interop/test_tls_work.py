"""Real work through TLS with pynbd as the server: whole disks copied, compared, mapped, mirrored
and verified, by clients that show certificates.
"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest

from interop import peers, samples, storage_daemon, tls_ends
from interop.certificates import Pki
from interop.tls_ends import PYNBD, Credentials, Server

SIZE = 16 << 20
NODE = {"driver": "nbd", "node-name": "target", "tls-creds": "tls0", "tls-hostname": "localhost"}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def ours(pki: Pki) -> Credentials:
    return Credentials(certificates=pki.client("alice"))


@pytest.fixture(scope="module")
def theirs(pki: Pki) -> Credentials:
    return Credentials(certificates=pki.server)


def qemu(server: Server, ours: Credentials, more: str = "") -> tuple[list[str], str]:
    """What qemu-img wants to know of the client, and of the server."""
    return ours.qemu("client"), server.where.blockdev(ours, "localhost") + more


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "nbdinfo")
    return samples.chain(tmp_path_factory.mktemp("chain"))


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_reading_a_chain(
    tcp: bool, chain: Path, ours: Credentials, theirs: Credentials, tmp_path: Path
) -> None:
    """The same bytes, maps and dirty bitmaps as qemu-img finds in the files."""
    copy, flat = tmp_path / "copy.qcow2", tmp_path / "flat"
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", chain, flat)
    with tls_ends.serving(PYNBD, chain, theirs, "-r", tcp=tcp, form="qcow2") as server:
        objects, disk = qemu(server, ours)
        peers.run("qemu-img", "convert", *objects, "-O", "qcow2", "--image-opts", disk, copy)
        peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, flat)
        there = ["--image-opts", disk, f"driver=raw,file.driver=file,file.filename={flat}"]
        peers.run("qemu-img", "compare", *objects, *there)
        for name in ("b0", "b1"):
            bitmap = f"{disk},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
            line = ["map", *objects, "--output=json", "--image-opts", bitmap]
            rows = json.loads(peers.run("qemu-img", *line).stdout)
            dirty = sum(row["length"] for row in rows if not row["data"])
            with peers.qemu_nbd(chain, "-r", "-f", "qcow2", "-B", name) as uri:
                path = uri.partition("socket=")[2]
                clear = f"driver=nbd,server.type=unix,server.path={path}"
                clear += f",x-dirty-bitmap=qemu:dirty-bitmap:{name}"
                line = ["map", "--output=json", "--image-opts", clear]
                assert rows == json.loads(peers.run("qemu-img", *line).stdout)
            assert dirty
        mapped = peers.run("nbdinfo", "--map", server.where.uri(ours)).stdout
    with peers.qemu_nbd(chain, "-r", "-f", "qcow2") as uri:
        assert mapped == peers.run("nbdinfo", "--map", uri).stdout


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_nbdcopy_with_four_connections(
    form: str, ours: Credentials, theirs: Credentials, tmp_path: Path
) -> None:
    peers.require("nbdcopy", "qemu-img")
    source, image, back = (tmp_path / name for name in ("source", "image", "back"))
    samples.sparse_file(source, SIZE)
    peers.run("qemu-img", "create", "-q", "-f", form, image, str(SIZE))
    with tls_ends.serving(PYNBD, image, theirs, form=form) as server:
        uri = server.where.uri(ours)
        peers.run("nbdcopy", "--connections=4", "--flush", source, uri)
        peers.run("nbdcopy", "--connections=4", uri, back)
    assert filecmp.cmp(source, back, shallow=False)
    peers.run("qemu-img", "compare", "-f", "raw", "-F", form, source, image)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_fio_verifies(form: str, pki: Pki, tmp_path: Path) -> None:
    """Its client cannot be told where certificates are."""
    theirs, ours = Credentials(certificates=pki.server, verify=False), Credentials(verify=False)
    peers.require("fio", "qemu-img")
    image = tmp_path / "image"
    peers.run("qemu-img", "create", "-q", "-f", form, image, str(SIZE))
    with tls_ends.serving(PYNBD, image, theirs, form=form) as server:
        job = "--rw=randrw --bsrange=512-256k --bs_unaligned --iodepth=16 --randseed=1"
        verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
        done = peers.fio(server.where.uri(ours), f"--size={SIZE}", *verify, *job.split())
    assert done["error"] == 0
    assert done["read"]["total_ios"] > 50
    if form == "qcow2":
        peers.run("qemu-img", "check", image)


def test_the_storage_daemon_mirrors(ours: Credentials, theirs: Credentials, tmp_path: Path) -> None:
    """A chain is mirrored onto an export while a client writes to it; then both are the same."""
    peers.require("qemu-storage-daemon", "qemu-img", "qemu-io", "nbdsh")
    top, image = samples.chain(tmp_path), tmp_path / "target.qcow2"
    size = json.loads(peers.run("qemu-img", "info", "--output=json", top).stdout)["virtual-size"]
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    nodes = [
        f"driver=file,node-name=file,filename={top}",
        "driver=qcow2,node-name=source,file=file,discard=unmap",
    ]
    with (
        tls_ends.serving(PYNBD, image, theirs, form="qcow2") as server,
        peers.socket_path() as path,
        storage_daemon.running(path.parent, *nodes, export="source") as (qmp, uri),
    ):
        credentials = {"qom_type": "tls-creds-x509", "id": "tls0", "endpoint": "client"}
        qmp.execute("object-add", **credentials, dir=str(ours.certificates))
        where = {"type": "unix", "path": str(server.where.path)}
        qmp.execute("blockdev-add", **NODE, server=where)
        qmp.execute("blockdev-mirror", device="source", target="target", sync="full", job_id="m")
        peers.nbdsh("h.pwrite(b'early' * 1000, 3 << 20)", uri)
        qmp.wait("BLOCK_JOB_READY", device="m")
        peers.nbdsh("h.pwrite(b'late' * 1000, 999); h.flush()", uri)
        qmp.execute("block-job-complete", device="m")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="m")
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", top, image)
    peers.run("qemu-img", "check", image)
