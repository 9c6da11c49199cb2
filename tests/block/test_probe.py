"""Guessing formats: signatures as the formats define them, and images by qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

from interop import peers
from pynbd.block.probe import probe_format

SIGNATURES = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "qcow": b"QFI\xfb\0\0\0\1",
    "qed": b"QED\0",
    "vmdk": b"KDMV",
    "vmdk (COWD)": b"COWD",
    "vmdk (descriptor)": b"# Disk DescriptorFile\nversion=1\n",
    "vmdk (comments)": b"\n# hello\n\nversion=1\nCID=1\n",
    "vpc": b"conectix",
    "vhdx": b"vhdxfile",
    "vdi": b"<<< QEMU VM Virtual Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
    "luks": b"LUKS\xba\xbe\0\1",
    "parallels": b"WithoutFreeSpace",
    "parallels (ext)": b"WithouFreSpacExt",
    "bochs": b"Bochs Virtual HD Image",
    "cloop": b"#!/bin/sh\n#V2.0 Format\n",
    "dmg": b"koly",
    "raw": b"",
    "raw (zeroes)": bytes(512),
    "raw (boot sector)": b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa",
    "raw (script)": b"#!/bin/sh\necho version=1\n",
    "raw (text)": b"hello\nversion=1\n",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert probe_format(SIGNATURES[name]) == name.split()[0]
    assert probe_format(SIGNATURES[name].ljust(512, b"\0")) == name.split()[0]


@pytest.mark.parametrize(
    "name", ["qcow", "qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels", "raw"]
)
def test_images_of_qemu_img(tmp_path: Path, name: str) -> None:
    peers.require("qemu-img")
    path = tmp_path / "image"
    made = peers.run("qemu-img", "create", "-q", "-f", name, path, "4M", check=False)
    if made.returncode:
        pytest.skip(f"this qemu-img does not make {name}: {made.stderr}")
    with path.open("rb") as file:
        assert probe_format(file.read(512)) == name
