"""The client's trace: the same messages as the server's, at the other end."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pynbd.client.connecting import connect
from pynbd.server.serving import serve


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """(direction, message) of all that was told."""
    traces = [record.trace for record in caplog.records if record.name == "pynbd.trace"]  # type: ignore[attr-defined]
    return [(trace["direction"], trace["nbd"]["message"]) for trace in traces]


async def session(path: Path) -> None:
    """One of each kind: what is written and read is longer than a socket takes at once."""
    async with (
        serve(path, format="raw") as server,
        connect(server.uri, contexts=["base:allocation"]) as client,
    ):
        await client.pwrite(0, bytes(8 << 20))
        await client.pread(0, 8 << 20)
        await client.block_status(0, 4096)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(16 << 20))
    return path


async def test_what_passes_is_told(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pynbd.trace")
    await session(disk)
    told = messages(caplog)
    for message in (
        ("to client", "NBDMAGIC IHAVEOPT"),
        ("to server", "NBD_OPT_GO"),
        ("to client", "NBD_REP_INFO NBD_INFO_EXPORT"),
        ("to server", "NBD_CMD_WRITE"),
        ("to server", "NBD_CMD_READ"),
        ("to client", "NBD_REPLY_TYPE_OFFSET_DATA"),
        ("to client", "NBD_REPLY_TYPE_BLOCK_STATUS_EXT"),
        ("to server", "NBD_CMD_DISC"),
    ):
        assert message in told
    assert not [each for each in told if "undecodable" in each[1]]


async def test_nothing_is_told_unasked(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pynbd.trace")
    await session(disk)
    assert not messages(caplog)
