"""``FIRST,KEY=VALUE,...`` on a command line: QEMU's way to write an object, and ours a rule (pure).

Commas part; one in a value is doubled. What comes first may leave its key out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pynbd.errors import UsageError

_PIECES = re.compile(r"((?:[^,]|,,)*)(?:,|\Z)")


def parse_keyval(text: str, first: str, place: str) -> list[tuple[str, str]]:
    """Keys and values in their order; ``first`` is the key that may be left out. Raises
    `UsageError`, which begins with ``place`` and has nothing of ``text``: it may be a password.
    """
    pairs: list[tuple[str, str]] = []
    for piece in _PIECES.findall(text)[:-1]:  # the last is what is left at the end: nothing
        key, equals, value = piece.partition("=")
        if not pairs and not equals:
            key, value = first, piece
        elif not (key and equals):
            number = len(pairs) + 1
            raise UsageError(f"{place}: part {number}: KEY=VALUE is expected (a comma is doubled)")
        pairs.append((key, value.replace(",,", ",")))
    return pairs


def keyval(values: Mapping[str, str]) -> str:
    """What is parsed as ``values``, each with its key."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
