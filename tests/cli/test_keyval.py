"""Options in one word: QEMU's notation."""

from __future__ import annotations

import pytest

from pynbd.cli.keyval import keyval, parse_keyval
from pynbd.errors import UsageError


@pytest.mark.parametrize(
    "text, pairs",
    [
        ("", []),
        ("read", [("right", "read")]),
        ("right=read", [("right", "read")]),
        ("read,psk=alice", [("right", "read"), ("psk", "alice")]),
        ("read,dn=CN=a,,O=b", [("right", "read"), ("dn", "CN=a,O=b")]),
        ("read,dn=,,,,", [("right", "read"), ("dn", ",,")]),
        ("read,dn=a,,", [("right", "read"), ("dn", "a,")]),
        ("read,dn=a,,,uid=1", [("right", "read"), ("dn", "a,"), ("uid", "1")]),
        ("read,dn=", [("right", "read"), ("dn", "")]),
        ("psk=alice,read=1", [("psk", "alice"), ("read", "1")]),
        ("read,", [("right", "read")]),
    ],
)
def test_keyval(text: str, pairs: list[tuple[str, str]]) -> None:
    assert parse_keyval(text, "right", "--allow") == pairs


@pytest.mark.parametrize(
    "text", ["read,write", "read,,psk=a,write", "read,=x", "=read", "a=b,,c,d"]
)
def test_what_has_no_key(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--allow: part \d: KEY=VALUE is expected"):
        parse_keyval(text, "right", "--allow")


def test_a_password_with_a_comma_is_in_no_message() -> None:
    with pytest.raises(UsageError) as caught:
        parse_keyval("secret,id=s,data=one,two", "qom-type", "--object")
    said = "--object: part 4: KEY=VALUE is expected (a comma is doubled)"
    assert str(caught.value) == said


def test_what_is_written_is_read() -> None:
    pairs = [("id", "s"), ("data", "a,b,,c=d,")]
    assert keyval(dict(pairs)) == "id=s,data=a,,b,,,,c=d,,"
    assert parse_keyval(keyval(dict(pairs)), "qom-type", "") == pairs
