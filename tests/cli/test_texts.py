"""Texts that clients see: 4096 bytes of UTF-8 ("String values" of the NBD specification)."""

from __future__ import annotations

import click
import pytest

from pynbd.cli.texts import export_text
from pynbd.errors import UsageError

OPTION = click.Option(["-x", "--export-name"])


def checked(text: str | None) -> str:
    return export_text(click.Context(click.Command("test")), OPTION, text)


@pytest.mark.parametrize("text", ["", "disk", "ä" * 2048, "a b/c"])
def test_taken(text: str) -> None:
    assert checked(text) == text


def test_not_given() -> None:
    assert checked(None) == ""


def test_too_long() -> None:
    with pytest.raises(UsageError, match=r"^--export-name: it has 4098 bytes; at most 4096"):
        checked("ä" * 2049)


def test_not_utf8() -> None:
    """As the interpreter gives arguments that are not."""
    with pytest.raises(UsageError, match=r"^--export-name: it has to be UTF-8$"):
        checked("\udcff")
