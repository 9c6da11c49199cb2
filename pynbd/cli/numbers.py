"""Numbers on the command line; what is refused is told what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable

import click


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
