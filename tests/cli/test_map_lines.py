"""The lines of a map; expected ones are what nbdinfo 1.22 of libnbd printed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pynbd.cli.map_lines import JsonMap, TextMap, Totals, description
from pynbd.cli.map_rows import Rows

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:b"


def rows(*status: list[int], edges: list[int]) -> Rows:
    return Rows(np.array(edges, np.int64), np.array(status, np.uint64))


ONE = rows([0, 3, 0], edges=[0, 65536, 131072, 262144])


@pytest.mark.parametrize(
    "context,status,words",
    [
        (BASE, 0, "data"),
        (BASE, 1, "hole"),
        (BASE, 2, "zero"),
        (BASE, 3, "hole,zero"),
        (BASE, 4, None),
        (BITMAP, 0, "clean"),
        (BITMAP, 1, "dirty"),
        (BITMAP, 2, None),
        (DEPTH, 0, "absent"),
        (DEPTH, 1, "local"),
        (DEPTH, 17, "backing depth 17"),
        ("x:y", 0, None),
    ],
)
def test_description(context: str, status: int, words: str | None) -> None:
    assert description(context, status) == words


def test_text() -> None:
    shape = TextMap([BASE], 262144)
    assert shape.head() + shape.lines(ONE) + shape.foot() == (
        "         0       65536    0  data\n"
        "     65536       65536    3  hole,zero\n"
        "    131072      131072    0  data\n"
    )


def test_text_of_an_unknown_context() -> None:
    assert TextMap(["x:y"], 262144).lines(rows([7], edges=[0, 512])) == (
        "         0         512    7\n"
    )


def test_json() -> None:
    shape = JsonMap([BASE])
    first, rest = ONE.split(1)
    assert shape.head() + shape.lines(first) + shape.lines(rest) + shape.foot() == (
        "[\n"
        '{ "offset": 0, "length": 65536, "type": 0, "description": "data"},\n'
        '{ "offset": 65536, "length": 65536, "type": 3, "description": "hole,zero"},\n'
        '{ "offset": 131072, "length": 131072, "type": 0, "description": "data"}\n'
        "]\n"
    )


def test_json_of_nothing() -> None:
    nothing = rows([], edges=[0])
    shape = JsonMap([BASE])
    assert shape.head() + shape.lines(nothing) + shape.foot() == "[\n\n]\n"
    assert Totals([BASE], 0).json() == "[]\n"
    assert Totals([BASE], 0).text() == ""


def totals(contexts: list[str], size: int, *pieces: Rows) -> Totals:
    sums = Totals(contexts, size)
    for piece in pieces:
        sums.add(piece)
    return sums


def test_totals() -> None:
    sums = totals(
        [BASE],
        67108864,
        rows([3, 0], edges=[0, 61014016, 61014016 + 6094847]),
        rows([0], edges=[67108863, 67108864]),
    )
    assert sums.text() == "   6094848   9.1%   0 data\n  61014016  90.9%   3 hole,zero\n"
    assert sums.json() == (
        "[\n"
        '{ "size": 6094848, "percent": 9.08203, "type": 0, "description": "data" },\n'
        '{ "size": 61014016, "percent": 90.918, "type": 3, "description": "hole,zero" }\n'
        "]\n"
    )


SIDE_BY_SIDE = rows([0, 0, 3], [1, 0, 0], edges=[0, 1024, 4096, 8192])


def test_a_table() -> None:
    shape = TextMap([BASE, BITMAP], 8192)
    assert shape.head() + shape.lines(SIDE_BY_SIDE) == (
        "    offset      length  base:allocation    qemu:dirty-bitmap:b\n"
        "         0        1024  data               dirty\n"
        "      1024        3072  data               clean\n"
        "      4096        4096  hole,zero          clean\n"
    )


def test_a_table_of_a_large_disk_stays_in_its_columns() -> None:
    shape = TextMap([BASE, BITMAP], 1 << 40)
    head, line = (shape.head() + shape.lines(rows([0], [0], edges=[0, 1 << 40]))).splitlines()
    assert line.index("data") == head.index(BASE)


def test_json_of_several_contexts() -> None:
    shape = JsonMap([BASE, "x:y"])
    said = json.loads(shape.head() + shape.lines(SIDE_BY_SIDE) + shape.foot())
    assert said[2] == {
        "offset": 4096,
        "length": 4096,
        BASE: {"type": 3, "description": "hole,zero"},
        "x:y": {"type": 0},
    }


def test_totals_of_several_contexts() -> None:
    sums = totals([BASE, BITMAP], 8192, SIDE_BY_SIDE)
    assert sums.text() == (
        "      size         base:allocation    qemu:dirty-bitmap:b\n"
        "      3072  37.5%  data               clean\n"
        "      1024  12.5%  data               dirty\n"
        "      4096  50.0%  hole,zero          clean\n"
    )
    assert [row["size"] for row in json.loads(sums.json())] == [3072, 1024, 4096]
