"""The options of `pynbd serve` for TLS, and for who may do what.

There are two families: nbdkit's (``--tls``, ``--tls-certificates``, ``--tls-psk``,
``--tls-verify-peer``) and QEMU's (``--object``, ``--tls-creds``, ``--tls-authz``). ``--tls`` goes
with both; without it, TLS is required where credentials are given, and off where none are.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pynbd.cli import access_rules, qemu_tls, throwaway_tls
from pynbd.cli.completion import directory_names, file_names
from pynbd.cli.objects import Objects
from pynbd.errors import UsageError
from pynbd.protocol.uri import NbdUri
from pynbd.server import tls as tls_of_servers
from pynbd.server.access import Allow
from pynbd.server.reach import Reach
from pynbd.tls import files as tls_files

if TYPE_CHECKING:  # it takes libraries that are not wanted without TLS
    from pynbd.server.tls import Tls

F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("pynbd")

_CREDENTIALS = "--tls-certificates DIR, --tls-psk FILE, or --object and --tls-creds ID"
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """What was asked for; the names are those of the options."""

    tls: str | None = None
    tls_certificates: str | None = None
    tls_psk: str | None = None
    tls_verify_peer: bool = False
    object: tuple[str, ...] = ()
    tls_creds: str | None = None
    tls_authz: str | None = None
    allow: tuple[str, ...] = ()
    access: str | None = None

    def check(self, *, activated: bool) -> None:
        """Raise `UsageError` where the options contradict each other, or that the server was
        ``activated`` with sockets.
        """
        files = self.tls_certificates is not None or self.tls_psk is not None
        given = files or self.tls_creds is not None
        if (files or self.tls_verify_peer) and (self.object or self.tls_creds or self.tls_authz):
            raise UsageError(
                "--object, --tls-creds and --tls-authz exclude --tls-certificates, --tls-psk and"
                " --tls-verify-peer"
            )
        if self.tls in ("off", "auto") and (given or self.object or self.tls_verify_peer):
            raise UsageError(f"--tls={self.tls}: it goes with no other option of TLS")
        if self.tls in ("on", "require") and not given:
            raise UsageError(
                f"--tls={self.tls}: it needs {_CREDENTIALS}; --tls=auto makes credentials"
            )
        if self.tls == "auto" and activated:
            raise UsageError(
                "--tls=auto: not with socket activation (LISTEN_FDS), where nothing is printed"
            )
        if self.tls_verify_peer and self.tls_certificates is None:
            raise UsageError("--tls-verify-peer: it needs --tls-certificates DIR")
        if self.tls_authz is not None and self.tls_creds is None:
            raise UsageError("--tls-authz: it needs --tls-creds ID")
        if self.object and self.tls_creds is None:
            raise UsageError("--object: nothing uses it; --tls-creds ID does")
        if self.allow and self.access is not None:
            raise UsageError("--allow excludes --access: rules stand in one place")

    @contextmanager
    def opened(
        self, export: str, *, path: str | None, host: str, activated: bool
    ) -> Iterator[Security]:
        """What they make of a server that listens on the unix socket ``path``, or at ``host``."""
        if self.tls == "auto":
            with throwaway_tls.made([] if path is not None else _names_of(host)) as tls:
                yield self._security(export, tls, path, activated)
        else:
            yield self._security(export, self._tls(), path, activated)

    def _tls(self) -> Tls | None:
        required = self.tls != "on"
        if self.tls_creds is not None:
            return qemu_tls.server_tls(
                Objects(self.object), self.tls_creds, self.tls_authz, required=required
            )
        if self.tls_certificates is None and self.tls_psk is None:
            return None
        return tls_of_servers.Tls(
            certificates=self.tls_certificates,
            psk_file=self.tls_psk,
            verify_peer=self.tls_verify_peer,
            required=required,
        )

    def _security(
        self, export: str, tls: Tls | None, path: str | None, activated: bool
    ) -> Security:
        access = self._rules(export, tls, path, activated)
        if access == []:
            log.warning("export %r: no rule lets anybody in", export)
        picky = tls and (tls.credentials.verify_peer or not tls.credentials.certificates)
        if self.tls == "on" and picky and access is None:
            log.warning(
                "--tls=on: whom TLS keeps out comes in clear, as there are no rules"
                " (--allow, --access, or --tls=require)"
            )
        return Security(tls=tls, access=access, is_throwaway=self.tls == "auto")

    def _rules(
        self, export: str, tls: Tls | None, path: str | None, activated: bool
    ) -> list[Allow] | None:
        if self.access is not None:
            rules = access_rules.allowed_in_file(self.access, [export])[export]
        elif self.allow:
            rules = access_rules.allowed(self.allow)
        else:
            return None
        reach = Reach.of(tls, unix=activated or path is not None, tcp=activated or path is None)
        access_rules.check(rules, reach)
        return [rule.allow for rule in rules]


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """What `TlsOptions` have become. ``access``: the rules of the export; None is that there are
    none, and everybody may write.
    """

    tls: Tls | None
    access: Sequence[Allow] | None
    is_throwaway: bool

    def lines(self, where: NbdUri) -> Iterator[str]:
        """What is printed when clients can come to ``where``: the URI first."""
        yield str(self._uri(where))
        if self.is_throwaway:
            assert self.tls is not None
            directory = self.tls.credentials.certificates
            assert directory is not None
            yield from throwaway_tls.client_lines(where, directory, self.tls.credentials.psk_users)

    def _uri(self, where: NbdUri) -> NbdUri:
        if self.tls is None:
            return where
        where = replace(where, tls=True)
        credentials = self.tls.credentials
        if self.is_throwaway:
            return replace(where, tls_certificates=str(credentials.certificates))
        if credentials.psk_file is None:
            return where
        keys = os.path.abspath(tls_files.psk_path(credentials.psk_file))
        return replace(where, user=credentials.psk_users[0], tls_psk_file=keys)


def _names_of(host: str) -> list[str]:
    """Whom a certificate has to be for, so that clients believe a server at ``host``."""
    return [host, socket.gethostname()] if host in _EVERY_ADDRESS else [host]


def tls_options(command: F) -> F:
    """The options; their values come as the keyword arguments that `tls_options_of` takes away."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def tls_options_of(options: dict[str, Any]) -> TlsOptions:
    """Those in ``options``, which has the rest left."""
    return TlsOptions(**{field.name: options.pop(field.name) for field in fields(TlsOptions)})


