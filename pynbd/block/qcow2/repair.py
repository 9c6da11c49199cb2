"""The repair of an image: leaks are freed, refcounts and COPIED flags made true.

docs/interop/qcow2.rst, "Host cluster management". Rules:

1. References are the truth, refcounts follow them; guest data is never touched.
2. A repair that is interrupted leaves nothing worse: what is new goes to clusters behind the end of
   the file, and is on stable storage before something relies on it. Nothing is written over what
   somebody refers to.
3. Bits that no reader looks at are cleared where they have to be 0. What cannot be known is left as
   it is, and reported: data and tables that are not where an entry says, subclusters that are two
   things at once. While there may be references that were not found, no refcount is lowered.
4. The dirty and the corrupt bit are cleared last, and only if no corruption is left.
"""

from __future__ import annotations

import struct
from enum import StrEnum

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.check import examine
from pynbd.block.qcow2.format import HEADER_LENGTH_V2, Autoclear, Incompatible
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.mending import Mending, write_all
from pynbd.block.qcow2.rebuild import TrueRefcounts
from pynbd.block.qcow2.report import Report

# incompatible_features and autoclear_features, of version 3.
_INCOMPATIBLE_AT = HEADER_LENGTH_V2
_AUTOCLEAR_AT = HEADER_LENGTH_V2 + 16
_FEATURES = struct.Struct(">Q")

_NOT_CLEAN = Incompatible.DIRTY | Incompatible.CORRUPT


class Fix(StrEnum):
    """What a repair mends."""

    LEAKS = "leaks"  # refcounts that are too high; the rest if then only COPIED flags are wrong
    ALL = "all"


async def repair(file: HostFile, header: Header, *, fix: Fix) -> Report:
    """Repair the image in ``file``, open for writing, that begins with ``header``. Nobody else may
    use it meanwhile; its header is to be read again afterwards.

    The report tells what is left, and how much was fixed. Raises as `check` does, and ``OSError``
    if the image cannot be written: it is no worse then.
    """
    found, references = await examine(file, header)
    if found.clean and not header.incompatible & _NOT_CLEAN:
        return found
    everything = fix is Fix.ALL
    await _keep_features(file, _AUTOCLEAR_AT, header.autoclear, sum(Autoclear))
    left = found
    if everything and await Mending(file, header, references).entries():
        await file.flush()
        left, references = await examine(file, header)
    refcounts = TrueRefcounts(file, header, references)
    if everything and refcounts.have_no_place():
        header = await refcounts.rebuild()
        left, references = await examine(file, header)
    elif left.leaks or left.corruptions:
        await refcounts.write(raised=everything)
        left, references = await examine(file, header)
    only_flags = left.corruptions == references.copied_wrong and not left.leaks
    if references.copied_wrong and (everything or (only_flags and not left.check_errors)):
        await Mending(file, header, references).copied()
        await file.flush()
        left, references = await examine(file, header)
    if not left.corruptions and not left.check_errors:
        await _keep_features(file, _INCOMPATIBLE_AT, header.incompatible, ~_NOT_CLEAN)
    left.leaks_fixed = max(found.leaks - left.leaks, 0)
    left.corruptions_fixed = max(found.corruptions - left.corruptions, 0)
    return left


async def _keep_features(file: HostFile, offset: int, features: int, kept: int) -> None:
    """Of the ``features`` at ``offset`` of the header only those in ``kept``, and a flush."""
    if features & ~kept:
        await write_all(file, [(_FEATURES.pack(features & kept), offset)])
        await file.flush()
