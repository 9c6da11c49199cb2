"""What a row over TLS is served with: X.509 certificates, and the one cipher that is compared.

TLS 1.3 (RFC 8446), a certificate of the server and none of the client, who does not look at it
either: a handshake is no part of any figure. Client and server agree on the cipher, and two that
differ in it are not to be compared, so each server is asked before it is measured.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from interop import certificates, peers

CIPHER = "TLS_AES_256_GCM_SHA384"  # of TLS 1.3 only: RFC 8446, "Cipher Suites"
UNVERIFIED = "tls-verify-peer=false"  # libnbd's parameter of a URI
HANDSHAKE = "4"  # the level at which GnuTLS tells what was agreed on


def prepare(folder: Path) -> None:
    """Put a CA's certificate, a server's, and its key into ``folder``."""
    authority = certificates.Authority("Benchmark CA")
    (folder / "ca-cert.pem").write_bytes(authority.pem())
    authority.issue("localhost", "server", hosts=certificates.HOSTS).store(folder, "server")


def options(program: str, folder: Path) -> list[str]:
    """Arguments of a server that takes nobody without TLS."""
    if program == "qemu-nbd":
        what = f"tls-creds-x509,id=tls,endpoint=server,dir={folder},verify-peer=off"
        return ["--object", what, "--tls-creds", "tls"]
    return ["--tls=require", f"--tls-certificates={folder}"]


def checked(uri: str) -> str:
    """A server's URI, made one over TLS; an AssertionError where it uses no TLS or not `CIPHER`."""
    secure = uri.replace("nbd", "nbds", 1) + ("&" if "?" in uri else "?") + UNVERIFIED
    found = negotiated(secure)
    assert found == CIPHER, f"{secure} uses {found}; rows over TLS compare {CIPHER}"
    return secure


def negotiated(uri: str) -> str:
    """The cipher suite that a server and libnbd agree on, which fio uses, too."""
    said = subprocess.run(
        [*peers.command("nbdinfo"), "--size", uri],
        check=False,
        env={**os.environ, "GNUTLS_DEBUG_LEVEL": HANDSHAKE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    suite = re.search(r"Selected cipher suite: GNUTLS_(\w+)", said.stderr)
    if said.returncode or not suite:
        raise AssertionError(f"nbdinfo {uri}: no TLS\n{said.stderr[-1000:]}")
    return f"TLS_{suite[1]}"
