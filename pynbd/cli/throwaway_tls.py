"""``--tls=auto``: certificates and a key for the life of one server, and what clients type then."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pynbd.cli.keyval import keyval
from pynbd.cli.signals import watch
from pynbd.errors import PynbdError
from pynbd.protocol.uri import NbdUri, Transport
from pynbd.server.tls import Tls
from pynbd.tls import throwaway
from pynbd.tls.credentials import HAS_PSK


@contextmanager
def made(hosts: Sequence[str]) -> Iterator[Tls]:
    """TLS with a private directory of all that a server for ``hosts`` and its clients need, who
    have to show a certificate or a key. The directory goes with the context, and with the process,
    if a signal ends that.
    """
    making = threading.Lock()
    directories: list[str] = []

    def clean() -> None:
        making.acquire()  # for good: what is begun is finished, and nothing else is
        _remove(directories)

    watch().clean = clean
    try:
        with making:
            tls = _make(directories, hosts)
        yield tls
    finally:
        _remove(directories)


def _make(directories: list[str], hosts: Sequence[str]) -> Tls:
    """Make one, and add it to ``directories``."""
    try:
        directories.append(tempfile.mkdtemp(prefix="pynbd-tls-"))
    except OSError as error:
        raise PynbdError(f"--tls=auto: a private directory: {error.strerror}") from None
    directory = Path(directories[-1])
    throwaway.make(directory, hosts=hosts, psk=HAS_PSK)
    keys = directory / "keys.psk" if HAS_PSK else None
    return Tls(certificates=directory, psk_file=keys, verify_peer=True)


def _remove(directories: Sequence[str]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


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
