"""nbdinfo asks for everything there is to know about an export, and lists all exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interop import peers, samples
from interop.conftest import PynbdServe

# The specification's default size constraints, and the maximum payload that every server takes.
BLOCK_SIZES = {
    "block_size_minimum": 1,
    "block_size_preferred": 4096,
    "block_size_maximum": 32 << 20,
}


def exports(*args: str) -> Any:
    said = json.loads(peers.run("nbdinfo", "--json", *args).stdout)
    assert (said["protocol"], said["TLS"]) == ("newstyle-fixed", False)
    assert said["structured"]
    assert said["extended"]
    return said["exports"]


def test_read_only_chain(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("qemu-img", "qemu-io", "nbdinfo")
    top = samples.chain(tmp_path)
    uri = pynbd_serve(top, "-r", "-x", "disk é", "-D", "for a test")
    (listed,) = exports("--list", uri)
    (alone,) = exports("--no-content", uri)
    assert alone == listed
    assert listed.pop("uri") == uri
    assert sorted(listed.pop("contexts")) == [
        "base:allocation",
        "qemu:allocation-depth",
        "qemu:dirty-bitmap:b0",
        "qemu:dirty-bitmap:b1",
    ]
    assert listed == {
        "export-name": "disk é",
        "description": "for a test",
        "export-size": (8 << 20) + (32 << 10),
        "export-size-str": "8224K",
        "is_read_only": True,
        "is_rotational": False,
        "can_block_status_payload": True,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": False,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": False,
        "can_zero": False,
        **BLOCK_SIZES,
    }


def test_writable_raw(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    peers.require("nbdinfo")
    image = tmp_path / "a.raw"
    samples.sparse_file(image, 1_000_001)
    (listed,) = exports("--list", pynbd_serve(image, "-f", "raw"))
    assert listed["export-size"] == 1_000_001
    assert not listed["is_read_only"]
    assert all(listed[f"can_{what}"] for what in ("fast_zero", "flush", "fua", "trim", "zero"))
    assert BLOCK_SIZES.items() <= listed.items()


def test_text(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """What a person sees: the content is recognised by what libmagic reads through the export."""
    peers.require("nbdinfo")
    image = tmp_path / "a.raw"
    image.write_bytes(b"#!/bin/sh\nexit 0\n".ljust(1 << 20, b"\n"))
    uri = pynbd_serve(image, "-f", "raw", "-r")
    said = peers.run("nbdinfo", uri).stdout
    assert "protocol: newstyle-fixed without TLS, using extended packets\n" in said
    assert "export-size: 1048576 (1M)\n" in said
    assert "content: POSIX shell script" in said
    assert peers.run("nbdinfo", "--size", uri).stdout == "1048576\n"
    for question, status in {"read-only": 0, "rotational": 2, "tls": 2}.items():
        assert peers.run("nbdinfo", f"--is={question}", uri, check=False).returncode == status
    for question, status in {"cache": 0, "multi-conn": 0, "write": 2, "trim": 2}.items():
        assert peers.run("nbdinfo", f"--can={question}", uri, check=False).returncode == status


def test_export_that_is_not_there(tmp_path: Path, pynbd_serve: PynbdServe) -> None:
    """The server's own words reach the person who typed the name."""
    peers.require("nbdinfo")
    image = tmp_path / "a.raw"
    samples.sparse_file(image, 1 << 20)
    uri = pynbd_serve(image, "-f", "raw", "-r", "-x", "here")
    said = peers.run("nbdinfo", uri.replace("here", "elsewhere"), check=False)
    assert said.returncode == 1
    assert "there is no export 'elsewhere'" in said.stderr
    assert peers.run("nbdinfo", "--size", uri).stdout == "1048576\n"
