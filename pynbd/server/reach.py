"""What the clients of a server can prove at all.

A rule that asks for more than that meets nobody. Whoever wrote it expects to be protected by it, or
to let somebody in: so it is a mistake, and told before the server begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pynbd.errors import UsageError
from pynbd.server.access import Allow, Identity

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What a client of a server could prove. ``tls`` and ``clear``: whether he may come so;
    ``verify_peer``: by a certificate; ``psk_users``: by their keys; ``unix``, ``tcp``: from there.
    """

    tls: bool = False
    clear: bool = True
    verify_peer: bool = False
    psk_users: Sequence[str] = ()
    unix: bool = True
    tcp: bool = True

    @classmethod
    def of(cls, tls: Tls | None, *, unix: bool, tcp: bool) -> Reach:
        """That of a server which does ``tls`` and listens there."""
        if tls is None:
            return cls(unix=unix, tcp=tcp)
        return cls(
            tls=True,
            clear=not tls.required,
            verify_peer=tls.credentials.verify_peer,
            psk_users=tls.credentials.psk_users,
            unix=unix,
            tcp=tcp,
        )

    def hinders(self, allow: Allow) -> str:
        """Why nobody could meet a rule; "" if somebody could."""
        by_certificate = allow.cert is not None or allow.dn is not None
        by_key = allow.psk is not None
        by_user = allow.uid is not None or allow.gid is not None
        if (allow.tls or by_certificate or by_key) and not self.tls:
            return (
                "tls, cert, dn and psk need TLS, which is off (--tls-certificates, --tls-psk, tls)"
            )
        if allow.tls is False and not self.clear:
            return "tls=off, where TLS is required (--tls=on, required=False)"
        if allow.tls is False and (by_certificate or by_key):
            return "tls=off excludes cert, dn and psk"
        if by_certificate and by_key:
            return "cert and dn exclude psk: a client shows a certificate or has a key"
        if by_user and allow.address is not None:
            return "uid and gid are of unix sockets, address is of TCP"
        if by_certificate and not self.verify_peer:
            return "cert and dn need verified certificates (--tls-verify-peer, verify_peer)"
        if by_key and not self.psk_users:
            return "psk needs pre-shared keys (--tls-psk, psk_file)"
        if by_key and not any(
            Allow("read", psk=allow.psk).applies_to(Identity(psk_user=user))
            for user in self.psk_users
        ):
            return f"psk: {allow.psk!r}: no such user has a key; there is {_some(self.psk_users)}"
        if by_user and not self.unix:
            return "uid and gid need a unix socket (--socket)"
        if allow.address is not None and not self.tcp:
            return "address needs TCP (--bind, --port)"
        return ""


def check_rules(rules: object, reach: Reach) -> None:
    """Raise `UsageError` for what is no list of `Allow`, and for a rule that nobody could meet."""
    if not isinstance(rules, Sequence) or not all(isinstance(rule, Allow) for rule in rules):
        raise UsageError(f"access: a list of pynbd.Allow is expected, not {rules!r:.80}")
    for rule in rules:
        if wrong := reach.hinders(rule):
            raise UsageError(f"access: {rule}: nobody could meet it: {wrong}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
