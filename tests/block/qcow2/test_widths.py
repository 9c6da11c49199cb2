"""Table entries of every width."""

import pytest

from pynbd.block.qcow2.widths import decode, encode


# By hand: refcounts of less than a byte fill it from its least significant bit, wider ones are big
# endian.
@pytest.mark.parametrize(
    "bits, data, expected",
    [
        (1, b"\x05\x80", [1, 0, 1, 0, 0, 0, 0, 0] + [0] * 7 + [1]),
        (2, b"\x1b", [3, 2, 1, 0]),
        (4, b"\x21\x0f", [1, 2, 15, 0]),
        (8, b"\x01\xff", [1, 255]),
        (16, b"\x01\x02\x00\x01", [0x102, 1]),
        (32, b"\x01\x02\x03\x04", [0x1020304]),
        (64, b"\x01\x02\x03\x04\x05\x06\x07\x08", [0x102030405060708]),
    ],
)
def test_both_ways(bits: int, data: bytes, expected: list[int]) -> None:
    values = decode(data, bits)
    assert values.tolist() == expected
    assert encode(values, bits) == data
