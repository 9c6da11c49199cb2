"""Sizes and tables for people."""

from __future__ import annotations

import pytest

from pynbd.cli.output import in_units, printable, table


@pytest.mark.parametrize(
    "count,shown",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (1 << 20, "1 MiB"),
        (999 << 20, "999 MiB"),
        (1000 << 20, "1000 MiB"),
        ((1 << 30) - (1 << 18), "1 GiB"),
        (10**12, "931 GiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_in_units(count: int, shown: str) -> None:
    assert in_units(count) == shown


def test_printable() -> None:
    assert printable("Platte é\x1b[31m\n\udcff") == "Platte é?[31m??"


def test_table() -> None:
    rows = [("NAME", "SIZE", ""), ("a", "1 KiB", "x"), ("longer", "", "")]
    assert table(rows) == "  NAME    SIZE\n  a       1 KiB  x\n  longer\n"
