"""Both event loops: every coroutine test runs on asyncio's own loop and on uvloop.

A test that needs only one of them says so: ``@pytest.mark.asyncio(loop_factories=["asyncio"])``.
Hypothesis has no deadline, because a shared machine keeps none; with ``CI=true`` it draws the same
examples every time.

``costs`` counts system calls and Tasks (`tests.server.counting`); nothing is ever timed.
"""

import asyncio
import os
from collections.abc import Callable, Mapping

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tests.server.counting import Costs

settings.register_profile(
    "pynbd",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pynbd")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Costs:
    return Costs(monkeypatch)
