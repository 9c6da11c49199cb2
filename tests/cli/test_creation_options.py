"""``-o``: how its text is parted, and what each option means."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
import pytest

from pynbd.block.new_file import Preallocation
from pynbd.block.qcow2.create import NewImage
from pynbd.block.qcow2.format import CompressionType
from pynbd.cli.creation_options import TYPES, options_option, with_named_options
from pynbd.errors import UsageError


def parsed(*texts: str) -> dict[str, Any]:
    @click.command()
    @options_option
    def command(texts: dict[str, Any]) -> None: ...

    line = [word for text in texts for word in ("-o", text)]
    result: dict[str, Any] = command.make_context("command", line).params["texts"]
    return result


def test_there_is_one_for_each_field() -> None:
    assert set(TYPES) == {field.name for field in fields(NewImage)}


@pytest.mark.parametrize(
    "texts, meant",
    [
        ([], {}),
        ([""], {}),
        (["size=1M,cluster_size=4K"], {"size": 1 << 20, "cluster_size": 4096}),
        (["size=1", "size=2,size=3"], {"size": 3}),
        (["backing_file=a,,b=c,backing_fmt=raw"], {"backing_file": "a,b=c", "backing_fmt": "raw"}),
        (["data_file=,,"], {"data_file": ","}),
        (["extended_l2=on,lazy_refcounts=off"], {"extended_l2": True, "lazy_refcounts": False}),
        (["extended_l2=yes,lazy_refcounts=no"], {"extended_l2": True, "lazy_refcounts": False}),
        (["extended_l2=true,data_file_raw=false"], {"extended_l2": True, "data_file_raw": False}),
        (["compat=v2"], {"compat": "0.10"}),
        (["compat=v3"], {"compat": "1.1"}),
        (["compression_type=zstd"], {"compression_type": CompressionType.ZSTD}),
        (["preallocation=falloc"], {"preallocation": Preallocation.FALLOC}),
    ],
)
def test_what_is_meant(texts: list[str], meant: dict[str, Any]) -> None:
    assert parsed(*texts) == meant


@pytest.mark.parametrize(
    "text, said",
    [
        ("cluster=4k", "^-o cluster: no option of a new image; size, backing_file, "),
        ("size", "^-o size: a value is expected, size=VALUE$"),
        ("size=x", "^-o size: 'x' is not a whole number of bytes"),
        ("backing_fmt=vmdk", "^-o backing_fmt: 'vmdk' is not one of raw, qcow2$"),
        ("data_file_raw=1", "^-o data_file_raw: '1' is not one of on, off, yes, no, true, false$"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(text)


def test_options_of_their_own() -> None:
    named = {"size": None, "extended_l2": True, "compat": "v2", "cluster_size": 512}
    assert with_named_options({"size": 5}, named) == {
        "size": 5,
        "extended_l2": True,
        "compat": "0.10",
        "cluster_size": 512,
    }
    with pytest.raises(UsageError, match=r"^-o compat: it is given twice"):
        with_named_options({"compat": "1.1"}, named)
