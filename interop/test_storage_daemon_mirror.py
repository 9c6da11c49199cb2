"""Block jobs of qemu-storage-daemon, mirror and backup, with an export of pynbd at one end."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers, samples, storage_daemon
from interop.conftest import PynbdServe, serving

SIZE = (8 << 20) + (32 << 10)  # of `samples.chain`

# What is mirrored onto, and how qemu-img makes it.
TARGETS = {
    "raw": "",
    "qcow2": "",
    "qcow2 small": "-o cluster_size=4k,refcount_bits=1,lazy_refcounts=on",
    "qcow2 subclusters": "-o extended_l2=on,cluster_size=128k",
    "qcow2 overlay": "-b base.raw -F raw",
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_mirror_onto_an_export(target: str, mode: str, tmp_path: Path) -> None:
    """A qcow2 chain is mirrored while a client writes to it; then both have the same content."""
    peers.require("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdsh")
    driver = target.split()[0]
    top, image = samples.chain(tmp_path), tmp_path / f"target.{driver}"
    create = ["create", "-q", "-f", driver, *TARGETS[target].split()]
    peers.run("qemu-img", *create, image, str(SIZE), cwd=tmp_path)
    samples.qemu_io(image, f"write -q -P 0xee 0 {SIZE}", driver=driver)
    with serving(image, "-f", driver) as uri:
        mirror(top, uri, mode)
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", driver, top, image)
    if driver == "qcow2":
        peers.run("qemu-img", "check", image)
    late = ["read -q -P 0 5M 1M", "read -q -P 0x74 1001 1"]  # the third letter of "late"
    samples.qemu_io(image, *late, driver=driver)


def mirror(top: Path, uri: str, mode: str) -> None:
    """Mirror the image onto the export, and write to it before and after both are the same."""
    nodes = [
        f"driver=file,node-name=file,filename={top}",
        "driver=qcow2,node-name=source,file=file,discard=unmap",
        storage_daemon.nbd_client(uri, "target", "discard=unmap"),
    ]
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, *nodes, export="source") as (qmp, uri),
    ):
        job = {"job_id": "mirror", "sync": "full", "copy_mode": mode}
        qmp.execute("blockdev-mirror", device="source", target="target", **job)
        peers.nbdsh("h.pwrite(b'early' * 1000, 3 << 20)", uri)
        qmp.wait("BLOCK_JOB_READY", device="mirror")
        peers.nbdsh("h.pwrite(b'late' * 1000, 999); h.zero(1 << 20, 5 << 20); h.flush()", uri)
        qmp.execute("block-job-complete", device="mirror")
        done = qmp.wait("BLOCK_JOB_COMPLETED", device="mirror")
        assert "error" not in done


def test_backup_onto_a_raw_export(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """What a client writes meanwhile does not reach the backup."""
    peers.require("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdsh")
    top, image, before = samples.chain(tmp_path), tmp_path / "a.raw", tmp_path / "before"
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, before)
    samples.empty_file(image, SIZE)
    nodes = [
        f"driver=file,node-name=file,filename={top}",
        "driver=qcow2,node-name=source,file=file",
        storage_daemon.nbd_client(pynbd_serve(image, "-f", "raw"), "target"),
    ]
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, *nodes, export="source") as (qmp, uri),
    ):
        job = {"job_id": "backup", "sync": "full", "speed": 1 << 20}
        qmp.execute("blockdev-backup", device="source", target="target", **job)
        peers.nbdsh("h.pwrite(b'late' * 1000, 7 << 20)", uri)
        qmp.execute("block-job-set-speed", device="backup", speed=0)
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="backup")
    assert image.read_bytes() == before.read_bytes()


def test_pull_out_of_an_export(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """The source is pynbd's chain, the target a file of the daemon's."""
    peers.require("qemu-img", "qemu-io", "qemu-storage-daemon")
    top, copy = samples.chain(tmp_path), tmp_path / "copy.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", copy, str(SIZE))
    nodes = [
        storage_daemon.nbd_client(pynbd_serve(top, "-r"), "source", "read-only=on"),
        f"driver=qcow2,node-name=target,file.driver=file,file.filename={copy}",
    ]
    with (
        peers.socket_path() as path,
        storage_daemon.running(path.parent, *nodes, export="target") as (qmp, _),
    ):
        qmp.execute("blockdev-backup", job_id="pull", device="source", target="target", sync="full")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="pull")
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", top, copy)
    peers.run("qemu-img", "check", copy)
