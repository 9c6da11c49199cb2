"""Malformed stimuli: bytes that no correct client sends.

Each is listed once, in `stimuli_negotiation.py` or `stimuli_transmission.py`. The test of its row
takes it from there to see what is answered; `test_malformed.py` sends every one of them whole, one
byte at a time, and cut short at every byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Stimulus(NamedTuple):
    """``data`` is malformed; ``setup`` is what a correct client sends before it, after the
    greeting.
    """

    row: str
    name: str
    setup: bytes
    data: bytes

    def __str__(self) -> str:
        return f"{self.row}: {self.name}"


def of_row(stimuli: Iterable[Stimulus], *rows: str) -> list[Stimulus]:
    """The stimuli of these rows; there has to be one for each."""
    found = [stimulus for stimulus in stimuli if stimulus.row in rows]
    assert {stimulus.row for stimulus in found} == set(rows)
    return found
