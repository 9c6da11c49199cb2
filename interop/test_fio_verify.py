"""fio writes at random, reads back and verifies each block's checksum, many requests in flight."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

SIZE = 16 << 20

JOBS = {
    "small blocks": "--rw=randrw --bs=4k --iodepth=16",
    "blocks of every size": "--rw=randrw --bsrange=512-256k --bs_unaligned --iodepth=32",
    # Each block is discarded, then written: fio must not have both in flight, as no order is kept.
    "with discards": "--rw=randtrimwrite --bs=16k --iodepth=8 --serialize_overlap=1",
}


@pytest.mark.parametrize("job", JOBS)
def test_verify(job: str, tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("fio")
    image = tmp_path / "a.raw"
    samples.empty_file(image, SIZE)
    uri = pynbd_serve(image, "-f", "raw")
    verify = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"]
    done = peers.fio(uri, f"--size={SIZE}", *verify, *JOBS[job].split())
    assert done["error"] == 0
    assert done["write"]["total_ios"] > 50
    assert done["read"]["total_ios"] > 50
