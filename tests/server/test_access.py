"""Who may do what: what each condition is met by, and what no rule can be made of."""

from __future__ import annotations

import grp
import os
import pwd
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, cast

import pytest

from pynbd.errors import UsageError
from pynbd.server.access import (
    CONDITIONS,
    MAX_ID,
    Allow,
    Identity,
    Right,
    address_of,
    right_of,
)


@dataclass(frozen=True)
class Shown:
    """The names of a certificate, as `pynbd.tls.names.CertificateNames` has them."""

    dn: str
    names: tuple[str, ...]


def of_certificate(*names: str, dn: str = "CN=alice,O=Example") -> Identity:
    return Identity(tls=True, certificate=cast(Any, Shown(dn, names)))


def at(text: str) -> Identity:
    return Identity(address=ip_address(text))


NOBODY_KNOWN = Identity()
ALICE = of_certificate("alice", "alice.example", "alice@example.com")


def test_without_rules_everybody_may_write() -> None:
    assert right_of(None, NOBODY_KNOWN) is Right.WRITE


def test_with_no_rule_in_them_rules_give_nothing() -> None:
    assert right_of((), ALICE) is Right.NOTHING


def test_a_rule_that_names_nothing_is_for_everybody() -> None:
    assert right_of([Allow("read")], NOBODY_KNOWN) is Right.READ
    assert right_of([Allow("write")], ALICE) is Right.WRITE


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_that_any_rule_gives_counts(order: int) -> None:
    rules = [Allow("read"), Allow("write", psk="alice"), Allow("read", psk="alice")][::order]
    assert right_of(rules, Identity(tls=True, psk_user="alice")) is Right.WRITE
    assert right_of(rules, Identity(tls=True, psk_user="bob")) is Right.READ


def test_rights_grow() -> None:
    assert Right.NOTHING < Right.READ < Right.WRITE


def test_all_that_a_rule_names_has_to_be_met() -> None:
    rule = Allow("read", tls=True, psk="alice", address="192.0.2.0/24")
    address = IPv4Address("192.0.2.7")
    assert rule.applies_to(Identity(tls=True, psk_user="alice", address=address))
    assert not rule.applies_to(Identity(tls=True, psk_user="bob", address=address))
    assert not rule.applies_to(Identity(tls=True, psk_user="alice"))
    assert not rule.applies_to(Identity(tls=False, psk_user="alice", address=address))


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("encrypted", [True, False])
def test_tls(wanted: bool, encrypted: bool) -> None:
    assert Allow("read", tls=wanted).applies_to(Identity(tls=encrypted)) is (wanted is encrypted)


@pytest.mark.parametrize("condition", ["cert", "dn", "psk"])
@pytest.mark.parametrize("pattern", ["*", "alice", "**"])
def test_what_was_not_proved_meets_no_pattern(condition: str, pattern: str) -> None:
    rule = Allow("write", **{condition: pattern})  # type: ignore[arg-type]
    everything_else = Identity(
        tls=True, uid=0, gids=frozenset({0}), address=IPv4Address("127.0.0.1")
    )
    assert not rule.applies_to(everything_else)


@pytest.mark.parametrize("condition", ["uid", "gid"])
def test_who_came_over_tcp_is_no_user_of_this_host(condition: str) -> None:
    assert not Allow("write", **{condition: 0}).applies_to(at("127.0.0.1"))  # type: ignore[arg-type]


def test_who_came_over_a_unix_socket_has_no_address() -> None:
    assert not Allow("write", address="0.0.0.0/0").applies_to(Identity(uid=0))


@pytest.mark.parametrize(
    "pattern, meets",
    [
        ("alice", True),
        ("Alice", False),
        ("alic", False),
        ("alice.", False),
        ("alice.example", True),
        ("*.example", True),
        ("*@example.com", True),
        ("*@*", True),
        ("a*e", True),
        ("a*e*e", True),
        ("alice*", True),
        ("*alice.example*", True),
        ("*", True),
        ("a?ice", False),
        ("[a]lice", False),
        ("alice.*.example", False),
        ("CN=alice,O=Example", False),
    ],
)
def test_cert_is_one_of_the_names(pattern: str, meets: bool) -> None:
    assert Allow("read", cert=pattern).applies_to(ALICE) is meets


