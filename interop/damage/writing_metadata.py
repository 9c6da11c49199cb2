"""What is known of a damaged image's metadata before it is written, and afterwards: how many
corruptions there are, and which of the guest's clusters nobody can take away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from interop.damage.guest import ranges
from interop.damage.writing_model import Offsets
from pynbd.block.chain import open_image
from pynbd.block.qcow2.check import examine
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.block.qcow2.references import References
from pynbd.errors import ImageError


@dataclass(frozen=True)
class Metadata:
    """``corruptions``: None if they cannot be counted, or there is nothing to be counted.
    ``flags``: those that are not among them: COPIED against a refcount. Where two entries name one
    cluster, and one of them gets its own, the flag of the other is missing, which costs a copy.
    ``uncounted``: there are references that no refcount counts, as to what is past the end of the
    file, or flags that contradict them, so that a cluster of somebody may be handed out, or given
    back: what no writer sees that does not count all references. ``end``: where the last cluster
    that has a refcount ends. ``alone``: the numbers of the guest clusters whose host cluster has
    one reference, and is counted.
    """

    corruptions: int | None = None
    flags: int = 0
    uncounted: bool = True
    cluster_size: int = 1
    end: int = 0
    alone: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def of_those_alone(self, offsets: Offsets) -> Offsets:
        """Those of some guest offsets."""
        return offsets[np.isin(offsets // self.cluster_size, self.alone)]


async def examined(path: Path) -> Metadata:
    """Of the image at ``path``, or of what is refused."""
    try:
        async with await open_image(path) as node:
            if not isinstance(node, Qcow2Node):
                return Metadata(uncounted=False)
            report, references = await examine(node.metadata_file, node.header)
            recorded = references.recorded.counts
            short = references.counts[: references.clusters] > recorded[: references.clusters]
            used = np.flatnonzero(recorded)
            return Metadata(
                report.corruptions - references.copied_wrong,
                references.copied_wrong,
                bool(
                    short.any()
                    or references.copied_wrong
                    or references.hidden
                    or report.check_errors
                ),
                node.header.cluster_size,
                (int(used[-1]) + 1) * node.header.cluster_size if len(used) else 0,
                await _alone(node, references),
            )
    except (ImageError, OSError):
        return Metadata()


async def _alone(node: Qcow2Node, references: References) -> npt.NDArray[np.int64]:
    bits = node.header.cluster_bits
    found: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for offset, length in ranges(node.size):
        for extent in await node.resolve(offset, offset + length):
            if extent.file is not node.metadata_file:
                continue
            guest = np.arange(extent.offset >> bits, (extent.end - 1 >> bits) + 1)
            host = guest + (extent.host - extent.offset >> bits)
            inside = host < references.clusters
            guest, host = guest[inside], host[inside]
            counted = (references.counts[host] == 1) & (references.recorded.counts[host] >= 1)
            found.append(guest[counted])
    return np.concatenate(found)
