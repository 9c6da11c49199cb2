"""Sizes with units; what is one, and what is none, is as qemu-img create has it."""

import pytest

from pynbd.block.sizes import parse_size


@pytest.mark.parametrize(
    "text, size",
    [
        ("0", 0),
        ("512", 512),
        ("0x200", 512),
        ("1b", 1),
        ("1k", 1 << 10),
        ("1K", 1 << 10),
        ("0.5M", 1 << 19),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("2P", 2 << 50),
        ("7E", 7 << 60),
        ("", None),
        ("-1", None),
        ("8E", None),
        ("100X", None),
        ("1 k", None),
        ("1kB", None),
        ("1e3", None),
        (".5M", None),
        ("9" * 400 + ".0", None),
        ("9" * 5000, None),
        ("0x" + "f" * 5000, None),
        ("\u0661", None),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    assert parse_size(text) == size
