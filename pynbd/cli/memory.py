"""What the allocator of the C library keeps of the memory that a server has freed.

Answers to BLOCK_STATUS go through arrays of a megabyte. glibc gives each of them back to the kernel
(mallopt(3), M_MMAP_THRESHOLD), and the page faults of the next one cost more than all that is done
with it. From a larger block that was freed it learns to keep such blocks, and twice as much at the
end of its heap (M_TRIM_THRESHOLD). It is taught so, and not told by mallopt: then it would learn
nothing any more, and give back whatever is larger still each time.

Another C library learns nothing from it, at no cost. It is for programs of our own alone: who has a
server in his own program decides about its memory himself.
"""

from __future__ import annotations

_KEPT = 4 << 20


def keep_freed_blocks() -> None:
    """Let blocks of up to 4 MiB be used again. None of these is touched: they take no memory."""
    bytes(_KEPT)
