"""Numbers and bytes out of an input, taken from its beginning: so that a seed can be written down.

(`atheris.FuzzedDataProvider` takes numbers from the end, and is not there on every machine.)
"""

from __future__ import annotations


class Taking:
    """What is left of an input. Past its end there are zeroes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def rest(self) -> bytes:
        return self.bytes(len(self._data))

    def number(self, width: int) -> int:
        """A number of ``width`` bytes, big-endian."""
        return int.from_bytes(self.bytes(width).ljust(width, b"\0"), "big")

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1, in one byte up to 256, else in as many as it needs."""
        return self.number((bound - 1).bit_length() + 7 >> 3 or 1) % bound

    def flag(self) -> bool:
        return bool(self.number(1) & 1)

    def bytes(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken
