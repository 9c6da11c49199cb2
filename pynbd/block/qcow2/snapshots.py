"""The internal snapshot table (docs/interop/qcow2.rst, "Snapshots"; pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pynbd.block.qcow2.header import Header


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot. Sizes in bytes, ``date`` and ``vm_clock`` in nanoseconds."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int  # entries
    disk_size: int  # virtual disk size when it was taken
    vm_state_size: int
    date: int  # since the Epoch
    vm_clock: int
    icount: int | None
    extra: bytes  # as stored, known fields included


def parse(data: bytes, header: Header, *, name: str) -> list[Snapshot]:
    """The ``header.nb_snapshots`` snapshots in ``data``, which begins at ``header.snapshots_offset`` of image ``name``.

    ``data`` may be longer than the table, and need not be longer than MAX_SNAPSHOT_TABLE_BYTES. Raises `CorruptImage`.
    """
    raise NotImplementedError


def find(snapshots: Sequence[Snapshot], wanted: str) -> Snapshot | None:
    """The snapshot that qemu-nbd's -l means: "snapshot.id=ID", "snapshot.name=NAME" (or both, with a comma), else an ID
    or, if there is none like it, a name."""
    raise NotImplementedError
