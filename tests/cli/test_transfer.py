"""Options that `copy` and `compare` share."""

from __future__ import annotations

import click
import pytest

from pynbd.cli.copy import copy
from pynbd.cli.numbers import in_bytes, power_of_two
from pynbd.client.ends import CONNECTIONS
from pynbd.client.workers import REQUEST_SIZE, REQUESTS


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


def test_defaults() -> None:
    defaults = copy.make_context("copy", ["a", "b"]).params
    told = {name: defaults[name] for name in ("connections", "requests", "request_size")}
    assert told == {
        "connections": CONNECTIONS,
        "requests": REQUESTS,
        "request_size": REQUEST_SIZE,
    }
