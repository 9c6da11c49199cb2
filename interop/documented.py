"""The programs of a page of documentation: ``python`` blocks that begin with ``# NAME.py``."""

from __future__ import annotations

from pathlib import Path

from interop import terminal

LIBRARY = Path(__file__).parents[1] / "docs" / "library.md"


def programs(document: Path = LIBRARY) -> dict[str, str]:
    """The text of each, by its name."""
    return {
        text.partition("\n")[0].removeprefix("# "): text
        for _, text in terminal.blocks(document, "python")
    }