@pytest.mark.parametrize(
    "pattern, name, meets",
    [
        ("ab*ba", "aba", False),  # what stands before the * is not what stands behind it
        ("ab*ba", "abba", True),
        ("*aa*aa*", "aaa", False),
        ("*aa*aa*", "aaaa", True),
        ("a*b*c", "abcbc", True),
        ("*ab", "aab", True),
        ("a.c", "abc", False),
        ("a*c", "a\nc", True),
    ],
)
def test_a_star_stands_for_any_run(pattern: str, name: str, meets: bool) -> None:
    assert Allow("read", psk=pattern).applies_to(Identity(psk_user=name)) is meets


def test_no_name_makes_a_pattern_take_long() -> None:
    rule = Allow("read", cert="a*" * 100 + "b")
    assert not rule.applies_to(of_certificate("a" * 50_000))


@pytest.mark.parametrize(
    "pattern, meets",
    [
        ("*,CN=alice", False),
        ("*,O=Example*", False),
        ("*O=Guests,CN=*", True),
        (r"O=Guests,CN=x\,O=Example\,CN=alice", True),
        (r"O=Guests,CN=x\,*", True),
        (r"*\,CN=alice", True),
        ("*CN=alice", True),
    ],
)
def test_a_comma_in_a_name_separates_nothing(pattern: str, meets: bool) -> None:
    """RFC 4514, section 2.4. Who may choose his common name must not choose the rest with it."""
    guest = of_certificate(dn=r"O=Guests,CN=x\,O=Example\,CN=alice")
    assert Allow("read", dn=pattern).applies_to(guest) is meets


def test_an_escaped_backslash_escapes_nothing() -> None:
    backslash = of_certificate(dn="O=Guests\\\\,CN=alice")
    assert Allow("read", dn="*,CN=alice").applies_to(backslash)
    assert not Allow("read", dn="*\\,CN=alice").applies_to(backslash)


def test_dn_is_the_whole_name() -> None:
    assert Allow("read", dn="CN=alice,O=Example").applies_to(ALICE)
    assert Allow("read", dn="*,O=Example").applies_to(ALICE)
    assert not Allow("read", dn="CN=alice").applies_to(ALICE)
    assert not Allow("read", dn="alice").applies_to(ALICE)


@pytest.mark.parametrize("value", [7, "7", "0007"])
def test_uid(value: int | str) -> None:
    assert Allow("read", uid=value).applies_to(Identity(uid=7))
    assert not Allow("read", uid=value).applies_to(Identity(uid=8, gids=frozenset({7})))


@pytest.mark.parametrize("value", [7, "7"])
def test_gid_is_the_primary_group_or_another(value: int | str) -> None:
    rule = Allow("read", gid=value)
    assert rule.applies_to(Identity(uid=1, gids=frozenset({7})))
    assert rule.applies_to(Identity(uid=1, gids=frozenset({1, 7, 9})))
    assert not rule.applies_to(Identity(uid=7, gids=frozenset({1, 9})))


def test_users_and_groups_have_names() -> None:
    user = pwd.getpwuid(os.getuid())
    group = grp.getgrgid(0)
    assert Allow("read", uid=user.pw_name).applies_to(Identity(uid=user.pw_uid))
    assert Allow("read", gid=group.gr_name).applies_to(Identity(gids=frozenset({0})))


