"""fio writes at random, reads back and verifies each block's checksum, many requests in flight."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers
from interop.conftest import serving

SIZE = 16 << 20

JOBS = {
    "small blocks": "--rw=randrw --bs=4k --iodepth=16",
    "blocks of every size": "--rw=randrw --bsrange=512-256k --bs_unaligned --iodepth=32",
    # Each block is discarded, then written: fio must not have both in flight, as no order is kept.
    "with discards": "--rw=randtrimwrite --bs=16k --iodepth=8 --serialize_overlap=1",
}


FORMS = {
    "raw": "",
    "qcow2": "",
    "qcow2 small": "-o cluster_size=4k,refcount_bits=1",
    "qcow2 subclusters": "-o extended_l2=on,cluster_size=128k",
    "qcow2 lazy": "-o lazy_refcounts=on",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("job", JOBS)
def test_verify(job: str, form: str, tmp_path: Path) -> None:
    peers.require("fio", "qemu-img")
    driver = form.split()[0]
    image = tmp_path / f"a.{driver}"
    peers.run("qemu-img", "create", "-q", "-f", driver, *FORMS[form].split(), image, str(SIZE))
    with serving(image, "-f", driver) as uri:
        verify_all(uri, job)
    if driver == "qcow2":
        peers.run("qemu-img", "check", image)


def verify_all(uri: str, job: str) -> None:
    verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
    done = peers.fio(uri, f"--size={SIZE}", *verify, *JOBS[job].split())
    assert done["error"] == 0
    assert done["write"]["total_ios"] > 50
    assert done["read"]["total_ios"] > 50
