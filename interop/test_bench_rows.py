"""The benchmark runs: every column is there. Nothing is asserted of who is the faster one."""

import json
import os
import socket
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from interop import peers
from interop.bench import __main__ as bench
from interop.bench import busy, jobs, report
from interop.bench.contest import Result, contest
from interop.bench.rows import ROWS, Row
from interop.bench.servers import NBDKIT, PYNBD, QEMU, Server, Way

SIZE = 16 << 20


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peers.require("qemu-img", "qemu-io", "qemu-nbd", "nbdkit", "nbdinfo", "fio")
    path = tmp_path_factory.mktemp("bench") / "a.qcow2"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    peers.run("qemu-io", "-f", "qcow2", "-c", f"write -q 0 {SIZE}", path)
    return path


@pytest.fixture(scope="module")
def results(image: Path) -> list[Result]:
    """Three tiny rows: of reads over TCP, of writes to a raw file, and one with a limit."""
    disk = image.with_suffix(".raw")
    disk.write_bytes(bytes(SIZE))
    read = jobs.steady("randread", "4k", 4, SIZE)
    write = jobs.steady("write", "1M", 2, SIZE)
    rows = [
        Row("read", lambda: image, Way(tcp=True), read),
        Row("write", lambda: disk, Way("raw"), write, 0.5),
        Row("memory", lambda: image, Way(read_only=True), jobs.memory(read), limit=1e6),
    ]
    return [contest(row, 2, 0.1) for row in rows]


def test_every_server_has_its_rounds(results: list[Result]) -> None:
    assert [{*result.rounds} for result in results] == [
        {PYNBD, *QEMU},
        {PYNBD, *QEMU, NBDKIT},
        {PYNBD, "limit"},
    ]
    for result in results:
        assert len(result.rounds[PYNBD]) == len(result.rounds[result.best]) == 2
        assert all(figure > 0 for figures in result.rounds.values() for figure in figures)


def test_one_of_the_two_ways_of_qemu_drops_out(results: list[Result]) -> None:
    assert [sum(name in QEMU for name in result.ratios) for result in results] == [1, 1, 0]


def test_every_column_is_filled(results: list[Result]) -> None:
    for result in results:
        assert len(report.cells(result)) == len(report.COLUMNS)
        assert all(report.cells(result))


def test_json_has_every_round_and_the_machine(results: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    report.write_json(path, results, {"rounds": 2})
    read = json.loads(path.read_text())
    assert [row["rounds"] for row in read["rows"]] == [result.rounds for result in results]
    assert read["machine"].keys() >= {"processor", "cores", "kernel", "python", "fio", "qemu-nbd"}


def test_markdown_replaces_the_table_and_nothing_else(
    results: list[Result], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_markdown(page, results, {"rounds": 2})
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(results)


def test_a_ratio_above_one_is_always_better() -> None:
    fast, slow = 2.0, 1.0
    assert jobs.startup().ratio(slow, fast) == jobs.crowded().ratio(fast, slow) == 2


def test_rows_are_told_apart_by_name() -> None:
    names = [row.name for row in ROWS]
    assert len({*names}) == len(names)


def test_many_connections(image: Path) -> None:
    row = Row("busy", lambda: image, Way(), jobs.crowded(40, SIZE), limit=1.0)
    assert contest(row, 1, 0.2).figure(PYNBD) > 0


def test_processor_time_is_that_of_the_process_to_the_nanosecond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Server, "processes", lambda server: [server.pid])  # other tests have some
    server = Server("", "", os.getpid(), 0.0, "")
    before, told, after = time.process_time(), server.cpu(), time.process_time()
    assert before <= told <= after


def test_a_reply_may_come_in_parts() -> None:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        ours.settimeout(20)
        theirs.send(b"one")
        later = threading.Timer(0.05, theirs.send, [b"two"])
        later.start()
        busy.receive(ours, 6)
        later.join()


def test_rows_before_one_that_fails_are_kept(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise AssertionError("no image")

    told = tmp_path / "bench.json"
    good = Row("good", lambda: image, Way(), jobs.startup(), limit=9.0)
    monkeypatch.setattr(bench, "ROWS", [good, Row("bad", fail, Way(), jobs.startup(), limit=9.0)])
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds=1", f"--json={told}"])
    with pytest.raises(AssertionError, match="no image"):
        bench.main()
    assert [row["row"] for row in json.loads(told.read_text())["rows"]] == ["good"]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--rounds", "0"], "--rounds is 1 or more"),
        (["--seconds", "0"], "--seconds more than 0"),
        (["--only", "nothing*"], "no row is called 'nothing*'"),
        (["--only", "raw*", "--markdown", "page"], "not with --quick or --only"),
        (["--quick", "--markdown", "page"], "not with --quick or --only"),
        (["--markdown", "/nonexistent/page"], "No such file or directory"),
        (["--markdown", "README.md"], "README.md has no place for the table"),
        (["--only", "raw*", "--json", "/nonexistent/x.json"], "No such file or directory"),
    ],
)
def test_what_cannot_be_measured(
    words: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit):
        bench.main()
    assert complaint in capsys.readouterr().err
