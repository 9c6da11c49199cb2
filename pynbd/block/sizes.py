"""Sizes as QEMU's tools take them: a number of bytes, or one with a unit after it (pure)."""

from __future__ import annotations

import re
from fractions import Fraction

# No more digits than a size may have, and a few zeroes before and behind.
_SIZE = re.compile(r"\+?(0[xX][0-9a-fA-F]{1,99}|[0-9]{1,99}(?:\.[0-9]{1,99})?)([bBkKmMgGtTpPeE]?)")
_UNITS = "bkmgtpe"


# Lengths and offsets are signed, of 64 bits.
_TOO_LARGE = 1 << 63


def parse_size(text: str) -> int | None:
    """The bytes of ``1048576``, ``0x100000``, ``1M`` or ``0.5G``; a unit is a power of 1024.

    None for what is no size: there are no negative ones, none from 2^63 on, and no parts of bytes:
    1.5 is none, nor is 0.0001k. A part of a larger unit is rounded to whole bytes.
    """
    size = _bytes(text)
    return size if size is not None and size < _TOO_LARGE else None


def is_too_large(text: str) -> bool:
    """Whether ``text`` is no size only because there are none from 2^63 on."""
    size = _bytes(text)
    return size is not None and size >= _TOO_LARGE


def _bytes(text: str) -> int | None:
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    number, unit = match.groups()
    factor = 1 << 10 * max(_UNITS.find(unit.lower() or "b"), 0)
    exact = (int(number, 16) if number[1:2] in ("x", "X") else Fraction(number)) * factor
    if exact.denominator > 1 and (factor == 1 or exact < 1):
        return None
    return round(exact)
