"""Numbers on the command line; what is refused is told what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable

import click

from pynbd.block.sizes import is_too_large, parse_size

_UNITS = {"m": 1 << 20, "k": 1 << 10}


def whole_number(low: int, high: int | None = None) -> Callable[[str | int], int]:
    """The type of an option: decimal, from ``low`` to ``high``, both allowed."""
    allowed = f"{low} to {high}" if high is not None else f"{low} or more"

    def convert(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise click.BadParameter(f"{value!r} is not a whole number, {allowed}")
        return number

    return convert


def seconds(value: str | float) -> float:
    """The type of an option: a finite time, 0 or more."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"{value!r} is not a number of seconds, 0 or more")
    return number


def power_of_two(low: int, high: int, *, or_none: bool = False) -> Callable[[str | int], int]:
    """The type of an option: so many bytes, from ``low`` to ``high``; with ``or_none``, or 0."""
    allowed = f"a power of two, {in_bytes(low)} to {in_bytes(high)}" + ", or 0" * or_none

    def convert(value: str | int) -> int:
        number = parse_size(str(value))
        if number is None or not (
            (low <= number <= high and number.bit_count() == 1) or (or_none and number == 0)
        ):
            raise click.BadParameter(f"{value!r} is not {allowed}")
        return number

    return convert


def in_bytes(number: int) -> str:
    """4096 as 4k: as `power_of_two` reads it."""
    for unit, factor in _UNITS.items():
        if number and number % factor == 0:
            return f"{number // factor}{unit}"
    return str(number)


def _size(low: int) -> Callable[[str | int], int]:
    """The type of an option: a size as QEMU's tools take it, ``low`` or more."""

    def convert(value: str | int) -> int:
        size = parse_size(str(value))
        if size is None and is_too_large(str(value)):
            raise click.BadParameter(
                f"{value!r} is too large: less than 8E, 2^63 bytes, is allowed"
            )
        if size is None or size < low:
            raise click.BadParameter(
                f"{value!r} is not a whole number of bytes, {low} or more; with k, M, G, T, P or E"
                " after it"
            )
        return size

    return convert


size_in_bytes = _size(0)
some_bytes = _size(1)


def counted(number: int, what: str) -> str:
    """1 error, 2 errors."""
    return f"{number} {what}{'s' * (number != 1)}"
