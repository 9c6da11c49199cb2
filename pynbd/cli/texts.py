"""Texts on the command line that clients of a server see; a refusal says what is allowed."""

from __future__ import annotations

import click

from pynbd.errors import UsageError
from pynbd.protocol.values import MAX_STRING


def export_text(_context: click.Context, parameter: click.Parameter, text: str | None) -> str:
    """The callback of an option whose text clients see: a name, a description."""
    text = text or ""
    option = max(parameter.opts, key=len)
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{option}: it has to be UTF-8") from None
    if length > MAX_STRING:
        raise UsageError(f"{option}: it has {length} bytes; at most {MAX_STRING} are allowed")
    return text
