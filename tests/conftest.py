"""Both event loops: every coroutine test runs on asyncio's own loop and on uvloop.

A test that needs only one of them says so: ``@pytest.mark.asyncio(loop_factories=["asyncio"])``.
"""

import asyncio
from collections.abc import Callable, Mapping

import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
