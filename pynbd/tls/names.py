"""The names in a certificate: its subject as a text, and its alternative names (RFC 5280, sections
4.1.2.6 and 4.2.1.6).

The text is the one that GnuTLS makes (``gnutls_x509_crt_get_dn``), and QEMU's ``--tls-authz``
compares. It looks like RFC 4514, but

1. attributes are in the order of the certificate, those of a set joined by ``+``;
2. types have GnuTLS's names, and are numbers where it knows none;
3. a value is ``#`` and its DER in hexadecimal where GnuTLS does not expect that kind of string in
   this attribute, or a zero is in it; nothing but what RFC 4514 demands is escaped, and that by a
   backslash.

A text may hold line feeds and the like: it is for comparing. Show it with ``repr``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from pynbd.errors import TlsError

# Tags of ASN.1 (ITU-T X.680, section 8.6).
_OCTETS, _UTF8, _NUMERIC, _PRINTABLE, _TELETEX, _IA5 = 4, 12, 18, 19, 20, 22
_UNIVERSAL, _BMP = 28, 30
_VERSION = 0xA0  # [0], the optional first field of TBSCertificate
_SUBJECT = 4  # after serialNumber, signature, issuer, validity

_DIRECTORY = frozenset({_UTF8, _PRINTABLE, _TELETEX, _UNIVERSAL, _BMP})  # DirectoryString
_ENCODINGS = {_UTF8: "utf-8", _BMP: "utf-16-be"}
_COMMON_NAME = "2.5.4.3"
_TYPES: Final[dict[str, tuple[str, frozenset[int]]]] = {
    _COMMON_NAME: ("CN", _DIRECTORY),
    "2.5.4.4": ("surName", _DIRECTORY),
    "2.5.4.5": ("serialNumber", frozenset({_PRINTABLE})),
    "2.5.4.6": ("C", frozenset({_PRINTABLE})),
    "2.5.4.7": ("L", _DIRECTORY),
    "2.5.4.8": ("ST", _DIRECTORY),
    "2.5.4.9": ("street", _DIRECTORY),
    "2.5.4.10": ("O", _DIRECTORY),
    "2.5.4.11": ("OU", _DIRECTORY),
    "2.5.4.12": ("title", _DIRECTORY),
    "2.5.4.13": ("description", _DIRECTORY),
    "2.5.4.15": ("businessCategory", _DIRECTORY),
    "2.5.4.17": ("postalCode", _DIRECTORY),
    "2.5.4.20": ("telephoneNumber", frozenset({_PRINTABLE})),
    "2.5.4.41": ("name", _DIRECTORY),
    "2.5.4.42": ("givenName", _DIRECTORY),
    "2.5.4.43": ("initials", _DIRECTORY),
    "2.5.4.44": ("generationQualifier", _DIRECTORY),
    "2.5.4.46": ("dnQualifier", frozenset({_PRINTABLE})),
    "2.5.4.65": ("pseudonym", _DIRECTORY),
    "0.9.2342.19200300.100.1.1": ("UID", _DIRECTORY),
    "0.9.2342.19200300.100.1.25": ("DC", frozenset({_IA5})),
    "1.2.643.3.131.1.1": ("INN", frozenset({_NUMERIC})),
    "1.2.643.100.1": ("OGRN", frozenset({_NUMERIC})),
    "1.2.643.100.3": ("SNILS", frozenset({_NUMERIC})),
    "1.2.643.100.5": ("OGRNIP", frozenset({_NUMERIC})),
    "1.2.840.113549.1.9.1": ("EMAIL", frozenset({_IA5})),
    "1.2.840.113549.1.9.4": ("1.2.840.113549.1.9.4", frozenset({_OCTETS})),
    "1.2.840.113549.1.9.7": ("1.2.840.113549.1.9.7", frozenset({_UTF8, _PRINTABLE})),
    "1.2.840.113549.1.9.20": ("1.2.840.113549.1.9.20", frozenset({_BMP})),
    "1.2.840.113549.1.9.21": ("1.2.840.113549.1.9.21", frozenset({_OCTETS})),
    "1.2.840.113556.1.4.656": ("userPrincipalName", _DIRECTORY),
    "1.3.6.1.4.1.311.60.2.1.1": ("jurisdictionOfIncorporationLocalityName", _DIRECTORY),
    "1.3.6.1.4.1.311.60.2.1.2": ("jurisdictionOfIncorporationStateOrProvinceName", _DIRECTORY),
    "1.3.6.1.4.1.311.60.2.1.3": (
        "jurisdictionOfIncorporationCountryName",
        frozenset({_PRINTABLE}),
    ),
    "1.3.6.1.5.5.7.8.5": ("XmppAddr", frozenset({_UTF8})),
    "1.3.6.1.5.5.7.9.2": ("placeOfBirth", _DIRECTORY),
    "1.3.6.1.5.5.7.9.3": ("gender", frozenset({_PRINTABLE})),
    "1.3.6.1.5.5.7.9.4": ("countryOfCitizenship", frozenset({_PRINTABLE})),
    "1.3.6.1.5.5.7.9.5": ("countryOfResidence", frozenset({_PRINTABLE})),
}
_UNREADABLE = (
    ValueError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class CertificateNames:
    """The names in a peer's certificate, which was verified.

    ``dn`` is its distinguished name, as QEMU's ``--tls-authz`` compares it; "" if it has none.
    ``names`` are its common names, and its alternative names: of DNS, e-mail addresses, URIs, IP
    addresses; without repeats.
    """

    dn: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, der: bytes) -> CertificateNames:
        """Of a certificate in DER. Raises `TlsError` if that cannot be read."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            subject = _subject(certificate.tbs_certificate_bytes)
            common = [
                text
                for rdn in subject
                for oid, value in rdn
                if oid == _COMMON_NAME and (text := _text(oid, value)) is not None
            ]
            names = [*common, *_alternative_names(certificate)]
            return cls(_distinguished_name(subject), tuple(dict.fromkeys(names)))
        except _UNREADABLE:
            raise TlsError("the names in the peer's certificate cannot be read") from None


