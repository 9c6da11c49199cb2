"""``@row("H1")``: the test answers for that row of docs/protocol-support.md.

`test_rows.py` finds these calls in the sources: the ids have to be written out where they stand.
"""

import pytest


def row(*ids: str) -> pytest.MarkDecorator:
    """Mark a test, or one of its parameters, with the ids of the rows that it tests."""
    return pytest.mark.row(*ids)
