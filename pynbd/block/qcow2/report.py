"""What a check of an image has found, in the terms of ``qemu-img check`` (pure)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

# Findings that are told; all are counted.
MAX_FINDINGS = 1000


@dataclass(slots=True)
class Report:
    """Counts, and what was found where, a line each.

    A leak is a cluster whose refcount is higher than the number of its references: space that is
    lost. A corruption is anything that contradicts the specification otherwise. A check error is
    a place that could not be looked at.
    """

    leaks: int = 0
    corruptions: int = 0
    check_errors: int = 0
    leaks_fixed: int = 0
    corruptions_fixed: int = 0
    image_end_offset: int = 0  # bytes: where the last cluster that is in use ends
    total_clusters: int = 0  # of the guest
    allocated_clusters: int = 0
    fragmented_clusters: int = 0  # that do not follow the one before them
    compressed_clusters: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.leaks or self.corruptions or self.check_errors)

    def tell(self, lines: Iterable[str]) -> None:
        """Add findings, as long as there is room; what generators have to say beyond is not even
        made.
        """
        self.findings += islice(lines, MAX_FINDINGS - len(self.findings))

    def corrupt(self, count: int, lines: Iterable[str]) -> None:
        """``count`` corruptions, of each of which a line tells."""
        self.corruptions += count
        self.tell(lines)
