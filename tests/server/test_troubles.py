"""TroubleLog: each kind of failure once for each place, and never too many lines."""

from __future__ import annotations

import time

import pytest

from pynbd.server.troubles import MAX_LINES, PLACE, TroubleLog


def test_once_for_each_kind_and_place(caplog: pytest.LogCaptureFixture) -> None:
    troubles = TroubleLog()
    for _ in range(500):
        troubles.tell("100%s: one", ("read", 5), 4096)
        troubles.tell("near", ("read", 5), 8192)
        troubles.tell("two", ("write", 5), 4096)
        troubles.tell("three", ("read", 5), PLACE)
    assert [record.getMessage() for record in caplog.records] == ["100%s: one", "two", "three"]


def test_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    """An export that fails everywhere has its lines, and one that says so."""
    troubles = TroubleLog()
    for place in range(10 * MAX_LINES):
        troubles.tell(f"place {place}", "read", place * PLACE)
    said = [record.getMessage() for record in caplog.records]
    assert said[:-1] == [f"place {place}" for place in range(MAX_LINES)]
    assert "not told" in said[-1]


def test_it_is_news_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    troubles = TroubleLog(period=0.05)
    for _ in range(2):
        troubles.tell("full", "write", 0)
        troubles.tell("full", "write", 0)
        time.sleep(0.06)
    assert [record.getMessage() for record in caplog.records] == ["full", "full"]
