"""What groff makes of a text is that text, whatever is in it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pynbd.cli.pages import Page, Section
from pynbd.cli.roff import escape, man_page

printable = st.characters(min_codepoint=0x20, max_codepoint=0x24F, exclude_categories=["C", "Z"])
words = st.lists(st.text(printable, min_size=1, max_size=12), min_size=1, max_size=5)


def formatted(page: str) -> list[str]:
    """The lines that groff prints, which must have no complaint."""
    if not shutil.which("groff"):
        pytest.skip("groff is missing")
    line = ["groff", "-man", "-Tutf8", "-ww", "-rLL=200n", "-P-cbou"]
    done = subprocess.run(line, input=page, capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == ""
    return [line.strip() for line in done.stdout.splitlines()]


def a_page(text: str = "Do it.", *lines: str) -> Page:
    options = (("-k, --socket PATH", text), ("--progress / --no-progress", "Whether."))
    sections = (Section("Examples", "", lines), Section("Exit status", "as elsewhere", ("0  ok",)))
    usage = "[OPTIONS] IMAGE|URI"
    return Page("pynbd a-thing", usage, (text, "More. Of it."), options, sections, ())


@pytest.mark.parametrize(
    "text",
    [
        ".TH is a request",
        "'so is this",
        r"\fBnot bold\fR \n[x] \(rs \\",
        "--log-format=a-b ^up ~/home `tick` 'single' \"double\"",
        "é, €, → and 😀",
        "a \\",
    ],
)
def test_texts(text: str) -> None:
    lines = formatted(man_page(a_page(text, text), "1", []))
    assert lines.count(text) == 3  # the description, an option, the examples


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(words, min_size=20, max_size=20))
def test_any_text(texts: list[list[str]]) -> None:
    expected = [" ".join(words) for words in texts]
    lines = formatted(man_page(a_page("Do it.", *expected), "1", []))
    start = lines.index("EXAMPLES") + 1
    assert lines[start : start + len(expected)] == expected


def test_layout() -> None:
    page = man_page(a_page("Do it.", "pynbd a-thing x"), "1.2", ["nbdinfo(1)", "qemu-nbd(8)"])
    lines = list(filter(None, formatted(page)))
    assert lines[0].split() == ["PYNBD-A-THING(1)", "pynbd", "PYNBD-A-THING(1)"]
    assert lines[1:-1] == [
        *["NAME", "pynbd-a-thing - do it"],
        *["SYNOPSIS", "pynbd a-thing [OPTIONS] IMAGE|URI"],
        *["DESCRIPTION", "Do it.", "More. Of it."],
        *["OPTIONS", "-k, --socket PATH", "Do it.", "--progress / --no-progress", "Whether."],
        *["EXAMPLES", "pynbd a-thing x"],
        *["EXIT STATUS", "As elsewhere:", "0  ok"],
        *["SEE ALSO", "nbdinfo(1), qemu-nbd(8)"],
    ]
    assert lines[-1].split() == ["pynbd", "1.2", "PYNBD-A-THING(1)"]


def test_options_are_bold_and_what_they_take_is_not() -> None:
    page = man_page(a_page(), "1", [])
    assert r"\fB\-k\fR, \fB\-\-socket\fR \fIPATH\fR" in page.splitlines()
    assert r"\fB\-\-progress\fR / \fB\-\-no\-progress\fR" in page.splitlines()


def test_escape() -> None:
    assert escape(r".a-\ü") == r"\&.a\-\(rs\[u00FC]"
