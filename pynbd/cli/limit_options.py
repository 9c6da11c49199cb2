"""Options that are fields of a dataclass of limits, and say what they are if nothing is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from pynbd.cli.numbers import in_bytes

F = TypeVar("F", bound=Callable[..., Any])

# Field, option, its metavar and type, what it says.
LimitOption = tuple[str, str, str, Callable[[Any], float], str]


def with_limits(command: F, rows: Sequence[LimitOption], usual: object) -> F:
    """``command`` with an option for each row; ``usual`` are the limits if nothing is said."""
    for field, option, metavar, kind, text in reversed(rows):
        default = getattr(usual, field)
        command = click.option(
            option,
            field,
            metavar=metavar,
            type=kind,
            default=in_bytes(default) if metavar == "SIZE" else default,
            show_default=True,
            help=text,
        )(command)
    return command
