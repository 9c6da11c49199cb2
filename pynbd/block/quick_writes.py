"""When a short write may be made in the event loop's own time, as a read of cached pages is.

A write into the page cache takes microseconds, a hop through the thread pool many times that. But
Linux has no write that refuses to wait (RWF_NOWAIT is for reads, where the file system does
buffered I/O), so whatever makes one wait has to be kept away from the loop beforehand:

1. Somebody holds the file: a flush, an fallocate, a long write (`HostFile` counts its own). Or
   somebody else is asked: a daemon, another host (`HostFile` looks what the file is on).
2. A page is written in part, and the rest of it has to be read first (`HostFile` looks).
3. There are so many dirty pages that the kernel slows writers down. It leaves everybody alone up to
   the middle between its two thresholds (``balance_dirty_pages`` in Linux): looked at now and then.
4. Anything else, which shows only when it has happened: after a write that was slow all go to the
   pool, for so long that the loop is held no more than a small part of the time.
"""

from __future__ import annotations

from pathlib import Path
from time import monotonic

# A write that took so long (seconds) was slow; then none is made in the loop for so many times as
# long. Time that another process had the processor counts as well, as nobody can tell.
SLOW = 0.004
PAUSE = 20
# While there are too many dirty pages (seconds).
PRESSED = 0.5
# The dirty pages are counted again after so many bytes.
COUNTED_EVERY = 8 << 20

_VMSTAT = Path("/proc/vmstat")
_COUNTED = (b"nr_dirty ", b"nr_writeback ")
_THRESHOLDS = (b"nr_dirty_threshold ", b"nr_dirty_background_threshold ")


class QuickWrites:
    """What an engine knows of how fast the host takes writes."""

    def __init__(self) -> None:
        self._not_before = 0.0
        self._uncounted = 0

    def allow(self, length: int) -> bool:
        """Whether ``length`` bytes may be written in the loop now."""
        if self._not_before and monotonic() < self._not_before:
            return False
        self._uncounted -= length
        if self._uncounted < 0:
            if not writers_run_free(_VMSTAT):
                self._not_before = monotonic() + PRESSED
                return False
            self._uncounted = COUNTED_EVERY
        return True

    def took(self, seconds: float) -> None:
        """One was made."""
        if seconds > SLOW:
            self._not_before = monotonic() + PAUSE * seconds


def writers_run_free(vmstat: Path) -> bool:
    """Whether the kernel slows down nobody who dirties pages. False where it does not say."""
    try:
        text = vmstat.read_bytes()
        dirty = sum(_value(text, name) for name in _COUNTED)
        return 2 * dirty < sum(_value(text, name) for name in _THRESHOLDS)
    except (OSError, ValueError):
        return False


def _value(text: bytes, name: bytes) -> int:
    start = text.index(b"\n" + name) + 1 + len(name)
    return int(text[start : text.index(b"\n", start)])
