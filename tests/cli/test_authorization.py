"""QEMU's authorisation: the first rule that fits, patterns, and a file that changes.

Patterns fit what `g_pattern_match_simple` of GLib says they do.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from pynbd.cli.authorization import ListFile, Policy, Rule
from pynbd.errors import UsageError


@pytest.mark.parametrize(
    "pattern, name, fits",
    [
        ("CN=alice,*", "CN=alice,O=Example", True),
        ("CN=alice,*", "CN=bob,O=Example", False),
        ("*O=Example*", "CN=alice,O=Example,C=DE", True),
        ("CN=al?ce", "CN=alice", True),
        ("CN=al?ce", "CN=alce", False),
        ("CN=[a]lice", "CN=alice", False),
        ("CN=[a]lice", "CN=[a]lice", True),
        ("ab*ba", "aba", False),
        ("*", "", True),
        ("", "", True),
        ("", "a", False),
        ("a*b?c*d", "axxbycbzcd", True),
        ("a*b?c*d", "axxbyc", False),
        ("a\\*b", "a\\xb", True),
    ],
)
def test_globs(pattern: str, name: str, fits: bool) -> None:
    assert Rule(pattern, True, is_glob=True).fits(name) is fits


def test_a_star_is_itself_in_an_exact_rule() -> None:
    assert Rule("CN=*", True, is_glob=False).fits("CN=*")
    assert not Rule("CN=*", True, is_glob=False).fits("CN=alice")


def test_no_name_makes_a_pattern_take_long() -> None:
    assert not Rule("a*" * 100 + "b", True, is_glob=True).fits("a" * 20_000)


def test_the_first_rule_that_fits_counts() -> None:
    rules = [Rule("CN=eve*", False, True), Rule("CN=*", True, True), Rule("CN=eve", True, False)]
    policy = Policy(rules, otherwise=False)
    assert policy.allows("CN=alice")
    assert not policy.allows("CN=eve")
    assert not policy.allows("O=Example")
    assert Policy(rules, otherwise=True).allows("O=Example")


def only(text: str) -> Policy:
    """Whose name is the text of the file."""
    if not text:
        raise UsageError("empty")
    return Policy([Rule(text, True, is_glob=False)], otherwise=False)


def replace(path: Path, text: str) -> None:
    """As editors do it: what was there before is there until the new one is."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("alice")
    following, steady = (ListFile(str(path), only, refresh) for refresh in (True, False))
    replace(path, "bob")
    assert [following.allows(name) for name in ("alice", "bob")] == [False, True]
    assert [steady.allows(name) for name in ("alice", "bob")] == [True, False]


def test_a_file_that_cannot_be_read_lets_nobody_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list"
    path.write_text("alice")
    listed = ListFile(str(path), only, True)
    for breaks in (lambda: replace(path, ""), path.unlink):
        breaks()
        assert not listed.allows("alice")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert all(record.message.startswith(f"{path}: nobody is let in") for record in caplog.records)
    path.write_text("alice")
    assert listed.allows("alice")


def test_a_file_with_names_in_another_encoding_lets_nobody_in(tmp_path: Path) -> None:
    """A rule that keeps somebody out would not fit his name."""
    path = tmp_path / "list"
    path.write_text("J\xfcrgen", "utf-8")
    listed = ListFile(str(path), only, True)
    assert listed.allows("J\xfcrgen")
    path.write_text("J\xfcrgen", "latin-1")
    assert not listed.allows("J\xfcrgen")
    with pytest.raises(UsageError, match="list: not in UTF-8"):
        ListFile(str(path), only, True)


def test_a_file_has_to_be_there_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ListFile(str(tmp_path / "none"), only, False)
