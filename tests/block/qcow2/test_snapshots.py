"""The snapshot table: golden bytes from the specification, damage, and tables by qemu-img."""

import json
import struct
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from interop import peers
from pynbd.block.qcow2 import header as headers
from pynbd.block.qcow2.header import Header
from pynbd.block.qcow2.snapshots import Snapshot, build, find, parse, table_length
from pynbd.errors import CorruptImage, UsageError

HEADER = Header(
    version=3,
    cluster_bits=16,
    size=(1 << 30) + 7,
    l1_size=3,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
    header_length=104,
    nb_snapshots=1,
    snapshots_offset=0x50000,
)


def entry(identity: bytes, name: bytes, extra: bytes = b"", l1: int = 0x60000) -> bytes:
    fields = (l1, 2, len(identity), len(name), 1_000_000_000, 5, 77, 99, len(extra))
    packed = struct.pack(">QIHHIIQII", *fields) + extra + identity + name
    return packed + bytes(-len(packed) % 8)


def test_an_entry_of_version_2() -> None:
    [snapshot] = parse(entry(b"1", b"name"), HEADER, name="x")
    assert snapshot == Snapshot(
        id="1",
        name="name",
        l1_table_offset=0x60000,
        l1_size=2,
        disk_size=1 << 30,  # the image's, in whole sectors
        vm_state_size=99,
        date=1_000_000_000 * 10**9 + 5,
        vm_clock=77,
        icount=None,
        extra=b"",
    )


@pytest.mark.parametrize(
    "extra, expected",
    [
        (struct.pack(">Q", 1 << 40), (1 << 40, 1 << 30, None)),
        (struct.pack(">QQ", 5, 4096), (5, 4096, None)),
        (struct.pack(">QQQ", 5, 4096, 8), (5, 4096, 8)),
        (struct.pack(">QQq", 5, 4096, -1), (5, 4096, None)),
        (struct.pack(">QQQ", 5, 4096, 8) + b"from the future", (5, 4096, 8)),
    ],
)
def test_extra_data(extra: bytes, expected: tuple[int, int, int | None]) -> None:
    [snapshot] = parse(entry(b"7", b"n", extra), HEADER, name="x")
    assert (snapshot.vm_state_size, snapshot.disk_size, snapshot.icount) == expected
    assert (snapshot.id, snapshot.name, snapshot.extra) == ("7", "n", extra)


def test_entries_follow_at_multiples_of_8() -> None:
    names = [b"", b"a", b"bc", b"\xff" * 7, b"12345678"]
    table = b"".join(entry(str(i).encode(), name, bytes(16)) for i, name in enumerate(names))
    found = parse(table + b"rest", replace(HEADER, nb_snapshots=len(names)), name="x")
    assert [snapshot.name.encode("utf-8", "surrogateescape") for snapshot in found] == names
    assert [snapshot.id for snapshot in found] == ["0", "1", "2", "3", "4"]


def test_a_table_cut_short() -> None:
    whole = entry(b"1", b"twelve bytes", bytes(16))
    meant = 40 + 16 + 1 + 12
    for length in range(meant):
        with pytest.raises(CorruptImage, match=r"x: snapshot table entry 0 at 0x50000: .* short"):
            parse(whole[:length], HEADER, name="x")
    assert parse(whole[:meant], HEADER, name="x")


def test_too_much_extra_data() -> None:
    parse(entry(b"1", b"n", bytes(1024)), HEADER, name="x")
    with pytest.raises(CorruptImage, match="extra_data_size is 1025"):
        parse(entry(b"1", b"n", bytes(1025)), HEADER, name="x")


def test_too_large_a_table() -> None:
    one = entry(b"i" * 65535, b"n" * 65535, bytes(1024))
    with pytest.raises(CorruptImage, match="exceeds 67108864 bytes"):
        parse(one * 600, replace(HEADER, nb_snapshots=600), name="x")


@pytest.mark.parametrize(
    "offset, size, words",
    [
        (0x60001, 2, "0x60001.* not aligned"),
        (0x60000, 4194305, "4194305 entries"),
        ((1 << 63) - 65536, 65536, "beyond 2"),
    ],
)
def test_a_bad_l1_table_spoils_only_its_snapshot(offset: int, size: int, words: str) -> None:
    [good] = parse(entry(b"1", b"n"), HEADER, name="x")
    good.check(HEADER, name="x")
    with pytest.raises(CorruptImage, match=f"x: the L1 table of the snapshot '1' .*{words}"):
        replace(good, l1_table_offset=offset, l1_size=size).check(HEADER, name="x")


