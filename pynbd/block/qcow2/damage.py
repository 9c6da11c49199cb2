"""What is told of damage that is met while an image is served: a line in the log, once for each
place.

A client may ask for a damaged cluster again and again, and an image may be damaged all over;
neither fills the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger("pynbd")

MAX_PLACES = 100


class DamageLog:
    """The damaged places of the image ``name`` that were told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._told: set[int] = set()

    def tell(self, guest_offset: int, problem: Callable[[], str]) -> None:
        """Log what ``problem`` says of the cluster at ``guest_offset``, if it is
        news."""
        if guest_offset in self._told or len(self._told) == MAX_PLACES:
            return
        self._told.add(guest_offset)
        log.error("%s: guest offset %#x: %s", self.name, guest_offset, problem())
        if len(self._told) == MAX_PLACES:
            log.error("%s: there may be more damage, which is not told", self.name)
