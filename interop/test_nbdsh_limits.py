"""nbdsh, unleashed: what cannot be done gets the error of the specification, and life goes on.

The codes are those of "Error values"; qemu-nbd has EINVAL for nearly all, so it is no judge here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

SIZE = 33 << 20

SCRIPT = """
import json
{mode}
h.set_strict_mode(nbd.STRICT_AUTO_FLAG)
h.connect_uri({uri!r})
size, most = h.get_size(), h.get_block_size(nbd.SIZE_MAXIMUM)

def attempt(do):
    try:
        do(h)
    except nbd.Error as error:
        return error.errno
    finally:
        assert h.pread(4, 1) == b"text"
    return "done"

print(json.dumps([attempt(eval("lambda h: " + call)) for call in {calls!r}]))
"""

MODES = {
    "simple": "h.set_request_structured_replies(False)",
    "structured": "h.set_request_extended_headers(False)",
    "extended": "",
}

ANYWHERE = {
    "h.pread(512, size)": "EINVAL",
    "h.pread(512, size - 511)": "EINVAL",
    "h.pread(1, 2**63 - 1)": "EINVAL",
    "h.pread(1, 2**64 - 1)": "EINVAL",
    "h.pread(most + 1, 0)": "EINVAL",
    "h.pread(most, 0)": "done",
    "h.pread(1, size - 1)": "done",
    "h.pread(0, 0)": "done",
    "h.pread(4, 0, flags=nbd.CMD_FLAG_FUA)": "done",
    "h.pread(4, 0, flags=nbd.CMD_FLAG_NO_HOLE)": "EINVAL",
    "h.pread(4, 0, flags=nbd.CMD_FLAG_FAST_ZERO)": "EINVAL",
    "h.cache(size, 0)": "done",
    "h.cache(size, 1)": "EINVAL",
    "h.flush()": "done",
    "h.block_status(512, 0, lambda *rest: 0)": "EINVAL",  # no context was negotiated
}
WRITABLE = {
    "h.pwrite(b'x' * 512, size)": "ENOSPC",
    "h.pwrite(b'x' * 512, size - 511)": "ENOSPC",
    "h.pwrite(b'x', 2**64 - 1)": "ENOSPC",
    "h.pwrite(bytes(most), size)": "ENOSPC",
    "h.pwrite(bytes(most), 4096)": "done",
    "h.pwrite(b'', 0)": "done",
    "h.pwrite(b'x', 4096, flags=nbd.CMD_FLAG_NO_HOLE)": "EINVAL",
    "h.zero(512, size)": "ENOSPC",
    "h.zero(512, size - 511)": "ENOSPC",
    "h.zero(size - 4096, 4096)": "done",
    "h.zero(0, 0)": "done",
    "h.zero(512, 4096, flags=nbd.CMD_FLAG_REQ_ONE)": "EINVAL",
    "h.trim(512, size)": "EINVAL",
    "h.trim(size - 4096, 4096)": "done",
    "h.trim(512, 4096, flags=nbd.CMD_FLAG_FAST_ZERO)": "EINVAL",
}
READ_ONLY = {
    "h.pwrite(b'x' * 512, 0)": "EPERM",
    "h.pwrite(b'x' * 512, size)": "EPERM",
    "h.pwrite(bytes(most), 0)": "EPERM",
    "h.zero(512, 0)": "EPERM",
    "h.trim(512, 0)": "EPERM",
}


CASES = [(mode, WRITABLE) for mode in MODES] + [("extended", READ_ONLY)]


@pytest.mark.parametrize("mode, writes", CASES, ids=[*MODES, "read-only"])
def test_errors(mode: str, writes: dict[str, str], tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdsh")
    image, expected = tmp_path / "a.raw", ANYWHERE | writes
    samples.empty_file(image, SIZE)
    with image.open("r+b") as file:
        file.write(b" text")
    uri = pynbd_serve(image, "-f", "raw", *(["-r"] if writes is READ_ONLY else []))
    script = SCRIPT.format(mode=MODES[mode], uri=uri, calls=list(expected))
    said = json.loads(peers.nbdsh(script))
    assert dict(zip(expected, said, strict=True)) == expected
    assert image.read_bytes() == b" text".ljust(SIZE, b"\0")
