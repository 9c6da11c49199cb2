"""The event loops that there are, the better one first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

Run = Callable[..., Any]
"""Runs a coroutine in a loop of its own; what it returns."""

LOOPS: dict[str, Run] = {}
try:
    import uvloop
except ImportError:
    pass  # asyncio's own loop does, more slowly
else:
    LOOPS["uvloop"] = uvloop.run
LOOPS["asyncio"] = asyncio.run

FASTEST = next(iter(LOOPS))
