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
        ("0.1G", 107374182),
        ("1.0", 1),
        ("0.0", 0),
        ("2T", 2 << 40),
        ("2P", 2 << 50),
        ("7E", 7 << 60),
        ("", None),
        ("-1", None),
        ("0.5", None),
        ("0.5b", None),
        ("1.5", None),
        ("0.0001k", None),  # of which QEMU makes an empty disk
        ("8E", None),
        ("7.9999999999999999999999E", None),
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
