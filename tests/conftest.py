"""Both event loops: every coroutine test runs on asyncio's own loop and on uvloop.

A test that needs only one of them says so: ``@pytest.mark.asyncio(loop_factories=["asyncio"])``.
Hypothesis has no deadline, because a shared machine keeps none; with ``CI=true`` it draws the same
examples every time.
"""

import asyncio
import os
from collections.abc import Callable, Mapping

import uvloop
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pynbd",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pynbd")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
