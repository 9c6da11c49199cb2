"""``pynbd serve --trace`` tells what nbdsh and the server say to each other, in every dialect."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from interop import peers, samples

SCRIPT = """
{mode}
h.connect_systemd_socket_activation({line!r})
h.pread(100, 4096)
h.flush()
{more}
h.shutdown()
"""
SIMPLE = "h.set_request_structured_replies(False)"
STRUCTURED = "h.set_request_extended_headers(False)"
CONTEXTS = """
for context in "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0":
    h.add_meta_context(context)
"""
SIZES = "minimum 1 preferred 4096 maximum 33554432"
GO = [
    "> NBD_OPT_GO name '' infos [NBD_INFO_BLOCK_SIZE]",
    "< NBD_REP_INFO NBD_INFO_EXPORT option NBD_OPT_GO size 8421376 flags NBD_FLAG_HAS_FLAGS|...",
    f"< NBD_REP_INFO NBD_INFO_BLOCK_SIZE option NBD_OPT_GO {SIZES}",
    "< NBD_REP_ACK option NBD_OPT_GO",
]
GREETINGS = [
    "< NBDMAGIC IHAVEOPT NBD_FLAG_FIXED_NEWSTYLE|...",
    "> client flags NBD_FLAG_C_FIXED_NEWSTYLE|...",
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "nbdsh")
    return samples.chain(tmp_path_factory.mktemp("chain"))


def traced(image: Path, *args: str, mode: str = "", more: str = "") -> tuple[str, list[Any]]:
    """What pynbd writes to standard error while nbdsh runs, and what nbdsh prints."""
    line = [sys.executable, "-m", "pynbd", "serve", "--trace", *args, str(image)]
    said = peers.run("nbdsh", "-c", SCRIPT.format(mode=mode, line=line, more=more))
    return said.stderr, [json.loads(line) for line in said.stdout.splitlines()]


def messages(told: str) -> list[str]:
    """The messages of one connection, without time and connection, and long flags cut."""
    start = r"\d\d:\d\d:\d\d\.\d{6} a local client #1 (?=[<>] )"
    lines = [re.fullmatch(f"{start}(.*)", line) for line in told.splitlines()]
    assert all(lines), told
    return [re.sub(r"\|NBD_FLAG_\S*", "|...", line[1]) for line in lines if line]


def test_simple(image: Path) -> None:
    told, _ = traced(image, mode=SIMPLE)
    assert messages(told) == [
        *GREETINGS,
        *GO,
        "> NBD_CMD_READ cookie 0x1 offset 4096 length 100",
        "< simple reply cookie 0x1 length 100",
        "> NBD_CMD_FLUSH cookie 0x2 offset 0 length 0",
        "< simple reply cookie 0x2",
        "> NBD_CMD_DISC cookie 0x3 offset 0 length 0",
    ]


CHUNKS = """
h.set_strict_mode(0)
h.pread_structured(512, 4096, lambda *_: 0, nbd.CMD_FLAG_DF)
try:
    h.pread(1, 1 << 40)
except nbd.Error as error:
    assert error.errno == "EINVAL"
"""


def test_structured(image: Path) -> None:
    told = messages(traced(image, mode=STRUCTURED, more=CHUNKS)[0])
    assert told[2:4] == [
        "> NBD_OPT_STRUCTURED_REPLY",
        "< NBD_REP_ACK option NBD_OPT_STRUCTURED_REPLY",
    ]
    assert told[4:8] == GO
    # Whether the last chunk has data in it is the server's choice.
    lines = [line for line in told[8:-3] if "NBD_REPLY_TYPE_NONE" not in line]
    assert [line.replace(" NBD_REPLY_FLAG_DONE", "") for line in lines] == [
        "> NBD_CMD_READ cookie 0x1 offset 4096 length 100",
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x1 offset 4096 length 100",
        "> NBD_CMD_FLUSH cookie 0x2 offset 0 length 0",
        "> NBD_CMD_READ NBD_CMD_FLAG_DF cookie 0x3 offset 4096 length 512",
        "< NBD_REPLY_TYPE_OFFSET_DATA cookie 0x3 offset 4096 length 512",
    ]
    error = "< NBD_REPLY_TYPE_ERROR NBD_REPLY_FLAG_DONE cookie 0x4 error NBD_EINVAL text '"
    assert told[-3] == "> NBD_CMD_READ cookie 0x4 offset 1099511627776 length 1"
    assert told[-2].startswith(error)


STATES = {
    "base:allocation": ["data", "hole", "zero", "hole,zero"],
    "qemu:allocation-depth": ["depth 0", "depth 1", "depth 2", "depth 3"],
    "qemu:dirty-bitmap:b0": ["clean", "dirty"],
}
ASKING = """
import json
def heard(context, start, extents, error):
    print(json.dumps([context, extents]))
