"""The options of `pynbd serve` that limit what an image may take; each is a field of
`ImageLimits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from pynbd.block.limits import ImageLimits
from pynbd.cli.numbers import in_bytes, size_in_bytes, whole_number

F = TypeVar("F", bound=Callable[..., Any])
_DEFAULTS = ImageLimits()

# Field, option, what it says. All but the first are bytes.
_OPTIONS: Iterable[tuple[str, str, str]] = (
    ("layers", "--max-layers", "Images in one chain; with more it is refused."),
    (
        "metadata",
        "--metadata-memory",
        "Memory for tables, snapshots and bitmaps of a chain; one that needs more is refused.",
    ),
    (
        "bitmap_bits",
        "--bitmap-memory",
        "Memory for the bits of a bitmap, and of all that record; with more it is refused.",
    ),
    ("tables", "--table-cache", "L2 tables of a chain that are kept."),
    (
        "clusters",
        "--cluster-cache",
        "Decompressed clusters of a chain that are kept, and compressed ones that wait.",
    ),
    ("runs", "--run-cache", "Where data was found in a chain, kept to be found faster next time."),
    ("bitmaps", "--bitmap-cache", "Bits of bitmaps of a chain that are kept."),
    ("changed_tables", "--changed-tables", "Changed tables that wait for being written."),
)


def image_limit_options(command: F) -> F:
    """The options; their values come as the keyword arguments that `image_limits_of` takes away."""
    for field, option, text in reversed(list(_OPTIONS)):
        default = getattr(_DEFAULTS, field)
        number = field == "layers"
        command = click.option(
            option,
            field,
            metavar="NUM" if number else "SIZE",
            type=whole_number(1) if number else size_in_bytes,
            default=default if number else in_bytes(default),
            show_default=True,
            help=text,
        )(command)
    return command


def image_limits_of(options: dict[str, Any]) -> ImageLimits:
    """The limits in ``options``, which has the rest left."""
    return ImageLimits(**{field: options.pop(field) for field, *_ in _OPTIONS})
