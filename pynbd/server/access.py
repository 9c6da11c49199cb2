"""Who may do what with an export: rules, and what is known of a client.

The NBD specification leaves authorisation to servers. Here a client who may not even read gets the
answers of an unknown export, and one who may only read those of an export that is read-only.

1. A rule applies to who meets all that it names; one that names nothing applies to everybody.
2. A client has the most that any rule gives him. No rules at all (None) give everything to
   everybody; an empty list gives nothing to anybody.
3. What was not proved is not there: a rule that names a certificate applies to nobody who has shown
   none, one that names a user of the host to nobody who came over TCP.
4. Names are compared as they are, with ``*`` for any run of characters; in a distinguished name an
   escaped character is one. Users and groups of the host are looked up when a rule is made.
"""

from __future__ import annotations

import grp
import pwd
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from reprlib import Repr
from typing import TYPE_CHECKING, Any

from pynbd.errors import UsageError

if TYPE_CHECKING:  # it takes a library that is not wanted without TLS
    from pynbd.tls.names import CertificateNames

CONDITIONS = ("tls", "cert", "dn", "psk", "uid", "gid", "address")
"""What a rule may name."""
MAX_ID = 2**32 - 2
"""The highest number of a user or group; the one above means nobody."""
_ESCAPED = re.compile(r"\\([^*])", re.DOTALL)
_MAPPED_BITS = 96  # the prefix of ::ffff:0:0/96, where IPv4 addresses are mapped


