"""Selection of metadata contexts, rows M3 to M18 and M29 to M30, and the filter, P1 to P9.

Expected values are those of `docs/interop/nbd.txt` of QEMU and of "Metadata querying" and
NBD_CMD_BLOCK_STATUS of the NBD specification.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pynbd.errors import RequestError
from pynbd.protocol.metadata import (
    decode_filter,
    encode_filter,
    list_contexts,
    longest_filter,
    select_contexts,
)
from pynbd.protocol.values import Error

h = bytes.fromhex
COLONS = "qemu:dirty-bitmap:a:b"
BYTES = "qemu:dirty-bitmap:\udcff"
LONG = "qemu:dirty-bitmap:" + "n" * 1023
BITMAPS = [COLONS, BYTES, LONG, "qemu:dirty-bitmap:é"]
CONTEXTS = ("base:allocation", "qemu:allocation-depth", *BITMAPS)


@pytest.mark.parametrize(
    "queries, expected",
    [
        ([], list(CONTEXTS)),  # M3
        (["base:"], ["base:allocation"]),  # M5
        (["qemu:"], ["qemu:allocation-depth", *BITMAPS]),  # M10
        (["qemu:dirty-bitmap:"], BITMAPS),  # M12
        (["qemu:", "base:", "qemu:"], list(CONTEXTS)),
        ([COLONS, "base:allocation", COLONS], ["base:allocation", COLONS]),  # M9, M29
        (["x-a:", "", "base", "qemu"], []),
    ],
)
def test_list(queries: list[str], expected: list[str]) -> None:
    assert list_contexts(CONTEXTS, queries) == expected


@pytest.mark.parametrize(
    "query, expected",
    [
        ("x-a:", ["x-a:one", "x-a:one:more"]),
        ("x-a:one", ["x-a:one"]),
        ("x-a:one:", []),
        ("x-b:", ["x-b:two"]),
        (":", []),
    ],
)
def test_list_of_namespaces_of_ones_own(query: str, expected: list[str]) -> None:
    """Each has the wildcard of the two that the specifications know."""
    contexts = ["base:allocation", "x-a:one", "x-a:one:more", "x-b:two"]
    assert list_contexts(contexts, [query]) == expected


@pytest.mark.parametrize(
    "queries, expected",
    [
        ([], {}),  # M4
        (["base:allocation"], {0: "base:allocation"}),  # M7
        (["base:allocation"] * 1000, {0: "base:allocation"}),  # M9, M30
        ([COLONS, "base:allocation"], {0: "base:allocation", 2: COLONS}),  # M29
        (BITMAPS, {2: COLONS, 3: BYTES, 4: LONG, 5: "qemu:dirty-bitmap:é"}),  # M16
        (["q" * 4097, "qemu:allocation-depth"], {1: "qemu:allocation-depth"}),  # M19
        ([LONG[:-1], LONG + "n"], {}),
    ],
)
def test_select(queries: list[str], expected: dict[int, str]) -> None:
    selected = select_contexts(CONTEXTS, queries)
    assert selected == expected
    assert list(selected) == sorted(selected)


@pytest.mark.parametrize(
    "query",
    [
        "base:",  # M6
        "qemu:",  # M11
        "qemu:dirty-bitmap:",  # M13
        "base:foo",  # M8
        "qemu:dirty-bitmap",  # M14
        "qemu:foo",
        "qemu:allocation-depth:",
        "qemu:dirty-bitmap:nosuch",  # M15
        "x-a:b",  # M17
        "BASE:ALLOCATION",
        "base",  # M18
        "",
    ],
)
def test_what_selects_nothing(query: str) -> None:
    assert select_contexts(CONTEXTS, [query]) == {}


@pytest.mark.parametrize("ids", [(0,), (2,), (0, 2), (2, 0), (2, 0, 5)])
def test_filter(ids: tuple[int, ...]) -> None:  # P1
    assert decode_filter(encode_filter(2**40, ids), {0, 2, 5}) == (2**40, ids)


def test_filter_bytes() -> None:
    data = h("0000000100000000 00000002 00000000")
    assert encode_filter(2**32, [2, 0]) == data
    assert decode_filter(memoryview(data), [0, 2]) == (2**32, (2, 0))
    assert decode_filter(bytearray(h("ffffffffffffffff ffffffff")), [2**32 - 1]) == (
        2**64 - 1,
        (2**32 - 1,),
    )


@pytest.mark.parametrize(
    "payload, reason",
    [
        (h("0000000000001000 00000000 00000000"), "twice"),  # P2
        (h("0000000000001000 00000009"), "context 9 was not negotiated"),  # P3
        (h("0000000000001000 ffffffff"), "context 4294967295 was not negotiated"),
        (h("0000000000001000"), "names no metadata context"),  # P4
        (b"", "0 bytes, not of 8"),  # P5
        (bytes(4), "4 bytes, not of 8"),
        (bytes(9), "9 bytes, not of 8"),
        (bytes(14), "14 bytes, not of 8"),
        (h("0000000000001000 00000000 00000001 00000002"), "more metadata contexts"),  # P6
        (bytes(2**20), "more metadata contexts"),  # P7
        (h("0000000000000000 00000000"), "effect length in the payload is 0"),  # P9
    ],
)
def test_invalid_filter(payload: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        decode_filter(payload, {0, 1})
    assert caught.value.error == Error.EINVAL


def test_no_filter_is_valid_where_nothing_was_negotiated() -> None:  # P14, P15
    with pytest.raises(RequestError) as caught:
        decode_filter(h("0000000000001000 00000000"), ())
    assert caught.value.error == Error.EINVAL


def test_longest_filter() -> None:
    assert longest_filter(()) == 8
    assert longest_filter({0, 2, 5}) == len(encode_filter(1, [5, 2, 0]))


@given(st.binary(max_size=24))
def test_garbage_is_refused_or_parsed(payload: bytes) -> None:
    try:
        length, ids = decode_filter(payload, range(3))
    except RequestError:
        return
    assert encode_filter(length, ids) == payload


@given(st.integers(1, 2**64 - 1), st.permutations(range(4)), st.integers(1, 4))
def test_round_trip(length: int, ids: list[int], count: int) -> None:
    payload = encode_filter(length, ids[:count])
    assert decode_filter(payload, range(4)) == (length, tuple(ids[:count]))
