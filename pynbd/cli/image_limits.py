"""The options that limit what an image may take; each is a field of `ImageLimits`. `pynbd serve`
has all, what looks at an image those that refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

from pynbd.block.limits import ImageLimits
from pynbd.cli.limit_options import LimitOption, with_limits
from pynbd.cli.numbers import size_in_bytes, whole_number

F = TypeVar("F", bound=Callable[..., Any])
_DEFAULTS = ImageLimits()

# Field, option, what it says. All but the first are bytes.
_Row = tuple[str, str, str]
_OPTIONS: Sequence[_Row] = (
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


# Those that refuse an image.
_REFUSING = _OPTIONS[:3]


def image_limit_options(command: F) -> F:
    """The options; their values come as the keyword arguments that `image_limits_of` takes away."""
    return with_limits(command, _rows(_OPTIONS), _DEFAULTS)


def image_limits_of(options: dict[str, Any]) -> ImageLimits:
    """The limits in ``options``, which has the rest left."""
    return _taken(options, _OPTIONS)


def refusing_limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those options that refuse an image, for who looks at one and is gone. Their values come as
    ``limits``, an `ImageLimits`, None if they are the usual ones.
    """

    @wraps(command)
    def limited(*args: Any, **options: Any) -> Any:
        limits = _taken(options, _REFUSING)
        return command(*args, limits=None if limits == _DEFAULTS else limits, **options)

    return with_limits(limited, _rows(_REFUSING), _DEFAULTS)


def option_of(limits: ImageLimits) -> str:
    """The first of the options that has made these limits other than the usual ones."""
    return next(
        option
        for field, option, _ in _OPTIONS
        if getattr(limits, field) != getattr(_DEFAULTS, field)
    )


def _rows(rows: Sequence[_Row]) -> list[LimitOption]:
    return [
        (field, option, "NUM", whole_number(1), text)
        if field == "layers"
        else (field, option, "SIZE", size_in_bytes, text)
        for field, option, text in rows
    ]


def _taken(options: dict[str, Any], rows: Sequence[_Row]) -> ImageLimits:
    return ImageLimits(**{field: options.pop(field) for field, *_ in rows})
