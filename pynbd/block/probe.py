"""What format a file's first bytes look like: the signatures that QEMU's drivers look for when they
guess.

Used for images whose format nobody named, and to keep a guest from writing such a signature into a
raw image whose format was guessed. Being cautious is right in both cases: a file that looks like
any known format is not raw.
"""

from __future__ import annotations

from pynbd.block.qcow2.header import is_qcow2

PROBE_LENGTH = 512  # QEMU looks no further

_SIGNATURES = (
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (0, b"koly", "dmg"),
)
_VMDK_DESCRIPTOR = b"# Disk DescriptorFile"


def probe_format(data: bytes) -> str:
    """What a file that begins with ``data`` (512 bytes, or all of it) looks like; else "raw"."""
    if is_qcow2(data):
        return "qcow" if data[4:8] == b"\0\0\0\1" else "qcow2"
    for offset, signature, name in _SIGNATURES:
        if data.startswith(signature, offset):
            return name
    return "vmdk" if _is_vmdk_descriptor(data) else "raw"


def _is_vmdk_descriptor(data: bytes) -> bool:
    """It is a text: perhaps comments and blank lines, then its signature or its version."""
    for line in data.splitlines():
        if line.startswith(_VMDK_DESCRIPTOR) or line.replace(b" ", b"").startswith(b"version="):
            return True
        if line.strip() and not line.startswith(b"#"):
            return False
    return False
