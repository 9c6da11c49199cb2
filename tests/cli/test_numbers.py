"""Numbers and sizes of options: what is one, and what is told of what is none."""

from __future__ import annotations

import click
import pytest

from pynbd.cli.numbers import in_bytes, power_of_two, size_in_bytes, some_bytes


@pytest.mark.parametrize(
    "said, meant",
    [("512", 512), ("4096", 4096), ("4k", 4096), ("64K", 65536), ("1M", 1 << 20), ("0", 0)],
)
def test_powers_of_two(said: str, meant: int) -> None:
    assert power_of_two(512, 1 << 20, or_none=True)(said) == meant


@pytest.mark.parametrize("said", ["", "-1", "256", "1000", "3k", "2M", "4 k", "4kb", "1e3"])
def test_what_is_none(said: str) -> None:
    with pytest.raises(click.BadParameter) as raised:
        power_of_two(512, 1 << 20, or_none=True)(said)
    assert raised.value.message == f"{said!r} is not a power of two, 512 to 1m, or 0"
    with pytest.raises(click.BadParameter, match=r"a power of two, 512 to 1m$"):
        power_of_two(512, 1 << 20)("0")


def test_sizes_are_printed_as_they_are_read() -> None:
    for size in 1 << 9, 1 << 12, 1 << 18, 1 << 25:
        assert power_of_two(512, 32 << 20)(in_bytes(size)) == size


def test_sizes() -> None:
    assert size_in_bytes("1.5G") == 3 << 29
    for said in "-1", "0.5":
        wanted = f"^'{said}' is not a whole number of bytes, 0 or more"
        with pytest.raises(click.BadParameter, match=wanted):
            size_in_bytes(said)
    assert size_in_bytes("0") == 0
    with pytest.raises(click.BadParameter, match=r"^'0' is not a whole number of bytes, 1 or more"):
        some_bytes("0")


@pytest.mark.parametrize("said", ["1000E", "8E", "9223372036854775808"])
def test_sizes_that_are_too_large(said: str) -> None:
    with pytest.raises(click.BadParameter, match=f"^'{said}' is too large: less than 8E"):
        size_in_bytes(said)
    assert size_in_bytes("9223372036854775807") == (1 << 63) - 1
