"""Subjects of certificates, of any kind of string, and certificates that bear them: in DER (ITU-T
X.690), as libraries do not make everything that there is. Nothing here knows pynbd.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from interop.certificates import Authority

OCTETS, UTF8, NUMERIC, PRINTABLE, TELETEX, IA5, VISIBLE, UNIVERSAL, BMP = (
    *(4, 12, 18, 19, 20, 22, 26),
    *(28, 30),
)
ENCODINGS = {UTF8: "utf-8", TELETEX: "latin-1", UNIVERSAL: "utf-32-be", BMP: "utf-16-be"}
COMMON_NAME = "2.5.4.3"
# All that GnuTLS has a name for, and some that it has none for.
TYPES = [
    *(f"2.5.4.{number}" for number in (*range(3, 14), 15, 16, 17, 20, 41, 42, 43, 44, 46, 65, 97)),
    *("0.9.2342.19200300.100.1.1", "0.9.2342.19200300.100.1.25", "1.2.3", "2.999.4711"),
    *("1.2.643.3.131.1.1", "1.2.643.100.1", "1.2.643.100.3", "1.2.643.100.5"),
    *(f"1.2.840.113549.1.9.{number}" for number in (1, 2, 4, 7, 20, 21)),
    *("1.2.840.113556.1.4.656", "1.3.6.1.5.5.7.8.5"),
    *(f"1.3.6.1.4.1.311.60.2.1.{number}" for number in (1, 2, 3)),
    *(f"1.3.6.1.5.5.7.9.{number}" for number in (1, 2, 3, 4, 5)),
]
_PRINTABLE = " '()+,-./:=?09AZaz"


class Attribute(NamedTuple):
    oid: str
    text: str
    kind: int = UTF8

    def der(self) -> bytes:
        value = element(self.kind, self.text.encode(ENCODINGS.get(self.kind, "ascii")))
        return element(0x30, _oid(self.oid) + value)


def common_name(text: str, kind: int = UTF8) -> list[list[Attribute]]:
    """A subject of nothing else."""
    return [[Attribute(COMMON_NAME, text, kind)]]


def subject(sets: Sequence[Sequence[Attribute]]) -> bytes:
    """A Name; the attributes of a set are sorted, as DER wants them."""
    return element(
        0x30,
        b"".join(element(0x31, b"".join(sorted(one.der() for one in rdn))) for rdn in sets),
    )


def drawn(rng: random.Random) -> list[list[Attribute]]:
    """A subject of one to four sets."""
    return [
        [_drawn_attribute(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        for _ in range(rng.randint(1, 4))
    ]


class Bearer:
    """Makes certificates that bear a subject. Their signatures are wrong."""

    def __init__(self) -> None:
        marker = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "the subject")])
        made = Authority("An authority").issue(marker, "client").certificate
        whole, tbs = made.public_bytes(Encoding.DER), made.tbs_certificate_bytes
        # Both have lengths of two bytes, after the first.
        self._parts = tbs[4:].split(marker.public_bytes())
        self._signature = whole[4 + len(tbs) :]

    def certificate(self, name: bytes) -> bytes:
        before, after = self._parts
        return element(0x30, element(0x30, before + name + after) + self._signature)


def element(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _oid(text: str) -> bytes:
    first, second, *rest = map(int, text.split("."))
    content = b""
    for arc in (40 * first + second, *rest):
        septets = [arc & 0x7F]
        while arc := arc >> 7:
            septets.append(0x80 | arc & 0x7F)
        content += bytes(reversed(septets))
    return element(6, content)


def _drawn_attribute(rng: random.Random) -> Attribute:
    kind = rng.choice((UTF8, UTF8, UTF8, PRINTABLE, TELETEX, IA5, BMP, NUMERIC, UNIVERSAL, OCTETS))
    signs = {
        UTF8: 'ab ,+"\\<>;#=\n\x7féΩ漢😀',
        BMP: 'ab ,+"\\<>;#=\n\x7féΩ漢😀',
        UNIVERSAL: "ab ,😀",
        TELETEX: "ab ,#\né",
        PRINTABLE: _PRINTABLE,
        NUMERIC: "0123456789 ",
    }.get(kind, 'ab ,+"\\<>;#=\n')
    text = "".join(rng.choices(signs, k=rng.choice((1, 1, 2, 3, 5, 20))))
    if kind == UTF8 and rng.random() < 0.02:
        text += "\0x"
    oid = COMMON_NAME if rng.random() < 0.5 else rng.choice(TYPES)
    return Attribute(oid, text, kind)
