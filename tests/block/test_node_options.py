"""What the options of a node mean. What QEMU says of the same is in
interop/test_qemu_img_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pynbd.block.cache_modes import Cache, CacheMode
from pynbd.block.image_options import parse_image_opts
from pynbd.block.node_options import FileOptions, ImageOptions, image_options
from pynbd.errors import ImageError, UnsupportedFeature

BUFFERED = CacheMode()


def meant(options: str | Mapping[str, object], cache: Cache = Cache.WRITEBACK) -> ImageOptions:
    if isinstance(options, str):
        options = parse_image_opts(options)
    return image_options(options, cache=cache.mode, force_share=False)


def test_a_protocol_alone_is_raw() -> None:
    for driver, device in (("file", False), ("host_device", True)):
        options = meant(f"driver={driver},filename=x")
        file = FileOptions("x", BUFFERED, False, device)
        assert options == ImageOptions("raw", file, BUFFERED, False)


def test_nested() -> None:
    options = meant(
        "driver=qcow2,file.driver=raw,file.offset=1k,file.file.filename=x,backing.driver=raw,"
        "backing.size=512,data-file.filename=d,read-only=on"
    )
    assert options.driver == "qcow2"
    assert options.read_only
    inner = options.file
    assert isinstance(inner, ImageOptions)
    assert (inner.driver, inner.offset, inner.size, inner.is_window) == ("raw", 1024, None, True)
    assert inner.file == FileOptions("x", BUFFERED, False)
    assert options.backing is not None
    assert (options.backing.file, options.backing.size) == (None, 512)
    assert options.data_file == FileOptions("d", BUFFERED, False)
    assert not options.no_backing


@pytest.mark.parametrize("value", [None, ""])
def test_no_backing(value: object) -> None:
    assert meant({"driver": "qcow2", "file": {"filename": "x"}, "backing": value}).no_backing


def test_caches_are_inherited() -> None:
    text = "driver=qcow2,file.filename=x,cache.direct={},file.cache.direct={}"
    for above, below in (("on", "off"), ("off", "on")):
        options = meant(text.format(above, below), Cache.DIRECTSYNC)
        assert options.cache == CacheMode(direct=above == "on", write_through=True)
        assert isinstance(options.file, FileOptions)
        assert options.file.cache == CacheMode(direct=below == "on", write_through=True)
    options = meant("driver=raw,file.filename=x,cache.no-flush=on")
    assert isinstance(options.file, FileOptions)
    assert options.file.cache == CacheMode(no_flush=True)


@pytest.mark.parametrize("option", ["force-share=on", "file.force-share=on"])
def test_force_share(option: str) -> None:
    options = meant(f"driver=raw,file.filename=x,{option}")
    assert isinstance(options.file, FileOptions)
    assert options.file.force_share
    assert options.file.locked


def test_without_locks() -> None:
    options = meant("driver=raw,file.filename=x,file.locking=off")
    assert isinstance(options.file, FileOptions)
    assert not options.file.force_share
    assert not options.file.locked


@pytest.mark.parametrize(
    "text",
    [
        "driver=file,filename=x,{}",
        "driver=raw,file.filename=x,{}",
        "driver=raw,file.filename=x,file.{}",
    ],
)
@pytest.mark.parametrize("option", ["read-only", "force-share"])
def test_what_is_not_to_be_written(text: str, option: str) -> None:
    """Wherever it stands, as qemu-nbd has it ("Block node is read-only")."""
    with pytest.raises(ImageError, match=f"image option {option}: "):
        meant(text.format(f"{option}=on")).refuse_writing()
    meant(text.format(f"{option}=off")).refuse_writing()


@pytest.mark.parametrize("value", [[], {}, 1, None])
def test_flags_of_other_types(value: object) -> None:
    """As JSON may have them."""
    with pytest.raises(ImageError, match=r"read-only: .* is not on or off"):
        meant({"driver": "raw", "file": {"filename": "x"}, "read-only": value})


@pytest.mark.parametrize(
    "value, size",
    [("512", 512), ("1k", 1024), ("1.5K", 1536), ("0x400", 1024), ("512b", 512), ("+2M", 2 << 20)],
)
def test_sizes(value: str, size: int) -> None:
    """As qemu-img takes them."""
    assert meant(f"driver=raw,file.filename=x,offset={value}").offset == size


@pytest.mark.parametrize(
    "text, kind, parts",
    [
        ("driver=bogus", ImageError, "image option driver: 'bogus' is not one of file, host_dev"),
        ("driver=nbd,host=x", UnsupportedFeature, "image option driver: the driver 'nbd' is not"),
        ("driver=compress,file.filename=x", UnsupportedFeature, "'compress' is not supported"),
        ("driver=raw,file.driver=luks", UnsupportedFeature, "file.driver: the driver 'luks'"),
        ("driver=raw,file.filename=x,file.bogus=1", ImageError, "option file.bogus: no option of"),
        ("driver=raw,file.filename=x,bogus=1", ImageError, "the driver raw; allowed: auto-read"),
        ("driver=raw,file.filename=x,size=7", ImageError, "size: '7' is not a multiple of 512"),
        ("driver=raw,file.filename=x,offset=x", ImageError, "offset: 'x' is not a number of byt"),
        ("driver=raw,file.filename=x,read-only=1", ImageError, "read-only: '1' is not on or off"),
        ("driver=raw,file.filename=x,detect-zeroes=unmap", UnsupportedFeature, "not supported yet"),
        ("driver=raw,file.filename=x,discard=x", ImageError, "discard: 'x' is not one of ignore"),
        ("driver=qcow2,file.filename=x,encrypt.format=luks", UnsupportedFeature, "encryption"),
        ("driver=qcow2,file=x", ImageError, "file: 'x' is not options (file.NAME=...)"),
        ("driver=qcow2,file.driver=file", ImageError, "file.filename: a file name is needed"),
        ("driver=qcow2", ImageError, "image option file: a node is needed"),
        ("read-only=on", ImageError, "image option driver: driver or file is needed"),
        ("driver=qcow2,file.filename=x,data-file.driver=qcow2", UnsupportedFeature, "data-file.d"),
        ("driver=raw,file.filename=x,cache.size=1", ImageError, "cache.size: no option of a cache"),
    ],
)
def test_refused(text: str, kind: type[ImageError], parts: str) -> None:
    with pytest.raises(ImageError) as caught:
        meant(text)
    assert type(caught.value) is kind
    assert parts in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\u2028", "\udcff"])
def test_an_option_whose_name_is_not_for_people_is_quoted(name: str) -> None:
    """A backing file may be recorded as ``json:{...}``, with any name in it."""
    with pytest.raises(ImageError, match="no option of the driver file") as caught:
        meant({"driver": "raw", "file": {"driver": "file", "filename": "x", name: "1"}})
    path = f"file.{name}"
    assert f"image option {path!r}: " in str(caught.value)
    assert str(caught.value).isprintable()
