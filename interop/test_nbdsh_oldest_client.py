"""Clients of long ago: EXPORT_NAME only, no handshake flags, simple replies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import PynbdServe

SCRIPT = """
import json
h.set_handshake_flags({flags})
h.connect_uri({uri!r})
content = open({content!r}, "rb").read()
for offset in (0, 100000, len(content) - 300):
    assert h.pread(300, offset) == content[offset : offset + 300]
h.pwrite(b"old" * 100, 4096)
h.flush()
assert h.pread(300, 4096) == b"old" * 100
print(json.dumps([h.get_protocol(), h.get_size(), h.get_structured_replies_negotiated()]))
h.shutdown()
"""


@pytest.mark.parametrize(
    "flags, protocol",
    [
        ("0", "newstyle"),
        ("nbd.HANDSHAKE_FLAG_NO_ZEROES", "newstyle"),
        # From here on it can ask for more than EXPORT_NAME, and does; but no padding is left out.
        ("nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE", "newstyle-fixed"),
    ],
)
def test_handshake_flags(
    flags: str, protocol: str, tmp_path: Path, pynbd_serve: PynbdServe
) -> None:
    peers.require("nbdsh")
    image = tmp_path / "a.raw"
    content = samples.sparse_file(image, (1 << 20) + 333)
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    uri = pynbd_serve(image, "-f", "raw", "-x", "an export")
    said = peers.nbdsh(SCRIPT.format(flags=flags, uri=uri, content=str(copy)))
    assert json.loads(said) == [protocol, len(content), protocol == "newstyle-fixed"]
    assert image.read_bytes() == content[:4096] + b"old" * 100 + content[4396:]


def test_export_name_that_is_not_there(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """NBD_OPT_EXPORT_NAME has no reply for an error: the server hangs up, and serves the next."""
    peers.require("nbdsh")
    image = tmp_path / "a.raw"
    samples.sparse_file(image, 1 << 20)
    uri = pynbd_serve(image, "-f", "raw", "-r", "-x", "here")
    script = f"""
h.set_handshake_flags(0)
try:
    h.connect_uri({uri.replace("here", "elsewhere")!r})
except nbd.Error as error:
    print(error.string)
"""
    assert "server disconnected" in peers.nbdsh(script)
    assert peers.nbdsh("print(h.get_size())", uri) == f"{1 << 20}\n"
