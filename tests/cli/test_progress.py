"""The progress bar; on a real terminal see interop/test_copy_failures.py."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress

import pytest

from pynbd.cli.progress import progress_bar


def test_nobody_looks_on(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in None, False:
        with progress_bar(wanted, 100) as progress:
            progress(100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("total", [0, 1, 100, 1 << 40])
def test_it_ends_where_the_whole_is(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(True, total) as progress:
        progress(total // 3)
        progress(total - total // 3)
    said = capsys.readouterr()
    assert said.out == ""
    assert "100%" in said.err or total == 0


def test_an_error_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(KeyError), progress_bar(True, 100) as progress:
        progress(50)
        raise KeyError
    assert "50%" in capsys.readouterr().err


class Gone(io.StringIO):
    """A terminal that has been closed."""

    def write(self, _text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_cannot_be_shown_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    with progress_bar(True, 100) as progress:
        progress(100)


def test_nowhere_to_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(True, 100) as progress:
        progress(100)