_OPTIONS = (
    click.option(
        "--tls",
        type=click.Choice(["off", "on", "require", "auto"]),
        help="Whether clients may use TLS (on), or have to (require: the default with credentials);"
        " auto makes certificates and a key for this once, and prints what clients type.",
    ),
    click.option(
        "--tls-certificates",
        metavar="DIR",
        shell_complete=directory_names,
        help="The directory of server-cert.pem and server-key.pem, of ca-cert.pem for"
        " --tls-verify-peer, and of ca-crl.pem, if there is one.",
    ),
    click.option(
        "--tls-psk",
        metavar="FILE",
        shell_complete=file_names,
        help="Users and their pre-shared keys, a line USER:HEXADECIMAL for each.",
    ),
    click.option(
        "--tls-verify-peer",
        is_flag=True,
        help="Let in only who has a certificate from the authority in ca-cert.pem, or one of the"
        " keys.",
    ),
    click.option(
        "--object",
        metavar="TYPE,...",
        multiple=True,
        help="As in QEMU: tls-creds-x509, tls-creds-psk, secret, authz-simple, authz-list,"
        " authz-list-file; repeatable.",
    ),
    click.option("--tls-creds", metavar="ID", help="The tls-creds-* object to use."),
    click.option(
        "--tls-authz",
        metavar="ID",
        help="The authz-* object that says by the name in his certificate who may come in.",
    ),
    click.option(
        "--allow",
        metavar="RIGHT,...",
        multiple=True,
        help="Let in only whom a rule allows to read or to write: read or write, and what he has to"
        " meet: tls=on, cert=NAME, dn=NAME, psk=USER, uid=USER, gid=GROUP, address=NETWORK;"
        " repeatable.",
    ),
    click.option(
        "--access",
        metavar="FILE.toml",
        shell_complete=file_names,
        help='The same in a file: in [exports.NAME], allow = [{ right = "read", ... }, ...].',
    ),
)
