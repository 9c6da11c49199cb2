"""The same damaged image served by pynbd and by qemu-nbd, both read-only: the bytes that both give
are the same, and where only one of them gives any, that has a name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pynbd
from interop import peers
from interop.damage import guest
from interop.damage.generator import Case
from interop.damage.guest import Guest
from interop.damage.reading import Household
from pynbd.errors import ImageError
from tests.conformance.client import Disconnected, Mode, Peer


class Verdict(Enum):
    """What pynbd does, held against QEMU."""

    ALIKE = "alike"
    REFUSED = "refused here alone"
    SERVED = "served here alone"
    FEWER = "fewer bytes here"
    MORE = "more bytes here"
    FEWER_AND_MORE = "fewer and more bytes here"
    OTHER_SIZE = "another size"
    OTHER = "other bytes"


@dataclass(frozen=True)
class Compared:
    case: Case
    verdict: Verdict
    said: str


def compared(cases: Iterable[Case]) -> Iterator[Compared]:
    """One after the other. qemu-nbd is told that the image is qcow2."""
    household = Household()
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="pynbd-damage-") as name:
            folder = Path(name)
            (folder / "images").mkdir()
            path = case.place(folder / "images")
            yield Compared(case, *_verdict(household, path, folder / "socket"))


def _verdict(household: Household, path: Path, socket: Path) -> tuple[Verdict, str]:
    said = ""
    ours: Guest | None = None
    try:
        with household.serving(pynbd.serve(path, format="qcow2", read_only=True, socket=socket)):
            ours = seen(socket, path)
    except ImageError as error:
        said = str(error).replace(str(path), "IMAGE")
    theirs = None
    with _qemu_nbd(path) as their_socket, suppress(Disconnected, TimeoutError):
        # It listens before it refuses; and what is no file may keep it waiting.
        if their_socket:
            theirs = seen(their_socket, path)
    if ours is None or theirs is None:
        if ours is theirs:
            return Verdict.ALIKE, said
        return (Verdict.REFUSED if ours is None else Verdict.SERVED), said
    if ours.size != theirs.size:
        return Verdict.OTHER_SIZE, f"{ours.size} here, {theirs.size} there"
    return _bytes(ours, theirs)


def seen(socket: Path, image: Path) -> Guest:
    """By simple replies, after whose errors everybody's connections live."""
    with Peer(socket) as peer:
        size, _ = guest.negotiated(peer, Mode.SIMPLE)
        return guest.read(peer, size, guest.granule_of(image))


@contextmanager
def _qemu_nbd(path: Path) -> Iterator[Path | None]:
    """The socket; None if it refuses the image."""
    with peers.socket_path() as socket:
        # It looks for data files from where it works.
        program = ["env", "-C", str(path.parent), *peers.command("qemu-nbd")]
        line = [*program, "-r", "-t", "-e", "0", "-f", "qcow2", "-k", str(socket), path.name]
        try:
            serving = peers.listening(line, socket)
            serving.__enter__()
        except AssertionError:
            yield None
            return
        try:
            yield socket
        finally:
            serving.__exit__(None, None, None)


def _bytes(ours: Guest, theirs: Guest) -> tuple[Verdict, str]:
    fewer = more = ""
    for offset, length in guest.ranges(ours.size):
        for at in range(offset, offset + length, guest.GRANULE):
            size = min(guest.GRANULE, offset + length - at)
            here, there = ours.bytes_at(at, size), theirs.bytes_at(at, size)
            if here == there:
                continue
            if here is None:
                fewer = fewer or f"not here: {at:#x}"
            elif there is None:
                more = more or f"not there: {at:#x}"
            else:
                return Verdict.OTHER, f"other bytes at {at:#x}"
    if fewer and more:
        return Verdict.FEWER_AND_MORE, f"{fewer}; {more}"
    if fewer or more:
        return (Verdict.FEWER if fewer else Verdict.MORE), fewer or more
    return Verdict.ALIKE, ""
