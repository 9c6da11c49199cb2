"""Whose turn it is: what many have asked for, in an order that is fair to each of them.

A queue is fair to what waits in it. Who has asked for hundreds of things then lets everybody wait
for all of them; here everybody waits for one of each of the others.
"""

from __future__ import annotations

from collections import deque
from contextvars import ContextVar
from typing import Generic, TypeVar

T = TypeVar("T")

ASKING: ContextVar[object] = ContextVar("ASKING", default=None)
"""On whose behalf something is done: a connection, for a server. None is one of them, too."""


class Turns(Generic[T]):
    """Each in turn gives one of his things, in the order in which he has brought them."""

    def __init__(self) -> None:
        self._things: dict[object, deque[T]] = {}
        self._order: deque[object] = deque()  # who has any

    def add(self, who: object, thing: T) -> None:
        things = self._things.get(who)
        if things is None:
            self._things[who] = deque((thing,))
            self._order.append(who)
        else:
            things.append(thing)

    def next(self) -> T | None:
        """None: nobody has anything left."""
        if not self._order:
            return None
        who = self._order.popleft()
        things = self._things[who]
        thing = things.popleft()
        if things:
            self._order.append(who)
        else:
            del self._things[who]
        return thing
