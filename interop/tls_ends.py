"""Servers and clients of several projects over TLS, each with the credentials that a case gives it.

A server is pynbd, its drop-in, qemu-nbd or nbdkit; a client is libnbd's (nbdinfo), QEMU's
(qemu-img) or pynbd's. All of them read the same directories and files (`interop.certificates`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from interop import drop_in, peers
from pynbd import PynbdError, connect
from pynbd.tls.credentials import HAS_PSK

PYNBD, NBDKIT = "pynbd", "nbdkit"
DROP_IN, QEMU = drop_in.OURS, drop_in.REAL
SERVERS = (PYNBD, DROP_IN, QEMU, NBDKIT)
LIBNBD, QEMU_IMG = "nbdinfo", "qemu-img"
CLIENTS = (LIBNBD, QEMU_IMG, PYNBD)
KEY_CLIENTS = CLIENTS if HAS_PSK else (LIBNBD, QEMU_IMG)
"""Those that can use pre-shared keys, pynbd being the one in this process."""

# What GnuTLS and OpenSSL are told so that a process uses one version of TLS and no other.
_GNUTLS = {"1.2": ("tls1.3",), "1.3": ("tls1.0", "tls1.1", "tls1.2")}
_OPENSSL = """
openssl_conf = all
[all]
ssl_conf = ssl
[ssl]
system_default = versions
[versions]
MinProtocol = TLSv{0}
MaxProtocol = TLSv{0}
"""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What one end has: a directory of certificates, or a file of pre-shared keys, in which a
    client is ``user``. ``verify``: whether it looks at the certificate of the other end.
    """

    certificates: Path | None = None
    psk: Path | None = None
    user: str = "alice"
    verify: bool = True

    def qemu(self, endpoint: str) -> list[str]:
        """The object ``tls0`` of QEMU's programs; the certificates are for the other end to judge,
        they do not look at their own.
        """
        if self.psk:
            said = f"tls-creds-psk,id=tls0,endpoint={endpoint},dir={self.psk.parent}"
            said += f",username={self.user}" * (endpoint == "client")
        else:
            said = f"tls-creds-x509,id=tls0,endpoint={endpoint},dir={self.certificates}"
            said += f",verify-peer={'on' if self.verify else 'off'},sanity-check=off"
        return ["--object", said]

    def nbdkit(self) -> list[str]:
        """The options of nbdkit, which `pynbd serve` has, too."""
        if self.psk:
            return ["--tls=require", f"--tls-psk={self.psk}"]
        verify = ["--tls-verify-peer"] if self.verify else []
        return ["--tls=require", f"--tls-certificates={self.certificates}", *verify]

    def python(self) -> list[str]:
        """The Python that can do this."""
        return peers.python313() if self.psk else [sys.executable]


@dataclass(frozen=True, kw_only=True)
class Where:
    """A unix socket, or a TCP port of localhost."""

    path: Path | None = None
    port: int = 0

    def takes_a_connection(self) -> bool:
        if self.path:
            return peers.connects(self.path)
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def uri(self, client: Credentials | None, hostname: str = "") -> str:
        """With TLS by what ``client`` has, or in clear. ``hostname``: whose certificate is wanted,
        if not that of localhost.
        """
        user, query = "", {"socket": str(self.path)} if self.path else {}
        if client and client.psk:
            user, query["tls-psk-file"] = f"{client.user}@", str(client.psk)
        elif client:
            if hostname:
                query["tls-hostname"] = hostname
            if not client.verify:
                query["tls-verify-peer"] = "0"
            if client.certificates:
                query["tls-certificates"] = str(client.certificates)
        scheme = ("nbds" if client else "nbd") + ("+unix" if self.path else "")
        host = "" if self.path else f"localhost:{self.port}"
        return f"{scheme}://{user}{host}/" + ("?" + urlencode(query, safe="/") if query else "")

    def blockdev(self, client: Credentials | None, hostname: str = "") -> str:
        """The same as the options of a block device of QEMU's."""
        if self.path:
            server = f"server.type=unix,server.path={self.path}"
        else:
            server = f"server.type=inet,server.host=localhost,server.port={self.port}"
        if client:
            server += ",tls-creds=tls0"
            server += f",tls-hostname={hostname}" * bool(hostname and not client.psk)
        return f"driver=nbd,{server}"