@pytest.mark.parametrize(
    "network, inside, outside",
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.8"),
        ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
        ("0.0.0.0/0", "203.0.113.1", "2001:db8::1"),
        ("2001:db8::7", "2001:db8:0::7", "2001:db8::8"),
        ("2001:db8::/32", "2001:db8:ffff::", "2001:db9::"),
        ("::/0", "fe80::1%eth0", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.8"),
        ("::ffff:192.0.2.0/120", "192.0.2.9", "192.0.3.0"),
        ("::ffff:0:0/96", "192.0.2.9", "::1"),
        ("fe80::1", "fe80::1%eth0", "fe80::2%eth0"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::1%eth1"),
        ("fe80::1%eth0", "fe80::1%eth0", "fe80::1"),
        ("fe80::%eth0/64", "fe80::abcd%eth0", "fe80::abcd%eth1"),
    ],
)
def test_address(network: str, inside: str, outside: str) -> None:
    rule = Allow("read", address=network)
    assert rule.applies_to(at(inside))
    assert not rule.applies_to(at(outside))


def test_an_interface_has_a_number_and_a_name() -> None:
    number, name = socket.if_nameindex()[0]
    for zone in (number, name):
        assert Allow("read", address=f"fe80::1%{zone}").applies_to(at(f"fe80::1%{name}"))


def test_the_address_of_a_peer() -> None:
    number, name = socket.if_nameindex()[0]
    assert address_of(("192.0.2.7", 1)) == IPv4Address("192.0.2.7")
    assert address_of(("::ffff:192.0.2.7", 1, 0, 0)) == IPv4Address("192.0.2.7")
    assert address_of(("2001:db8::7", 1, 0, 0)) == IPv6Address("2001:db8::7")
    assert address_of(("fe80::1", 1, 0, number)) == IPv6Address(f"fe80::1%{name}")
    assert address_of((f"fe80::1%{name}", 1, 0, number)) == IPv6Address(f"fe80::1%{name}")


def test_rules_say_what_they_were_made_of() -> None:
    assert Allow("write", psk="alice") == Allow("write", psk="alice")
    assert Allow("write", psk="alice") != Allow("read", psk="alice")
    assert eval(repr(Allow("read", uid=7, address="::1"))) == Allow("read", uid=7, address="::1")


def test_no_condition_is_forgotten() -> None:
    values = ("tls", "cert", "dn", "psk", "uid", "gid", "address")
    assert values == CONDITIONS
    for condition in CONDITIONS:
        value = {"tls": True, "uid": 1, "gid": 1, "address": "::1"}.get(condition, "x")
        assert not Allow("read", **{condition: value}).applies_to(NOBODY_KNOWN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("right", "admin", "read or write"),
        ("right", "", "read or write"),
        ("right", ["read"], "read or write"),
        ("tls", "on", "true or false"),
        ("tls", 1, "true or false"),
        ("cert", "", "text"),
        ("dn", 7, "text"),
        ("psk", b"alice", "text"),
        ("uid", -1, f"0 to {MAX_ID}"),
        ("uid", MAX_ID + 1, f"0 to {MAX_ID}"),
        ("uid", 10**50, f"0 to {MAX_ID}"),
        ("uid", "9" * 5000, f"0 to {MAX_ID}"),
        ("uid", True, f"0 to {MAX_ID}"),
        ("uid", 1.0, f"0 to {MAX_ID}"),
        ("uid", "", f"0 to {MAX_ID}"),
        ("uid", "no such user", "name of one of this host"),
        ("uid", "a\0b", "name of one of this host"),
        ("uid", "\udcff", "name of one of this host"),
        ("gid", "no such group", "name of one of this host"),
        ("gid", "-1", "number of a group"),
        ("address", "", "text"),
        ("address", 1, "text"),
        ("address", "localhost", "an address"),
        ("address", "192.0.2.1/24", "beyond its prefix"),
        ("address", "192.0.2.0/33", "an address"),
        ("address", "192.0.2.1%eth0", "of IPv6"),
        ("address", "fe80::1%", "interface"),
        ("address", "fe80::1%/64", "interface"),
    ],
)
def test_what_no_rule_is_made_of(key: str, value: object, allowed: str) -> None:
    with pytest.raises(UsageError) as caught:
        Allow(**{"right": "read", key: value})  # type: ignore[arg-type]
    said = str(caught.value)
    assert said.startswith(f"{key}: ")
    assert allowed in said
    assert len(said) <= 300
