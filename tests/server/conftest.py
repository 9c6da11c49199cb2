"""What the tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.session import WatchedEngine


@pytest.fixture
def engine() -> Iterator[WatchedEngine]:
    engine = WatchedEngine()
    yield engine
    engine.release()
    engine.close()
