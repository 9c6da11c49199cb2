"""Distinguished names are those of GnuTLS, which QEMU's authorisation compares."""

from __future__ import annotations

import ast
import random
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from interop import peers
from interop.certificates import Pki, distinguished_name
from interop.subjects import Bearer, drawn, subject
from pynbd.tls.names import CertificateNames

SEED = 7
SUBJECTS = 1000

# libnbd's shell has GnuTLS with it.
_SAID_BY_GNUTLS = """
import ctypes
gnutls = ctypes.CDLL("libgnutls.so.30")
class Datum(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_uint)]
for line in open({path!r}):
    der = bytes.fromhex(line)
    certificate = ctypes.c_void_p()
    assert gnutls.gnutls_x509_crt_init(ctypes.byref(certificate)) == 0
    datum = Datum(der, len(der))
    assert gnutls.gnutls_x509_crt_import(certificate, ctypes.byref(datum), 0) == 0
    size, text = ctypes.c_size_t(1 << 16), ctypes.create_string_buffer(1 << 16)
    assert gnutls.gnutls_x509_crt_get_dn(certificate, text, ctypes.byref(size)) == 0
    print(text.raw[:size.value])
    gnutls.gnutls_x509_crt_deinit(certificate)
"""


def test_gnutls_says_the_same(tmp_path: Path) -> None:
    peers.require("nbdsh")
    bearer, rng = Bearer(), random.Random(SEED)
    certificates = [bearer.certificate(subject(drawn(rng))) for _ in range(SUBJECTS)]
    path = tmp_path / "certificates"
    path.write_text("\n".join(der.hex() for der in certificates))
    said = peers.nbdsh(_SAID_BY_GNUTLS.format(path=str(path))).splitlines()
    assert len(said) == SUBJECTS
    for number, (der, line) in enumerate(zip(certificates, said, strict=True)):
        text = ast.literal_eval(line).decode()
        assert CertificateNames.of(der).dn == text, f"seed {SEED}, subject {number}: {der.hex()}"


PEOPLE = {
    "certtool": [("C", "GB"), ("ST", "Essex"), ("L", "Colchester"), ("O", "Ex"), ("CN", "alice")],
    "other-order": [("CN", "alice"), ("O", "Ex"), ("C", "GB")],
    "punctuation": [("O", 'A, B + "C" <D>; E=F\\G#H'), ("CN", "#alice ")],
    "script": [("O", "Bücher Ω"), ("CN", "Zoë 漢字")],
    "mail": [("EMAIL", "alice@example.com"), ("UID", "alice"), ("DC", "example")],
    "unusual": [("SERIAL", "4711"), ("TITLE", "Dr")],
}


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))


@pytest.mark.parametrize("who", PEOPLE)
def test_qemu_nbd_lets_in_whom_we_name(pki: Pki, tmp_path: Path, who: str) -> None:
    peers.require("qemu-nbd", "nbdinfo")
    folder = pki.client(who, subject=distinguished_name(PEOPLE[who]))
    certificate = x509.load_pem_x509_certificate((folder / "client-cert.pem").read_bytes())
    dn = CertificateNames.of(certificate.public_bytes(Encoding.DER)).dn
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    assert size_seen(pki, image, dn, folder).stdout == "1048576\n"
    if who == "certtool":
        assert size_seen(pki, image, dn + "x", folder).returncode
        assert size_seen(pki, image, dn, pki.client("somebody else")).returncode


def size_seen(pki: Pki, image: Path, dn: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a client with the certificate in ``folder`` sees, where only ``dn`` is let in."""
    with peers.qemu_nbd(
        image,
        *("--format=raw", "--tls-creds=tls0", "--tls-authz=who"),
        *("--object", f"tls-creds-x509,id=tls0,endpoint=server,dir={pki.server},verify-peer=on"),
        *("--object", f"authz-simple,id=who,identity={dn.replace(',', ',,')}"),
    ) as uri:
        uri = f"{uri.replace('nbd+', 'nbds+', 1)}&tls-certificates={quote(str(folder))}"
        return peers.run("nbdinfo", "--size", uri, check=False)
