"""The repair of an image: leaks are freed, refcounts and COPIED flags made true.

docs/interop/qcow2.rst, "Host cluster management". Rules:

1. References are the truth, refcounts follow them; guest data is never touched.
2. A repair that is interrupted leaves nothing worse: what is new goes to clusters behind the end of
   the file, and is on stable storage before something relies on it. Nothing is written over what
   somebody refers to.
3. Bits that no reader looks at are cleared where they have to be 0. What cannot be known is left as
   it is, and reported: data and tables that are not where an entry says, subclusters that are two
   things at once; refcounts that need a new place, if a table goes on where that would be, or is
   where the header would name it. While there may be references that were not found, no refcount is
   lowered.
4. The dirty and the corrupt bit are cleared last, and only if no corruption is left.
"""

from __future__ import annotations

from enum import StrEnum

from pynbd.block.engine import HostFile
from pynbd.block.qcow2.check import examine
from pynbd.block.qcow2.format import Autoclear, Incompatible
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.header_fields import HeaderFields
from pynbd.block.qcow2.mending import Mending
from pynbd.block.qcow2.rebuild import TrueRefcounts
from pynbd.block.qcow2.report import Report

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
    fields = HeaderFields(file, header)
    known = Autoclear(header.autoclear & sum(Autoclear))
    if header.autoclear != known:
        await fields.set_autoclear(known)
        await file.flush()
    left = found
    if everything and references.nameless:
        # Whom the header refers to when it is taken for a table is nobody's concern.
        _, references = await examine(file, header, as_qemu=False)
    if everything and await Mending(file, header, references).entries():
        await file.flush()
        left, references = await examine(file, header)
    refcounts = TrueRefcounts(file, header, references)
    no_place = await file.engine.run(refcounts.have_no_place)
    if everything and (references.incomplete or no_place) and refcounts.can_be_placed():
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
    if header.incompatible & _NOT_CLEAN and not (left.corruptions or left.check_errors):
        await fields.set_incompatible(_NOT_CLEAN, on=False)
        await file.flush()
    left.leaks_fixed = max(found.leaks - left.leaks, 0)
    left.corruptions_fixed = max(found.corruptions - left.corruptions, 0)
    return left