@dataclass(frozen=True)
class Server:
    """One that runs, and a file with all that it says."""

    process: subprocess.Popen[bytes]
    where: Where
    log: Path

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Watched:
    """A server of ours, what it says of each client, and the descriptors that stay."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen = 0
        self._descriptors = 0

    def said(self) -> str:
        """Of the next client that has gone; and nothing of it is left."""
        drop_in.wait_until(lambda: len(self._ends()) > self._seen)
        said = self._ends()[self._seen]
        self._seen += 1
        self._descriptors = self._descriptors or self._server.descriptors()
        drop_in.wait_until(lambda: self._server.descriptors() <= self._descriptors)
        return said

    def said_all(self) -> bool:
        return len(self._ends()) == self._seen

    def _ends(self) -> list[str]:
        lines = self._server.log.read_text().splitlines()
        return [line for line in lines if re.search(" disconnected: | has left$", line)]


@dataclass(frozen=True)
class Outcome:
    """``size``: of the export that a client found, None if it was refused; and its complaint."""

    size: int | None
    complaint: str


def only(version: str, folder: Path) -> dict[str, str]:
    """The environment of a process that is to use TLS ``version`` ("1.2", "1.3"; "" is any)."""
    if not version:
        return {}
    gnutls, openssl = folder / f"gnutls-{version}", folder / f"openssl-{version}"
    lines = [f"disabled-version = {other}" for other in _GNUTLS[version]]
    gnutls.write_text("\n".join(["[overrides]", *lines, ""]))
    openssl.write_text(_OPENSSL.format(version))
    return {"GNUTLS_SYSTEM_PRIORITY_FILE": str(gnutls), "OPENSSL_CONF": str(openssl)}


@contextmanager
def serving(
    program: str,
    image: Path,
    credentials: Credentials | None,
    *args: str,
    tcp: bool = False,
    form: str = "raw",
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server of ``image`` that requires TLS, or has none, until the end of the context: SIGTERM,
    and it leaves with status 0.
    """
    with tempfile.TemporaryDirectory(prefix="tls-", dir="/tmp") as name:
        folder = Path(name)
        where = Where(port=drop_in.free_port()) if tcp else Where(path=folder / "s")
        line = _line(program, image, credentials, args, where, form)
        log = folder / "log"
        env = {**os.environ, **(environment or {})}
        with (
            log.open("wb") as said,
            subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=env
            ) as process,
        ):
            try:
                deadline = time.monotonic() + 30
                while not where.takes_a_connection():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise AssertionError(f"{line} does not listen: {log.read_text()}")
                    time.sleep(0.005)
                yield Server(process, where, log)
            finally:
                process.terminate()
                try:
                    status = process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
            assert status == 0, f"{line}: status {status}: {log.read_text()}"
            assert "Traceback" not in log.read_text()


def _line(
    program: str,
    image: Path,
    credentials: Credentials | None,
    args: tuple[str, ...],
    where: Where,
    form: str,
) -> list[str]:
    tls = credentials.nbdkit() if credentials else []
    if program == NBDKIT:
        address = [f"--unix={where.path}"] if where.path else ["-i127.0.0.1", f"-p{where.port}"]
        line = [*peers.command("nbdkit"), "--foreground", *tls, *address]
        return [*line, *args, "file", str(image)]
    address = [f"--socket={where.path}"] if where.path else ["-b127.0.0.1", f"-p{where.port}"]
    rest = [*address, f"--format={form}", *args, str(image)]
    python = credentials.python() if credentials else [sys.executable]
    if program == PYNBD:
        return [*python, "-m", "pynbd", "serve", "-v", *tls, *rest]
    line = [*python, "-m", "pynbd.qemu_nbd", "-v"] if program == DROP_IN else peers.command(QEMU)
    objects = [*credentials.qemu("server"), "--tls-creds=tls0"] if credentials else []
    return [*line, "-t", "-e0", *objects, *rest]


def ask(
    client: str,
    where: Where,
    credentials: Credentials | None,
    hostname: str = "",
    environment: dict[str, str] | None = None,
) -> Outcome:
    """What a client gets that asks for the size of the export. pynbd is the one in this process,
    and not in that ``environment``.
    """
    uri = where.uri(credentials, hostname)
    if client == PYNBD:
        return asyncio.run(_ask_here(uri))
    if client == LIBNBD:
        line = [*peers.command(LIBNBD), "--json", uri]
    else:
        objects = credentials.qemu("client") if credentials else []
        options = where.blockdev(credentials, hostname)
        line = [*peers.command(QEMU_IMG), "info", "--output=json", *objects]
        line += ["--image-opts", options]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=env, timeout=60)
    if done.returncode:
        return Outcome(None, done.stderr.strip())
    said = json.loads(done.stdout)
    if client == QEMU_IMG:
        return Outcome(said["virtual-size"], "")
    return Outcome(said["exports"][0]["export-size"], "")


async def _ask_here(uri: str) -> Outcome:
    try:
        async with connect(uri) as client:
            return Outcome(client.size, "")
    except (PynbdError, OSError) as error:
        return Outcome(None, str(error))


def check_complaint(complaint: str, uri: str, reason: str) -> None:
    """Of pynbd as the client: one line, which names the URI and the ``reason``."""
    assert complaint.startswith(f"{uri}: TLS: "), complaint
    assert complaint.isprintable()
    assert re.search(reason, complaint), complaint
