"""Records of TLS 1.3, written by hand (RFC 8446, sections 5.2 and 7): a client that has shaken
hands sends whatever it wants, legal or not.

Where the client's context has a ``keylog_filename``, `Records.of` finds the secret there. From then
on the client must write in this way only; it reads as before.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
KEY_UPDATE, KEY_UPDATE_ASKED = b"\x18\0\0\1\0", b"\x18\0\0\1\1"
CLOSE_NOTIFY = b"\1\0"
LONGEST = 1 << 14
"""Bytes of plaintext in one record."""


class Records:
    """What a client writes after its handshake."""

    def __init__(self, secret: bytes, cipher: str) -> None:
        self._hash = SHA384() if cipher.endswith("SHA384") else SHA256()
        self._aead = ChaCha20Poly1305 if "CHACHA20" in cipher else AESGCM
        self._key_length = 16 if "AES_128" in cipher else 32
        self._use(secret)

    @classmethod
    def of(cls, client: ssl.SSLObject | ssl.SSLSocket, keylog: Path) -> Records:
        """Those of the client who has shaken hands last; it has written nothing since."""
        lines = [line.split() for line in keylog.read_text().splitlines()]
        secret = [line[2] for line in lines if line[0] == "CLIENT_TRAFFIC_SECRET_0"][-1]
        cipher = client.cipher()
        assert cipher
        assert client.version() == "TLSv1.3"
        return cls(bytes.fromhex(secret), cipher[0])

    def __call__(self, data: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """One record. What follows KEY_UPDATE is encrypted with the next key."""
        inner = data + bytes([kind])
        header = b"\x17\3\3" + (len(inner) + 16).to_bytes(2)
        nonce = (int.from_bytes(self._iv) ^ self._sequence).to_bytes(12)
        self._sequence += 1
        record = header + self._cipher.encrypt(nonce, inner, header)
        if kind == HANDSHAKE and data in (KEY_UPDATE, KEY_UPDATE_ASKED):
            self._use(self._expand("traffic upd", len(self._secret)))
        return record

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = self._aead(self._expand("key", self._key_length))
        self._iv = self._expand("iv", 12)
        self._sequence = 0

    def _expand(self, label: str, length: int) -> bytes:
        """HKDF-Expand-Label."""
        name = b"tls13 " + label.encode()
        info = length.to_bytes(2) + bytes([len(name)]) + name + b"\0"
        return HKDFExpand(self._hash, length, info).derive(self._secret)
