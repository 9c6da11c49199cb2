"""``--allow`` and ``--access``: what is read, and every mistake, one line that names its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pynbd.cli.access_rules import Rule, allowed, allowed_in_file, check
from pynbd.errors import UsageError
from pynbd.server.access import Allow
from pynbd.server.reach import Reach

EVERYTHING = Reach(tls=True, clear=True, verify_peer=True, psk_users=("alice", "bob"))


def rules(found: list[Rule]) -> list[Allow]:
    return [rule.allow for rule in found]


@pytest.mark.parametrize(
    "text, rule",
    [
        ("read", Allow("read")),
        ("right=write", Allow("write")),
        (
            "write,psk=alice,address=192.0.2.0/24",
            Allow("write", psk="alice", address="192.0.2.0/24"),
        ),
        ("read,dn=CN=alice,,O=Example", Allow("read", dn="CN=alice,O=Example")),
        ("read,cert=*.example", Allow("read", cert="*.example")),
        ("read,uid=0,gid=root", Allow("read", uid="0", gid="root")),
        ("write,tls=on", Allow("write", tls=True)),
        ("write,tls=true", Allow("write", tls=True)),
        ("read,tls=off", Allow("read", tls=False)),
    ],
)
def test_allow(text: str, rule: Allow) -> None:
    assert rules(allowed([text])) == [rule]


def test_allow_is_repeatable() -> None:
    assert rules(allowed(["read", "write,uid=0"])) == [Allow("read"), Allow("write", uid="0")]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ("right", "read or write")),
        ("psk=alice", ("right", "read or write")),
        ("admin", ("right", "'admin'", "read or write")),
        ("read,write", ("part 2", "KEY=VALUE")),
        ("write,", ("nothing follows the last comma", "KEY=VALUE")),
        ("write,dn=a,,,", ("nothing follows the last comma",)),
        ("read,user=alice", ("user", "right, tls, cert, dn, psk, uid, gid, address")),
        ("read,psk=a,psk=b", ("psk", "twice")),
        ("read,psk=", ("psk", "''")),
        ("read,tls=maybe", ("tls", "'maybe'")),
        ("read,uid=no-such-user", ("uid", "'no-such-user'", "number")),
        ("read,address=192.0.2.1/24", ("address", "192.0.2.1/24", "network")),
        ("read,dn=CN=alice,O=Example", ("O: there is no such key",)),
    ],
)
def test_what_is_not_allowed(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        allowed(["read", text])
    said = str(caught.value)
    assert said.startswith(f"--allow {text!r}: ")
    assert "\n" not in said
    for part in parts:
        assert part in said


FILE = """
# who may do what
[exports.disk]
allow = [
    { right = "write", psk = "alice", address = "192.0.2.0/24" },
    { right = "read", tls = true },
    { right = "read", uid = 0, gid = "root" },
]

[exports."a b"]
allow = []

[exports.""]
allow = [{ right = "read" }]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "access.toml"


def test_a_file(path: Path) -> None:
    path.write_text(FILE)
    found = allowed_in_file(str(path), ["", "disk", "a b"])
    assert {name: rules(of) for name, of in found.items()} == {
        "": [Allow("read")],
        "disk": [
            Allow("write", psk="alice", address="192.0.2.0/24"),
            Allow("read", tls=True),
            Allow("read", uid=0, gid="root"),
        ],
        "a b": [],
    }


