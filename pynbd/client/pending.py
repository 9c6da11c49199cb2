"""Pending: requests under way, which need no Task to be waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import Any

from pynbd.errors import ProtocolError, RequestError
from pynbd.protocol.transmission_client import Asked


class Pending:
    """Requests that are on their way. Await it once: it returns when all are answered, and raises
    what went wrong first.
    """

    __slots__ = ("_abandon", "_asked")

    def __init__(self, asked: Sequence[Asked], abandon: Callable[[Asked], None]) -> None:
        self._asked = asked
        self._abandon = abandon

    def __await__(self) -> Generator[Any, None, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        failure: Exception | None = None
        try:
            for asked in self._asked:
                try:
                    await asked.waiter
                except (RequestError, ProtocolError, OSError) as error:
                    failure = failure or error
        except asyncio.CancelledError:
            for asked in self._asked:
                self._abandon(asked)
            raise
        if failure:
            raise failure
