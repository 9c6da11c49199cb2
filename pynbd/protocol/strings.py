"""What a string of the protocol may be ("String values" in the NBD specification)."""

from __future__ import annotations

from pynbd.errors import UsageError
from pynbd.protocol.values import MAX_STRING


def check_string(what: str, text: str) -> None:
    """Raise `UsageError` unless clients can be told a text. ``what`` it is begins the line."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what}: it has to be UTF-8") from None
    if length > MAX_STRING:
        raise UsageError(f"{what}: it has {length} bytes; at most {MAX_STRING} are allowed")
    if "\0" in text:
        raise UsageError(f"{what}: it has a NUL")
