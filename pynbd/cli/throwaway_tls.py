"""``--tls=auto``: certificates and a key for the life of one server, and what clients type then."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from pynbd.cli.keyval import keyval
from pynbd.cli.signals import watch
from pynbd.errors import PynbdError
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.server.tls import Tls
from pynbd.tls import throwaway
from pynbd.tls.credentials import HAS_PSK

# Certificates of three, two keys, and keys.psk.
_FILES = 6


@contextmanager
def made(hosts: Sequence[str]) -> Iterator[Path]:
    """A private directory with all that a server for ``hosts`` and its clients need. It goes with
    the context, and with the process, if a signal ends that.
    """
    try:
        directory = tempfile.mkdtemp(prefix="pynbd-tls-")
    except OSError as error:
        raise PynbdError(f"--tls=auto: a private directory: {error.strerror}") from None
    remove = partial(_remove, directory)
    watch().clean = remove
    try:
        throwaway.make(Path(directory), hosts=hosts, psk=HAS_PSK)
        yield Path(directory)
    finally:
        remove()


def _remove(directory: str) -> None:
    # A signal may come while the files are made, and each try meet one that was not there before.
    for _ in range(_FILES + 1):
        shutil.rmtree(directory, ignore_errors=True)


def tls_of(directory: Path) -> Tls:
    """TLS by all that `made` has put there; clients have to show one or the other."""
    keys = directory / "keys.psk"
    return Tls(certificates=directory, psk_file=keys if keys.exists() else None, verify_peer=True)


def client_lines(where: NbdUri, directory: Path, users: Sequence[str]) -> Iterator[str]:
    """Command lines of clients, ready for a shell; ``where`` is the URI in clear."""
    with_certificate = str(replace(where, tls=True, tls_certificates=str(directory)))
    yield shlex.join(["nbdinfo", with_certificate])
    yield shlex.join(["nbdcopy", with_certificate, "copy.img"])
    yield _qemu_img(where, "tls-creds-x509", directory)
    for user in users:
        keys = str(directory / "keys.psk")
        yield shlex.join(["nbdinfo", str(replace(where, tls=True, user=user, tls_psk_file=keys))])
        yield _qemu_img(where, "tls-creds-psk", directory, username=user)


def _qemu_img(where: NbdUri, kind: str, directory: Path, **properties: str) -> str:
    credentials = {"id": "tls0", "endpoint": "client", "dir": str(directory), **properties}
    if where.transport is Transport.UNIX:
        address = {"path": where.socket, "tls-hostname": "localhost"}
    else:
        address = {"host": where.host, "port": str(where.port)}
    image = {"driver": "nbd", **address, "export": where.export, "tls-creds": "tls0"}
    tls = ["--object", f"{kind},{keyval(credentials)}"]
    return shlex.join(["qemu-img", "info", *tls, "--image-opts", keyval(image)])
