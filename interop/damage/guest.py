"""What a guest sees of a served image: read and mapped over a connection, whoever serves it.

A READ that fails is halved until a cluster fails alone; each part has to fail or to give the same
bytes as the whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from interop.damage.images import FIRST_BYTES
from tests.conformance.client import Cmd, Errno, Mode, Option, Peer

MiB = 1 << 20
_LONGEST = 32 * MiB
_FIRST = FIRST_BYTES  # of a disk as much is read; of what is beyond, some places
GRANULE = 512
_LARGEST_GRANULE = 4096
_MOST_LOST = 2048  # after so many clusters that are lost alone, longer ranges are not halved
_HOLE, _ZERO = 1, 2
_MOST_REPLIES = 200  # of BLOCK_STATUS, for each context
ALLOCATION = "base:allocation"


@dataclass
class Guest:
    """``pieces``: the bytes from each offset; ``lost``: ranges that are EIO; ``unmapped``: those
    whose status is.
    """

    size: int
    pieces: dict[int, bytes] = field(default_factory=dict)
    lost: list[tuple[int, int]] = field(default_factory=list)
    unmapped: list[tuple[int, int]] = field(default_factory=list)
    zeroes: list[tuple[int, int]] = field(default_factory=list)

    def bytes_at(self, offset: int, length: int) -> bytes | None:
        """What was read there, None unless all of it was read as one."""
        for start, data in self.pieces.items():
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return None

    def has_lost_end(self, offset: int, length: int) -> bool:
        """Whether the range reaches the end of what is lost. The beginning of a compressed cluster
        may be had, where its stream is damaged further on.
        """
        end = offset + length
        return any(offset < at + size <= end for at, size in self.lost)

    def is_lost(self, offset: int, length: int) -> bool:
        return any(at < offset + length and offset < at + size for at, size in self.lost)


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """The ranges that are read as wholes."""
    first = min(size, _FIRST)
    yield from ((at, min(_LONGEST, first - at)) for at in range(0, first, _LONGEST))
    last = max(first, size - 65536)
    for power in (32, 40, 48, 56):
        if first <= 1 << power < last - 65536:
            yield 1 << power, 65536
    if last < size:
        yield last, size - last


def granule_of(image: Path) -> int:
    """What is lost at a time, or a part of it: a cluster, if that is not larger than 4 KiB."""
    with image.open("rb") as file:
        bits = int.from_bytes(file.read(24)[20:24])
    return min(max(1 << min(bits, 21), GRANULE), _LARGEST_GRANULE)


def read(peer: Peer, size: int, granule: int) -> Guest:
    """All of a disk, or as much as is looked at of a large one."""
    guest = Guest(size)
    for offset, length in ranges(size):
        _read(peer, guest, offset, length, granule)
    guest.lost = _joined(guest.lost)
    return guest


def _read(peer: Peer, guest: Guest, offset: int, length: int, granule: int) -> bool:
    reply = peer.ask(Cmd.READ, offset, length)
    if not reply.error:
        guest.pieces[offset] = reply.data
        return True
    assert reply.error == Errno.EIO, f"READ of {length} at {offset:#x}: error {reply.error}"
    if len(guest.lost) == _MOST_LOST:
        return False
    if length <= granule:
        guest.lost.append((offset, length))
        return False
    half = -(-length // 2 // granule) * granule
    parts = [(offset, half), (offset + half, length - half)]
    done = [_read(peer, guest, at, size, granule) for at, size in parts]
    assert not all(done), f"READ of {length} at {offset:#x} fails, and of both its halves does not"
    return False


def _joined(found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(found):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = joined[-1][0], joined[-1][1] + length
        else:
            joined.append((offset, length))
    return joined


def check_pieces(peer: Peer, guest: Guest, rng: random.Random) -> None:
    """Other cuts of the same bytes, from one byte on: they are the same bytes, or lost."""
    if not guest.size:
        return
    edges = [edge for at, size in guest.lost[:4] for edge in (at, at + size)]
    edges += [0, guest.size, *(rng.randrange(1, 8) * 4096 for _ in range(3)), 600 * 4096]
    for edge in edges:
        for before, length in (0, 1), (1, 2), (511, 1024), (rng.randrange(9000), 9000):
            offset = max(edge - before, 0)
            length = min(length, guest.size - offset)
            if length > 0:
                _check_piece(peer, guest, offset, length)


def _check_piece(peer: Peer, guest: Guest, offset: int, length: int) -> None:
    reply = peer.ask(Cmd.READ, offset, length)
    where = f"READ of {length} at {offset:#x}"
    if reply.error:
        assert reply.error == Errno.EIO, f"{where}: error {reply.error}"
        known = guest.bytes_at(offset, length)
        assert known is None, f"{where} fails, and as part of a longer one it does not"
    else:
        assert not guest.has_lost_end(offset, length), f"{where} succeeds, and its end failed"
        known = guest.bytes_at(offset, length)
        assert known in (None, reply.data), f"{where} gives other bytes than a longer one"


def map_all(peer: Peer, guest: Guest, ids: dict[str, int], granule: int) -> None:
    """The status of all contexts, from the beginning to the end of the ranges that are read."""
    for offset, length in ranges(guest.size):
        _map(peer, guest, ids, offset, length, granule)
    guest.unmapped = _joined(guest.unmapped)


def _map(
    peer: Peer, guest: Guest, ids: dict[str, int], offset: int, length: int, granule: int
) -> None:
    end = offset + length
    for _ in range(_MOST_REPLIES):
        reply = peer.ask(Cmd.BLOCK_STATUS, offset, end - offset)
        if reply.error:
            assert reply.error == Errno.EIO, f"BLOCK_STATUS at {offset:#x}: error {reply.error}"
            if len(guest.unmapped) == _MOST_LOST:
                return
            if end - offset <= granule:
                guest.unmapped.append((offset, end - offset))
                return
            half = -(-(end - offset) // 2 // granule) * granule
            _map(peer, guest, ids, offset, half, granule)
            _map(peer, guest, ids, offset + half, end - offset - half, granule)
            return
        assert sorted(reply.status) == sorted(ids.values())
        reached = end
        for name, number in ids.items():
            at = offset
            for extent in reply.status[number]:
                assert extent.length > 0
                if name == ALLOCATION:
                    assert extent.flags & ~(_HOLE | _ZERO) == 0
                    if extent.flags & _ZERO:
                        guest.zeroes.append((at, min(extent.length, end - at)))
                at += extent.length
            assert at <= end, f"{name}: the status of {offset:#x} to {end:#x} goes on to {at:#x}"
            reached = min(reached, at)
        offset = reached
        if offset == end:
            return


def check_unharmed(guest: Guest, expected: bytes, harmed: range) -> None:
    """What is not ``harmed`` is there, and as ``expected``."""
    for start, end in (0, harmed.start), (harmed.stop, len(expected)):
        for at in range(start, min(end, len(expected)), 1 << 20):
            length = min(1 << 20, end - at, len(expected) - at)
            there = _put_together(guest, at, length)
            assert there == expected[at : at + length], (
                f"damage of {harmed} harms what is between {at:#x} and {at + length:#x}"
            )


def _put_together(guest: Guest, offset: int, length: int) -> bytes:
    """What was read of a range; 0xfd where nothing was."""
    found = bytearray(b"\xfd" * length)
    for start, data in guest.pieces.items():
        first, last = max(start, offset), min(start + len(data), offset + length)
        if first < last:
            found[first - offset : last - offset] = data[first - start : last - start]
    return bytes(found)


def check_map(guest: Guest) -> None:
    """What is said to be zeroes reads as zeroes, and what has no status cannot be read."""
    for offset, length in guest.zeroes:
        assert not guest.is_lost(offset, length), (
            f"{length} bytes at {offset:#x} are said to be zeroes, and some cannot be read"
        )
        for start, data in guest.pieces.items():
            first, last = max(offset - start, 0), min(offset + length - start, len(data))
            zeroes = data.count(0, first, last) if first < last else 0
            assert zeroes == max(last - first, 0), (
                f"{length} bytes at {offset:#x} are said to be zeroes, and are not"
            )


def contexts(peer: Peer) -> list[str]:
    return list(peer.meta(Option.LIST_META_CONTEXT))


def negotiated(peer: Peer, mode: Mode, only: Sequence[str] = ()) -> tuple[int, dict[str, int]]:
    """Come to transmission with all contexts, or ``only`` those; the size, and their ids."""
    peer.greet()
    peer.headers(mode)
    ids: dict[str, int] = {}
    if mode is not Mode.SIMPLE:
        names = list(only) or contexts(peer)
        ids = peer.meta(Option.SET_META_CONTEXT, "", names)
        assert sorted(ids) == sorted(names)
    return peer.info(Option.GO).size, ids
