"""The check of an image: its references are counted, and compared with its refcounts.

docs/interop/qcow2.rst, "Host cluster management". Verdict and counts are those of ``qemu-img
check``. The image is only read. What may take long is done in steps of a few milliseconds, between
which the loop has its turns; a cluster of the file takes 4 bytes of memory and its refcount's.
"""

from __future__ import annotations

import asyncio

import numpy as np

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.recorded import Recorded
from pynbd.block.qcow2.references import References
from pynbd.block.qcow2.report import Report
from pynbd.errors import ImageError

_CLUSTERS_PER_STEP = 1 << 16


async def check(file: HostFile, header: Header) -> Report:
    """Check the image in ``file`` that begins with ``header``. Nobody may write it meanwhile.

    Raises `ImageError` where it cannot be checked: the snapshot table or the bitmaps cannot be
    found, or there are too many clusters. ``OSError`` if it cannot be read.
    """
    report, _ = await examine(file, header)
    return report


async def examine(
    file: HostFile, header: Header, *, as_qemu: bool = True
) -> tuple[Report, References]:
    """As `check`, with the references and the refcounts that it was made from."""
    report = Report(total_clusters=-(-header.virtual_size >> header.cluster_bits))
    try:
        recorded = await Recorded.load(file, header)
        references = References(file, header, recorded, report, as_qemu=as_qemu)
        await references.count()
    except MemoryError:
        raise ImageError(f"{file.path}: it is too large to be checked in this memory") from None
    highest = 0
    for first in range(0, references.clusters, _CLUSTERS_PER_STEP):
        last = min(first + _CLUSTERS_PER_STEP, references.clusters)
        highest = _compare(first, last, references, report) or highest
        await asyncio.sleep(0)
    report.image_end_offset = (highest + 1) << header.cluster_bits
    return report, references


def _compare(first: int, last: int, references: References, report: Report) -> int:
    """Compare the refcounts of clusters [first, last) with their references; the highest one in
    use, 0 if there is none.
    """
    recorded = references.recorded
    references.tell_overflow(first, last)
    wanted = references.true_counts(first, last)
    there = recorded.counts[first:last]
    known = np.ones(last - first, np.bool_)
    for block in recorded.unknown.tolist():
        start, stop = (max(at * recorded.in_block - first, 0) for at in (block, block + 1))
        known[start:stop] = False
    unknown = int(np.count_nonzero(~known))
    if unknown:
        report.check_errors += unknown
        report.tell([f"the refcounts of {unknown} clusters from {first} on cannot be read"])
    low, high = known & (there < wanted), known & (there > wanted)
    for wrong, name in (low, "corruption"), (high, "leak"):
        rows = np.flatnonzero(wrong)
        report.tell(
            f"cluster {first + row}: the refcount is {there[row]}, with {wanted[row]} references:"
            f" a {name}"
            for row in rows.tolist()
        )
        if name == "leak":
            report.leaks += len(rows)
        else:
            report.corruptions += len(rows)
    used = np.flatnonzero(known & ((there != 0) | (wanted != 0)))
    return first + int(used[-1]) if len(used) else 0
