"""The names in a certificate. The texts of subjects are what GnuTLS 3.8.9 says of them; that it
still does, and of many others, is tried in interop/test_tls_names.py.
"""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from interop.certificates import Pki
from interop.subjects import (
    BMP,
    IA5,
    NUMERIC,
    PRINTABLE,
    TELETEX,
    UNIVERSAL,
    Attribute,
    Bearer,
    common_name,
    subject,
)
from pynbd.errors import TlsError
from pynbd.tls.names import CertificateNames


@pytest.fixture(scope="session")
def bearer() -> Bearer:
    return Bearer()


COUNTRY, ORGANIZATION, USER_ID, MAIL = (
    "2.5.4.6",
    "2.5.4.10",
    "0.9.2342.19200300.100.1.1",
    "1.2.840.113549.1.9.1",
)


@pytest.mark.parametrize(
    "sets, text",
    [
        (
            [
                [Attribute(COUNTRY, "GB", PRINTABLE)],
                [Attribute(ORGANIZATION, "Ex")],
                *common_name("alice"),
            ],
            "C=GB,O=Ex,CN=alice",
        ),
        (common_name('a,b+c"d\\e<f>g;h=i#j'), 'CN=a\\,b\\+c\\"d\\\\e\\<f\\>g\\;h=i#j'),
        (common_name("  two  "), "CN=\\  two \\ "),
        (common_name(" "), "CN=\\ "),
        (common_name("#hash"), "CN=\\#hash"),
        (common_name("Jürgen Ω 漢字"), "CN=Jürgen Ω 漢字"),
        (common_name("a line\nfeed\x7f"), "CN=a line\nfeed\x7f"),
        (common_name("nul\0x"), "CN=#0c056e756c0078"),
        (common_name(""), "CN="),
        (common_name("bmpΩ", BMP), "CN=bmpΩ"),
        (common_name("univ", UNIVERSAL), "CN=\\#000000750000006e0000006900000076"),
        (common_name("t61", TELETEX), "CN=t61"),
        (common_name("é", TELETEX), "CN=\\#e9"),
        (common_name("ia5,", IA5), "CN=#16046961352c"),
        ([[Attribute(MAIL, "a@b.example", IA5)]], "EMAIL=a@b.example"),
        ([[Attribute(MAIL, "12")]], "EMAIL=#0c023132"),
        ([[Attribute(COUNTRY, "12")]], "C=#0c023132"),
        ([[Attribute("1.2.643.100.3", "12", NUMERIC)]], "SNILS=12"),
        ([[Attribute("1.2.3", "12")]], "1.2.3=#0c023132"),
        ([[Attribute("2.999.4711", "12")]], "2.999.4711=#0c023132"),
        (
            [
                [
                    Attribute(USER_ID, "u1"),
                    *common_name("multi")[0],
                    Attribute(ORGANIZATION, "o"),
                ],
                [Attribute(COUNTRY, "GB", PRINTABLE)],
            ],
            "O=o+CN=multi+UID=u1,C=GB",
        ),
    ],
)
def test_distinguished_name(bearer: Bearer, sets: list[list[Attribute]], text: str) -> None:
    assert CertificateNames.of(bearer.certificate(subject(sets))).dn == text


def test_no_distinguished_name(bearer: Bearer) -> None:
    assert CertificateNames.of(bearer.certificate(subject([]))) == CertificateNames("", ())


def test_a_long_name(bearer: Bearer) -> None:
    """Lengths of two bytes."""
    names = CertificateNames.of(bearer.certificate(subject(common_name("x" * 300))))
    assert names == CertificateNames("CN=" + "x" * 300, ("x" * 300,))


def test_two_common_names(bearer: Bearer) -> None:
    sets = [*common_name("one"), *common_name("two", BMP), *common_name("one")]
    assert CertificateNames.of(bearer.certificate(subject(sets))).names == ("one", "two")


def test_alternative_names(pki: Pki) -> None:
    issued = pki.ca.issue(
        "host.example",
        "client",
        names=[
            x509.IPAddress(ip_address("192.0.2.1")),
            x509.IPAddress(ip_address("2001:db8::1")),
            x509.UniformResourceIdentifier("spiffe://example/alice"),
            x509.RFC822Name("alice@example.com"),
            x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
            x509.DNSName("other.example"),
            x509.DNSName("host.example"),
        ],
    )
    names = CertificateNames.of(issued.certificate.public_bytes(Encoding.DER)).names
    assert names == (
        "host.example",
        "other.example",
        "alice@example.com",
        "spiffe://example/alice",
        "192.0.2.1",
        "2001:db8::1",
    )


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_not_a_certificate(bearer: Bearer, length: int) -> None:
    with pytest.raises(TlsError, match="cannot be read"):
        CertificateNames.of(bearer.certificate(subject(common_name("alice")))[:length])


@pytest.mark.parametrize("value", [b"\x0c\x01\xff", b"\x13\x01@", b"\x1e\x01a"])
def test_a_string_that_is_none(bearer: Bearer, value: bytes) -> None:
    name = subject(common_name("x")).replace(b"\x0c\x01x", value)
    name = bytes([0x30, len(name) - 2, 0x31, len(name) - 4, 0x30, len(name) - 6]) + name[6:]
    with pytest.raises(TlsError, match="cannot be read"):
        CertificateNames.of(bearer.certificate(name))
