"""Texts on the command line that clients of a server see."""

from __future__ import annotations

import click

from pynbd.protocol.strings import check_string


def export_text(_context: click.Context, parameter: click.Parameter, text: str | None) -> str:
    """The callback of an option whose text clients see: a name, a description."""
    text = text or ""
    check_string(max(parameter.opts, key=len), text)
    return text
