"""What there is to know about an image: the keys and values of ``qemu-img info --output=json``
(`ImageInfo` of QEMU's qapi/block-core.json).

Ours alone is ``dirty-bytes`` of a bitmap. A raw image has its size to the byte; QEMU rounds it up
to whole sectors.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pynbd.block.bitmap import DirtyBitmap
from pynbd.block.engine import HostFile
from pynbd.block.node import BlockNode
from pynbd.block.qcow2 import bitmaps, snapshots
from pynbd.block.qcow2.bitmaps import BitmapEntry
from pynbd.block.qcow2.format import BitmapFlags, Compatible, Incompatible
from pynbd.block.qcow2.image import Qcow2Node
from pynbd.block.qcow2.snapshots import Snapshot
from pynbd.block.window import round_up

Info = dict[str, Any]

_FLAG_NAMES = {BitmapFlags.IN_USE: "in-use", BitmapFlags.AUTO: "auto"}
_RUNS_PER_STEP = 1 << 16
_NANOSECONDS = 10**9


async def image_info(node: BlockNode) -> Info:
    """All about one open image, without those below it. ``OSError`` if it cannot be read."""
    if isinstance(node, Qcow2Node):
        return await _qcow2_info(node)
    file = node.file
    assert file is not None
    return _common(node, file)


def _common(node: BlockNode, file: HostFile) -> Info:
    return {
        "filename": node.name,
        "format": node.format,
        "virtual-size": node.size,
        "actual-size": file.allocated_size(),
        "dirty-flag": False,
        "children": [{"name": "file", "info": _file_info(file)}],
    }


def _file_info(file: HostFile) -> Info:
    format_name = "host_device" if file.is_device else "file"
    return {
        "filename": file.path,
        "format": format_name,
        "virtual-size": round_up(file.size()),
        "actual-size": file.allocated_size(),
        "dirty-flag": False,
        "format-specific": {"type": "file", "data": {}},
        "children": [],
    }


async def _qcow2_info(node: Qcow2Node) -> Info:
    header, file = node.header, node.metadata_file
    info = _common(node, file)
    info |= {
        "cluster-size": header.cluster_size,
        "dirty-flag": Incompatible.DIRTY in header.incompatible,
        "format-specific": {"type": "qcow2", "data": await _specific(node)},
    }
    if known := await snapshots.load(file, header):
        info["snapshots"] = [_snapshot_info(snapshot) for snapshot in known]
    if header.backing_file is not None:
        info["backing-filename"] = header.backing_file
        info["full-backing-filename"] = _full_name(node.name, header.backing_file)
        if header.backing_format is not None:
            info["backing-filename-format"] = header.backing_format
    return info


def _full_name(image: str, backing_file: str) -> str:
    """A relative name is relative to the image that has it; "nbd:" and the like are not files."""
    if ":" in backing_file.partition("/")[0]:
        return backing_file
    return os.path.join(os.path.dirname(image), backing_file)


async def _specific(node: Qcow2Node) -> Info:
    """`ImageInfoSpecificQCow2`."""
    header = node.header
    data: Info = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": str(header.compression_type),
        "refcount-bits": header.refcount_bits,
    }
    if header.version == 2:
        return data
    data |= {
        "lazy-refcounts": Compatible.LAZY_REFCOUNTS in header.compatible,
        "corrupt": Incompatible.CORRUPT in header.incompatible,
        "extended-l2": header.extended_l2,
    }
    if header.has_data_file:
        data |= {"data-file": header.data_file, "data-file-raw": header.raw_data_file}
    if entries := await bitmaps.directory(node.metadata_file, header):
        usable = {bitmap.name: bitmap for bitmap in node.bitmaps()}
        data["bitmaps"] = [await _bitmap_info(entry, usable.get(entry.name)) for entry in entries]
    return data


async def _bitmap_info(entry: BitmapEntry, bitmap: DirtyBitmap | None) -> Info:
    flags = [name for flag, name in _FLAG_NAMES.items() if flag in entry.flags]
    info: Info = {"name": entry.name, "granularity": entry.granularity, "flags": flags}
    if bitmap is not None:
        info["dirty-bytes"] = await _dirty_bytes(bitmap)
    return info


async def _dirty_bytes(bitmap: DirtyBitmap) -> int:
    """Without keeping the bits: an image may have 65535 bitmaps."""
    offset = dirty = 0
    while offset < bitmap.size:
        runs = await bitmap.runs(offset, bitmap.size - offset, _RUNS_PER_STEP)
        dirty += int(np.diff(runs.ends, prepend=offset)[runs.dirty == 1].sum())
        offset = runs.end
    return dirty


def _snapshot_info(snapshot: Snapshot) -> Info:
    """`SnapshotInfo`."""
    info: Info = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date // _NANOSECONDS,
        "date-nsec": snapshot.date % _NANOSECONDS,
        "vm-clock-sec": snapshot.vm_clock // _NANOSECONDS,
        "vm-clock-nsec": snapshot.vm_clock % _NANOSECONDS,
    }
    if snapshot.icount is not None:
        info["icount"] = snapshot.icount
    return info