@pytest.mark.parametrize("size", [(1 << 30) + 1, 1 << 62, (1 << 63) + 1024, (1 << 64) - 1])
def test_a_disk_that_its_l1_table_does_not_reach(size: int) -> None:
    """Two L1 entries with clusters of 64 KiB reach 2 x 8192 x 64 KiB = 1 GiB."""
    [whole] = parse(entry(b"1", b"n", struct.pack(">QQ", 0, 1 << 30)), HEADER, name="x")
    whole.check(HEADER, name="x")
    [snapshot] = parse(entry(b"1", b"n", struct.pack(">QQ", 0, size)), HEADER, name="x")
    with pytest.raises(CorruptImage, match=f"2 entries, too few for a disk of {size} bytes"):
        snapshot.check(HEADER, name="x")


class TestFind:
    table = tuple(
        parse(
            entry(b"1", b"2") + entry(b"2", b"first") + entry(b"3", b"first") + entry(b"4", b"a,b"),
            replace(HEADER, nb_snapshots=4),
            name="x",
        )
    )

    @pytest.mark.parametrize(
        "wanted, identity",
        [
            ("1", "1"),
            ("2", "2"),  # an ID before a name
            ("first", "2"),
            ("a,b", "4"),
            ("nobody", None),
            ("", None),
            ("snapshot.id=3", "3"),
            ("snapshot.name=2", "1"),
            ("snapshot.name=first,snapshot.id=3", "3"),
            ("snapshot.name=first,snapshot.id=1", None),
            ("snapshot.name=a,,b", "4"),
            ("snapshot.id=first", None),
        ],
    )
    def test_find(self, wanted: str, identity: str | None) -> None:
        found = find(self.table, wanted)
        assert (found and found.id) == identity

    @pytest.mark.parametrize("wanted", ["snapshot.", "snapshot.nam=x", "snapshot.id=1,b"])
    def test_unknown_keys(self, wanted: str) -> None:
        with pytest.raises(UsageError, match="choose by snapshot"):
            find(self.table, wanted)

    def test_a_key_is_refused_in_one_line(self) -> None:
        with pytest.raises(UsageError, match=r"^'snapshot\.x\\ny': choose by") as refused:
            find(self.table, "snapshot.x\ny=1")
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots_by_qemu_img(compat: str, tmp_path: Path) -> None:
    peers.require("qemu-img")
    image = tmp_path / "x.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", image, "64M")
    for name in ("one", "zwei ü", "one"):
        peers.run("qemu-img", "snapshot", "-c", name, image)
        if compat != "0.10":
            peers.run("qemu-img", "resize", "-q", image, "+64M")
    data = image.read_bytes()
    header = headers.parse(data, name="x", file_size=len(data))
    found = parse(data[header.snapshots_offset :], header, name="x")
    info = json.loads(peers.run("qemu-img", "info", "--output=json", image).stdout)
    for snapshot, said in zip(found, info["snapshots"], strict=True):
        snapshot.check(header, name="x")
        assert (snapshot.id, snapshot.name) == (said["id"], said["name"])
        assert snapshot.date == said["date-sec"] * 10**9 + said["date-nsec"]
        assert snapshot.vm_state_size == said["vm-state-size"]
    sizes = [64, 128, 192] if compat != "0.10" else [64, 64, 64]
    assert [snapshot.disk_size >> 20 for snapshot in found] == sizes


def test_a_date_with_too_many_nanoseconds_can_be_written_again() -> None:
    """A repair writes the table again: the most that the fields of a damaged one can say."""
    known = replace(HEADER, nb_snapshots=1)
    table = bytearray(entry(b"1", b"a"))
    table[16:24] = b"\xff" * 8
    (one,) = parse(bytes(table), known, name="x")
    (again,) = parse(build([one]), known, name="x")
    assert again.date == one.date == ((1 << 32) - 1) * (10**9 + 1)


def test_a_table_is_measured_in_few_calls() -> None:
    """There may be 65,535, and the loop waits."""
    found = parse(entry(b"1", b"name") * 100, replace(HEADER, nb_snapshots=100), name="x")
    calls = Counter[str]()
    sys.setprofile(lambda _frame, event, _arg: calls.update((event,)))
    try:
        length = table_length(found)
    finally:
        sys.setprofile(None)
    assert length == 100 * len(entry(b"1", b"name"))
    assert calls["call"] < 100 * 5