h.block_status_64(1 << 20, 0, heard)
h.block_status_filter(1 << 20, 1 << 20, ["qemu:dirty-bitmap:b0"], heard)
"""


def extents(answer: tuple[str, list[tuple[int, int]]]) -> str:
    """What libnbd has heard of a context, in the words of a trace."""
    context, pairs = answer
    shown = "; ".join(f"{length} {STATES[context][state]}" for length, state in pairs[:4])
    more = f" more {len(pairs) - 4}" if len(pairs) > 4 else ""
    return f"context {context!r} extents [{shown}]{more}"


def test_extended(image: Path) -> None:
    told, heard = traced(image, mode=CONTEXTS, more=ASKING)
    assert [context for context, _ in heard] == [*STATES, "qemu:dirty-bitmap:b0"]
    base, depth, bitmap, filtered = map(extents, heard)
    asked = "NBD_CMD_FLAG_PAYLOAD_LEN cookie 0x4 offset 1048576 length 12 effect 1048576"
    assert messages(told)[-7:] == [
        "> NBD_CMD_BLOCK_STATUS cookie 0x3 offset 0 length 1048576",
        f"< NBD_REPLY_TYPE_BLOCK_STATUS_EXT cookie 0x3 {base}",
        f"< NBD_REPLY_TYPE_BLOCK_STATUS_EXT cookie 0x3 {depth}",
        f"< NBD_REPLY_TYPE_BLOCK_STATUS_EXT NBD_REPLY_FLAG_DONE cookie 0x3 {bitmap}",
        f"> NBD_CMD_BLOCK_STATUS {asked} contexts ['qemu:dirty-bitmap:b0']",
        f"< NBD_REPLY_TYPE_BLOCK_STATUS_EXT NBD_REPLY_FLAG_DONE cookie 0x4 {filtered}",
        "> NBD_CMD_DISC cookie 0x5 offset 0 length 0",
    ]


def test_json(image: Path) -> None:
    text, _ = traced(image, mode=CONTEXTS, more=ASKING)
    told, heard = traced(image, "--log-format", "json", mode=CONTEXTS, more=ASKING)
    records = [json.loads(line) for line in told.splitlines()]
    assert [record["message"] for record in records] == [
        line.partition(" ")[2] for line in text.splitlines()
    ]
    for record in records:
        assert datetime.fromisoformat(record["time"]).tzinfo == UTC
        assert (record["level"], record["logger"]) == ("DEBUG", "pynbd.trace")
        assert record["connection"] == "a local client #1"
        assert record["direction"] in ("to server", "to client")
    _, pairs = heard[-1]
    assert [record["nbd"] for record in records][-2:] == [
        {
            "message": "NBD_REPLY_TYPE_BLOCK_STATUS_EXT",
            "flags": "NBD_REPLY_FLAG_DONE",
            "cookie": "0x4",
            "context": "qemu:dirty-bitmap:b0",
            "extents": [{"length": pairs[0][0], "state": ["clean", "dirty"][pairs[0][1]]}],
        },
        {"message": "NBD_CMD_DISC", "cookie": "0x5", "offset": 0, "length": 0},
    ]