@pytest.mark.parametrize(
    "content, parts",
    [
        ("", ("exports is missing",)),
        ("exports = 7", ("exports", "[exports.NAME]")),
        ("[export.disk]", ("export: there is no such key", "exports")),
        ("[exports]", ("[exports.disk] is missing", "every export")),
        ("[exports.other]\nallow = []", ("[exports.other]", "no such export", "[exports.disk]")),
        ('[exports."a b"]', ('[exports."a b"]', "no such export")),
        ("[exports]\ndisk = 7", ("[exports.disk]", "a table")),
        ("[[exports.disk]]", ("[exports.disk]", "a table")),
        ("[exports.disk]", ("[exports.disk]: allow is missing",)),
        ("[exports.disk]\ndeny = []", ("[exports.disk]: deny", "no such key", "allow")),
        ("[exports.disk]\nallow = 'read'", ("[exports.disk]: allow", "list")),
        ("[exports.disk]\nallow = ['read']", ("allow: rule 1: 'read'", "{ right")),
        ("[exports.disk]\nallow = [{right = 'read'}, {}]", ("allow: rule 2: right",)),
        ("[exports.disk]\nallow = [{right = 'all'}]", ("rule 1: right: 'all'", "read or write")),
        ("[exports.disk]\nallow = [{right = ['read']}]", ("rule 1: right", "read or write")),
        ("[exports.disk]\nallow = [{right = 'read', user = 'a'}]", ("user", "psk, uid, gid")),
        ("[exports.disk]\nallow = [{right = 'read', psk = 7}]", ("rule 1: psk: 7", "text")),
        ("[exports.disk]\nallow = [{right = 'read', tls = 'on'}]", ("tls: 'on'", "true or false")),
        ("[exports.disk]\nallow = [{right = 'read', uid = true}]", ("uid: True", "number")),
        ("[exports.disk]\nallow = [{right = 'read', address = 'here'}]", ("'here'", "network")),
        ("[exports.disk\n[exports]", ("not TOML", "line 1")),
        ("[exports.disk]\nallow = []\nallow = []\n\n", ("not TOML", "line 3")),
        ("a = " + "[" * 5000, ("not TOML",)),
    ],
)
def test_a_file_with_a_mistake(path: Path, content: str, parts: tuple[str, ...]) -> None:
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        allowed_in_file(str(path), ["disk"])
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    for part in parts:
        assert part in said


def test_a_file_that_is_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not TOML"):
        allowed_in_file(str(path), ["disk"])


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        allowed_in_file(str(path), ["disk"])
    assert caught.value.filename == str(path)


NEVER = [
    (Allow("read", tls=True), Reach(), "TLS"),
    (Allow("read", cert="a"), Reach(), "TLS"),
    (Allow("read", dn="a"), Reach(), "TLS"),
    (Allow("read", psk="a"), Reach(), "TLS"),
    (Allow("read", tls=False), Reach(tls=True, clear=False), "required"),
    (Allow("read", tls=False, psk="alice"), EVERYTHING, "excludes"),
    (Allow("read", tls=False, cert="a"), EVERYTHING, "excludes"),
    (Allow("read", cert="a", psk="alice"), EVERYTHING, "exclude psk"),
    (Allow("read", dn="a", psk="alice"), EVERYTHING, "exclude psk"),
    (Allow("read", uid=0, address="::/0"), EVERYTHING, "unix sockets"),
    (Allow("read", gid=0, address="::/0"), EVERYTHING, "unix sockets"),
    (Allow("read", cert="a"), Reach(tls=True, psk_users=("a",)), "--tls-verify-peer"),
    (Allow("read", dn="a"), Reach(tls=True), "--tls-verify-peer"),
    (Allow("read", psk="alice"), Reach(tls=True, verify_peer=True), "--tls-psk"),
    (
        Allow("read", psk="carol"),
        EVERYTHING,
        "'carol': no such user has a key; there is alice, bob",
    ),
    (Allow("read", psk="c*"), EVERYTHING, "no such user"),
    (Allow("read", uid=0), Reach(unix=False), "--socket"),
    (Allow("read", gid=0), Reach(unix=False), "--socket"),
    (Allow("read", address="::1"), Reach(tcp=False), "--bind"),
]


@pytest.mark.parametrize("allow, reach, part", NEVER)
def test_what_nobody_could_meet(allow: Allow, reach: Reach, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        check([Rule("here", Allow("read")), Rule("there", allow)], reach)
    said = str(caught.value)
    assert said.startswith("there: nobody could meet it: ")
    assert part in said
    assert len(said) < 300


@pytest.mark.parametrize(
    "allow, reach",
    [
        (Allow("read"), Reach(unix=False)),
        (Allow("read", tls=False), Reach()),
        (Allow("read", tls=False), Reach(tls=True)),
        (Allow("read", tls=True), Reach(tls=True, clear=False)),
        (Allow("read", psk="a*"), EVERYTHING),
        (Allow("read", psk="bob", uid=0), EVERYTHING),
        (Allow("read", cert="a", dn="b", address="::1", tls=True), EVERYTHING),
        (Allow("read", cert="a"), Reach(tls=True, verify_peer=True, unix=False)),
        (Allow("read", uid=0, gid=0), Reach(tcp=False)),
    ],
)
def test_what_somebody_could_meet(allow: Allow, reach: Reach) -> None:
    check([Rule("here", allow)], reach)