class Right(IntEnum):
    """What a client may do; each includes those before it."""

    NOTHING = 0
    READ = 1
    WRITE = 2


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_ADDRESS = (
    "an address, or a network as 192.0.2.0/24 (no bit set beyond its prefix); of IPv6 with an"
    " interface (fe80::1%eth0), or without,"
)
_RIGHTS = {"read": Right.READ, "write": Right.WRITE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who is at the other end, as far as it was proved.

    ``tls``: the connection is encrypted. ``certificate``: of one that was verified. ``psk_user``:
    whose key was used. ``uid`` and ``gids`` (the primary group and the others) are those of the
    peer of a unix socket, ``address`` is where that of TCP is; `address_of` makes one.
    """

    tls: bool = False
    certificate: CertificateNames | None = None
    psk_user: str | None = None
    uid: int | None = None
    gids: frozenset[int] = frozenset()
    address: IPv4Address | IPv6Address | None = None


def address_of(peer: tuple[Any, ...]) -> IPv4Address | IPv6Address:
    """The address in what ``getpeername`` says of TCP, with the zone of one that is only of a link;
    a mapped IPv4 address is the IPv4 address.
    """
    address = ip_address(peer[0].partition("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if peer[3]:
            return IPv6Address(f"{address}%{_interface(peer[3])}")
    return address


@dataclass(frozen=True, slots=True)
class Allow:
    """A rule: who meets all that it names may "read", or "write", which includes reading.

    ``tls``: whether the connection is encrypted. ``cert``: one of the names of the client's
    certificate (common name, alternative names). ``dn``: its whole distinguished name. ``psk``: the
    user of a pre-shared key. In these three a ``*`` stands for any run of characters. ``uid``,
    ``gid``: the user, and one of the groups, of the process at the other end of a unix socket, by
    number (0 to 4294967294) or name. ``address``: an address of IPv4 or IPv6, or a network.

    Raises `UsageError`, which begins with the name of what is wrong.
    """

    right: str
    _: KW_ONLY
    tls: bool | None = None
    cert: str | None = None
    dn: str | None = None
    psk: str | None = None
    uid: int | str | None = None
    gid: int | str | None = None
    address: str | None = None
    gives: Right = field(init=False, repr=False, compare=False)
    _uid: int | None = field(init=False, repr=False, compare=False)
    _gid: int | None = field(init=False, repr=False, compare=False)
    _network: _Network | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.right, str) or self.right not in _RIGHTS:
            raise _wrong("right", self.right, " or ".join(_RIGHTS))
        if self.tls is not None and not isinstance(self.tls, bool):
            raise _wrong("tls", self.tls, "true or false")
        for key in ("cert", "dn", "psk", "address"):
            text = getattr(self, key)
            if text is not None and not (isinstance(text, str) and text):
                raise _wrong(key, text, "a text that is not empty")
        for name, value in (
            ("gives", _RIGHTS[self.right]),
            ("_uid", _id_of("uid", self.uid, "user", lambda name: pwd.getpwnam(name).pw_uid)),
            ("_gid", _id_of("gid", self.gid, "group", lambda name: grp.getgrnam(name).gr_gid)),
            ("_network", None if self.address is None else _Network.parse(self.address)),
        ):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        named = {key: getattr(self, key) for key in CONDITIONS}
        return ",".join([self.right, *(f"{key}={v}" for key, v in named.items() if v is not None)])

    def applies_to(self, identity: Identity) -> bool:
        """Whether ``identity`` meets all that the rule names."""
        shown = identity.certificate
        user = identity.psk_user
        return (
            (self.tls is None or self.tls is identity.tls)
            and _met(self.cert, shown.names if shown else ())
            and _met(self.dn and _bare(self.dn), (_bare(shown.dn),) if shown else ())
            and _met(self.psk, () if user is None else (user,))
            and (self._uid is None or self._uid == identity.uid)
            and (self._gid is None or self._gid in identity.gids)
            and (self._network is None or self._network.holds(identity.address))
        )


def right_of(rules: Sequence[Allow] | None, identity: Identity) -> Right:
    """The most that any of ``rules`` gives; None is that nobody has made rules."""
    if rules is None:
        return Right.WRITE
    return max((rule.gives for rule in rules if rule.applies_to(identity)), default=Right.NOTHING)


@dataclass(frozen=True, slots=True)
class _Network:
    """The addresses of a rule; ``zone`` is the interface, where that was given."""

    addresses: IPv4Network | IPv6Network
    zone: str | None

    @classmethod
    def parse(cls, text: str) -> _Network:
        # fe80::1%eth0 or, for a network, fe80::%eth0/64 (RFC 4007, section 11.7).
        before, percent, zone = text.partition("%")
        zone, slash, bits = zone.partition("/")
        try:
            addresses = ip_network(before + slash + bits)
        except ValueError:
            raise _wrong("address", text, _ADDRESS) from None
        if percent and not (zone and isinstance(addresses, IPv6Network)):
            raise _wrong("address", text, _ADDRESS)
        if isinstance(addresses, IPv6Network) and addresses.prefixlen >= _MAPPED_BITS:
            mapped = addresses.network_address.ipv4_mapped
            if mapped:
                addresses = IPv4Network((mapped, addresses.prefixlen - _MAPPED_BITS))
        if zone.isdecimal():
            zone = _interface(int(zone))
        return cls(addresses, zone or None)

    def holds(self, address: IPv4Address | IPv6Address | None) -> bool:
        if address is None or address not in self.addresses:
            return False
        return self.zone is None or self.zone == getattr(address, "scope_id", None)


def _interface(number: int) -> str:
    """The name of a network interface, or its number where it has none."""
    try:
        return socket.if_indextoname(number)
    except (OSError, OverflowError):
        return str(number)


def _met(pattern: str | None, names: Iterable[str]) -> bool:
    return pattern is None or any(_is_like(name, pattern) for name in names)


def _bare(dn: str) -> str:
    """``dn`` with the escaped signs of its values as numbers: the ``,`` of a pattern is one between
    attributes, and none that somebody has got into his name.
    """
    return _ESCAPED.sub(lambda found: f"\\{ord(found[1]):x};", dn)


def _is_like(name: str, pattern: str) -> bool:
    """Whether ``name`` is ``pattern``, in time that no name makes long."""
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    *middle, last = others
    if not name.startswith(first):
        return False
    at = len(first)
    for piece in middle:
        at = name.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return len(name) - at >= len(last) and name.endswith(last)


def _id_of(key: str, value: object, whose: str, look_up: Callable[[str], int]) -> int | None:
    """The number of a user or group."""
    if value is None:
        return None
    allowed = f"the number of a {whose} (0 to {MAX_ID}), or the name of one of this host"
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        try:
            return look_up(value)
        except (KeyError, ValueError):
            raise _wrong(key, value, allowed) from None
    if isinstance(value, bool) or not isinstance(value, int | str) or len(str(value)) > 10:
        raise _wrong(key, value, allowed)
    number = int(value)
    if not 0 <= number <= MAX_ID:
        raise _wrong(key, value, allowed)
    return number


def _wrong(key: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{key}: {_SHORT.repr(value)}: {allowed} is expected")
