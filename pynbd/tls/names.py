"""The names in a certificate (RFC 5280, sections 4.1.2.6 and 4.2.1.6)."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from pynbd.errors import TlsError


@dataclass(frozen=True, slots=True)
class CertificateNames:
    """The names in a peer's certificate, which was verified.

    ``dn`` is its distinguished name, as QEMU's ``--tls-authz`` compares it: as GnuTLS writes it.
    ``names`` are its common names and alternative names (DNS, e-mail, URI, IP address).
    """

    dn: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, der: bytes) -> CertificateNames:
        """Of a certificate in DER. Raises `TlsError` if that cannot be read."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            subject = certificate.subject
            names = [str(one.value) for one in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        except ValueError:
            raise TlsError("the peer's certificate cannot be read") from None
        try:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            pass
        except ValueError:
            raise TlsError("the peer's certificate cannot be read") from None
        else:
            for kind in (
                x509.DNSName,
                x509.RFC822Name,
                x509.UniformResourceIdentifier,
                x509.IPAddress,
            ):
                names += map(str, extension.value.get_values_for_type(kind))
        return cls(subject.rfc4514_string(), tuple(dict.fromkeys(names)))
