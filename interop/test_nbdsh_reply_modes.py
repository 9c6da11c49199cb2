"""nbdsh reads through simple, structured and extended replies: the same bytes each way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import peers, samples
from interop.conftest import serving

SIMPLE = "h.set_request_structured_replies(False)"
STRUCTURED = "h.set_request_extended_headers(False)"
EXTENDED = ""
MODES = {"simple": SIMPLE, "structured": STRUCTURED, "extended": EXTENDED}

# Chunks have to cover a request exactly, without overlap ("Structured reply message").
SCRIPT = """
import json, random
{mode}
h.connect_uri({uri!r})
negotiated = [h.get_structured_replies_negotiated(), h.get_extended_headers_negotiated()]
content = open({content!r}, "rb").read()
assert h.get_size() == len(content)

def structured(length, offset, flags=0):
    "The bytes of a read, and how many chunks of data and of holes they came in."
    seen, counts = bytearray(length), [0, 0]
    def chunk(data, start, status, error):
        counts[status == nbd.READ_HOLE] += 1
        covered = slice(start - offset, start - offset + len(data))
        assert seen[covered] == bytes(len(data))
        seen[covered] = b"x" * len(data)
    data = h.pread_structured(length, offset, chunk, flags)
    assert seen == b"x" * length
    return data, counts

rng = random.Random(7)
for _ in range(300):
    offset = rng.randrange(len(content))
    length = rng.randrange(1, min(len(content) - offset, rng.choice([600, 1 << 17, 3 << 20])) + 1)
    expected = content[offset : offset + length]
    assert h.pread(length, offset) == expected
    data, counts = structured(length, offset)
    assert data == expected
    if h.can_df():
        data, counts = structured(length, offset, nbd.CMD_FLAG_DF)
        assert data == expected and counts == [1, 0]

# Many at once, answered in whatever order.
wanted = [(rng.randrange(len(content) - (1 << 16)), rng.randrange(1, 1 << 16)) for _ in range(200)]
buffers = [nbd.Buffer(length) for _, length in wanted]
cookies = [h.aio_pread(b, offset) for b, (offset, _) in zip(buffers, wanted)]
while h.aio_in_flight():
    h.poll(-1)
assert all(map(h.aio_command_completed, cookies))
for buffer, (offset, length) in zip(buffers, wanted):
    assert buffer.to_bytearray() == content[offset : offset + length]
print(json.dumps([*negotiated, h.can_df(), structured(len(content), 0)[1]]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, Path]]]:
    """URI and content of a chain, and of a raw image whose size is no multiple of anything."""
    peers.require("qemu-img", "qemu-io", "nbdsh")
    folder = tmp_path_factory.mktemp("served")
    raw, content = folder / "odd.raw", folder / "content"
    samples.sparse_file(raw, (5 << 20) + 777)
    top = samples.chain(folder)
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, content)
    with serving(top, "-r") as chain, serving(raw, "-r", "-f", "raw") as odd:
        yield {"qcow2": (chain, content), "raw": (odd, raw)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_reads(served: dict[str, tuple[str, Path]], kind: str, mode: str) -> None:
    uri, content = served[kind]
    script = SCRIPT.format(mode=MODES[mode], uri=uri, content=str(content))
    structured, extended, df, (data, holes) = json.loads(peers.nbdsh(script))
    assert (structured, extended) == (mode != "simple", mode == "extended")
    assert df == structured
    # Without structured replies libnbd makes up one chunk of data for each reply. Holes of a raw
    # file may be sent as data.
    assert (data > 1 and holes > 1) if structured and kind == "qcow2" else (data, holes) == (1, 0)
