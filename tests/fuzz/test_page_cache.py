"""What a target says does not depend on what the host has just thrown out of its page cache."""

from __future__ import annotations

import os

from tests.fuzz.stand import EXPORTS, stand
from tests.fuzz.targets import load


def test_connections_to_cold_files() -> None:
    target = load("protocol_connection")
    node = stand().export(EXPORTS - 1).node
    assert node.file is not None
    for seed in target.seeds():
        os.fsync(node.file.fd)
        os.posix_fadvise(node.file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        target.run(seed)
