"""How much memory an image may take that it asks for itself, and what the memory of one chain is
spent on.

An image of a few kilobytes may claim tables of gigabytes. So there is a bound for each thing that
grows with what an image says, and one for all layers of a chain together. What can be read again is
dropped when there is too much of it; what has to be there refuses the image.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from pynbd.errors import ImageError, UsageError

T = TypeVar("T")


def check_numbers(limits: Any, at_least_one: Container[str]) -> None:
    """Raise `UsageError` unless each field of a dataclass is a number as it is declared, 0 or more;
    1 or more for some.
    """
    for field in fields(limits):
        given, least = getattr(limits, field.name), int(field.name in at_least_one)
        kinds, what = (
            ((int, float), "a number") if field.type == "float" else ((int,), "a whole number")
        )
        if type(given) not in kinds or not least <= given < math.inf:
            raise UsageError(
                f"{type(limits).__name__}.{field.name}: {least} or more is expected, not {given!r}"
                f" ({what})"
            )


def limits_or_usual(kind: type[T], given: T | None, name: str) -> T:
    """What was given as the argument ``name``; the usual ``kind`` of limits if that is None. Raises
    `UsageError` for something else.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        found = type(given).__name__
        raise UsageError(f"{name}: pynbd.{kind.__name__} is expected, not {found}")
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """Limits of one chain; in bytes, but for ``layers``. Raises `UsageError`.

    ``layers``: 1 or more. ``metadata``: of what has to be in memory as long as an image is open: L1
    and refcount tables, snapshots, bitmaps without their bits. ``bitmap_bits``: of bits that have
    to be: those of all bitmaps that record, or of one that is read. With 0 an image that needs any
    is refused.

    The others are of what is kept to be found again: ``tables`` (L2), ``clusters`` (decompressed,
    and as much of compressed ones that wait), ``runs`` (what was looked up), ``bitmaps`` (bits);
    and ``changed_tables``: of tables that are written before there are more. With 0 each keeps one
    thing at a time.
    """

    layers: int = 200
    metadata: int = 128 << 20
    bitmap_bits: int = 128 << 20
    tables: int = 12 << 20
    clusters: int = 4 << 20
    runs: int = 24 << 20
    bitmaps: int = 64 << 20
    changed_tables: int = 12 << 20

    def __post_init__(self) -> None:
        check_numbers(self, at_least_one=("layers",))


class Keeper(Protocol):
    """Something that keeps what it can have again."""

    def __len__(self) -> int: ...

    def drop_oldest(self) -> int:
        """Drop what was used least recently, of one or more; its weight."""


class Budget:
    """What several keep, bounded in all. The one that has kept nothing new for longest drops first;
    what was kept last stays in any case.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._keepers: OrderedDict[Keeper, None] = OrderedDict()

    def keep(self, keeper: Keeper, weight: int) -> None:
        """``keeper`` has so much more, or less."""
        self.used += weight
        self._keepers[keeper] = None
        self._keepers.move_to_end(keeper)
        while self.used > self.limit:
            oldest = next(iter(self._keepers))
            if oldest is keeper and len(keeper) <= 1:
                return
            if len(oldest):
                self.used -= oldest.drop_oldest()
            else:
                del self._keepers[oldest]


class Waiting(Protocol):
    """Something that has more to read."""

    def read_more(self) -> None:
        """Read, as long as the `Backlog` has room."""


class Backlog:
    """Compressed bytes that wait for their turn, of all layers of a chain: as long as there are
    ``limit`` of them, none are read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = max(limit, 1)  # one at a time in any case
        self.held = 0  # bytes in memory, or soon
        self.waiting: dict[Waiting, None] = {}  # who would read more

    def go_on(self) -> None:
        """There may be room again: each reads more, in turn."""
        while self.waiting and self.held < self.limit:
            first = next(iter(self.waiting))
            del self.waiting[first]  # who wants still more is the last one now
            first.read_more()


class ChainMemory:
    """What the layers of one chain take together."""

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits
        self.tables = Budget(limits.tables)
        self.clusters = Budget(limits.clusters)
        self.bitmaps = Budget(limits.bitmaps)
        self.backlog = Backlog(limits.clusters)
        self._metadata = 0

    def take(self, length: int, what: str, path: str) -> None:
        """So much is needed for ``what`` of the image in ``path``. Raises `ImageError`."""
        before, most = self._metadata, self.limits.metadata
        if before + length > most:
            beside = f" beside {before} for others" if before else ""
            raise _needs_more(
                f"{path}: its {what}", length, beside, most, "--metadata-memory", "metadata"
            )
        self._metadata += length

    def check_bits(self, length: int, what: str, path: str) -> None:
        """``what`` needs so many bytes for bits of bitmaps. Raises `ImageError`."""
        most = self.limits.bitmap_bits
        if length > most:
            raise _needs_more(f"{path}: {what}", length, "", most, "--bitmap-memory", "bitmap_bits")


def _needs_more(
    what: str, length: int, beside: str, most: int, option: str, field: str
) -> ImageError:
    needed = f"{length} byte{'s' * (length != 1)} of memory{beside}"
    are = "is" if most == 1 else "are"
    return ImageError(
        f"{what} would need {needed}; {most} {are} allowed {raised_by(option, field)}"
    )


def raised_by(option: str, field: str) -> str:
    """What allows more, for who is at a command line, and who writes Python."""
    return f"({option} of pynbd, ImageLimits.{field} in Python)"
