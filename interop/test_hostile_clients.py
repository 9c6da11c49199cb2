"""A small crowd of hostile clients and a polite one (libnbd); ``python -m interop.hostile`` is the
whole crowd.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from interop import peers
from interop.hostile.crowd import HOSTILE
from interop.hostile.runs import LIMITS, run
from pynbd.block.sizes import parse_size
from pynbd.server.shares import SHORT

TURNS = 2


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_polite_client_in_a_crowd(transport: str, tmp_path: Path) -> None:
    """It is served, and so are two that come later; memory is bounded; no descriptor is left; and
    the server ends while the crowd is there.
    """
    peers.require("nbdsh", "qemu-img")
    figures = asyncio.run(run(transport, tmp_path, 30, len(HOSTILE), TURNS, seed=1))
    assert figures.polite == 3 * TURNS
    assert set(figures.came) >= {kind.__name__ for kind in HOSTILE}
    # The limit, one request of the longest kind, a short one for each; and what no client is asked
    # for: tables, clusters, and the pieces that the allocator keeps.
    limit = parse_size(LIMITS["--max-memory"])
    assert limit
    held = limit + (32 << 20) + len(HOSTILE) * SHORT
    assert figures.memory_at_most - figures.memory_at_rest <= held + (128 << 20)