def _alternative_names(certificate: x509.Certificate) -> Iterator[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    yield from found.get_values_for_type(x509.DNSName)
    yield from found.get_values_for_type(x509.RFC822Name)
    yield from found.get_values_for_type(x509.UniformResourceIdentifier)
    yield from map(str, found.get_values_for_type(x509.IPAddress))


# A name as in the certificate: sets of attributes, each its type and the DER of its value.
_Name = list[list[tuple[str, bytes]]]


def _subject(tbs: bytes) -> _Name:
    """The subject of a TBSCertificate."""
    fields = [field for field in _elements(_content(tbs)) if field[0] != _VERSION]
    return [
        [_attribute(_content(attribute)) for attribute in _elements(_content(rdn))]
        for rdn in _elements(_content(fields[_SUBJECT]))
    ]


def _attribute(content: bytes) -> tuple[str, bytes]:
    end = _extent(content)[1]
    return _object_identifier(_content(content[:end])), content[end:]


def _distinguished_name(name: _Name) -> str:
    return ",".join("+".join(_shown(*attribute) for attribute in rdn) for rdn in name)


def _shown(oid: str, value: bytes) -> str:
    label = _TYPES[oid][0] if oid in _TYPES else oid
    text = _text(oid, value)
    return f"{label}={'#' + value.hex() if text is None else _escaped(text)}"


def _text(oid: str, value: bytes) -> str | None:
    """The text of an attribute, None if it is not one (rule 3)."""
    tag, content = value[0], _content(value)
    if oid not in _TYPES or tag not in _TYPES[oid][1]:
        return None
    if tag == _UNIVERSAL:
        return "#" + content.hex()
    if tag == _TELETEX and not (content.isascii() and content.decode().isprintable()):
        return "#" + content.hex()
    text = content.decode(_ENCODINGS.get(tag, "ascii"))
    return None if "\0" in text else text


def _escaped(text: str) -> str:
    last = len(text) - 1
    return "".join(
        "\\" + sign
        if sign in ',+"\\<>;' or (at == 0 and sign in "# ") or (at == last and sign == " ")
        else sign
        for at, sign in enumerate(text)
    )


# DER (ITU-T X.690), as far as it is needed in what has been parsed before: all lengths are right.


def _extent(der: bytes) -> tuple[int, int]:
    """Where the content of the first element begins and ends."""
    length = der[1]
    if length < 0x80:
        return 2, 2 + length
    begin = 2 + (length & 0x7F)
    return begin, begin + int.from_bytes(der[2:begin], "big")


def _content(der: bytes) -> bytes:
    return der[slice(*_extent(der))]


def _elements(der: bytes) -> Iterator[bytes]:
    while der:
        end = _extent(der)[1]
        yield der[:end]
        der = der[end:]


def _object_identifier(content: bytes) -> str:
    arcs, arc = [], 0
    for byte in content:
        arc = arc << 7 | byte & 0x7F
        if byte < 0x80:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))
