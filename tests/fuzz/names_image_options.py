"""Images that are named by options: ``json:{...}`` and ``--image-opts`` (QEMU's documentation of
block drivers, and `BlockdevOptions` in its ``qapi/block-core.json``).

The first byte of an input chooses the language; the rest is the text.

Allowed: `UsageError` for what is not the language, `ImageError` for options that mean nothing.
Nothing is opened, whatever is named. What is understood can be said again in JSON, nested or with
dotted names, and means the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache

from pynbd.block.cache_modes import Cache
from pynbd.block.image_options import JSON_PREFIX, parse_image_opts, parse_json_name
from pynbd.block.node_options import FileOptions, ImageOptions, image_options
from pynbd.errors import ImageError, UsageError

ALLOWED = (ImageError, UsageError)
MAX_LEN = 2048
DICTIONARY = tuple(
    b"driver file filename backing data-file raw qcow2 host_device null true false read-only size"
    b" offset cache.direct= cache.no-flush= force-share locking off discard detect-zeroes node-name"
    b" nbd luks encrypt ,, \\u0000 \\ud800 json: file. 1e999 NaN Infinity 0x7fffffffffffffff 1E"
    b" 0.5k".split()
)


def seeds() -> Iterable[bytes]:
    nested = {
        "driver": "qcow2",
        "file": {"driver": "raw", "offset": 512, "file": {"filename": "a", "locking": "off"}},
        "backing": {"driver": "raw", "size": "1M", "file.filename": "b"},
        "data-file": {"driver": "file", "filename": "d"},
        "cache": {"direct": True, "no-flush": "off"},
        "discard": "unmap",
        "read-only": False,
    }
    yield b"\0" + json.dumps(nested).encode()
    yield b"\0{'driver': 'raw', 'file': {'filename': 'it\\'s \"a\"'}, 'size': 1024}"
    yield b'\0{"file.file.file.driver": "file", "driver": "qcow2", "backing": null}'
    yield b'\0{"driver": "nbd", "host": "example.com"}'
    yield b"\0" + b'{"file":' * 310 + b"1" + b"}" * 310
    yield b"\0[" * 1000
    yield b"\1driver=qcow2,file.driver=file,file.filename=a,,b,read-only"
    yield b"\1a.raw,driver=raw,offset=1k,size=0x200,noforce-share"
    yield b"\1driver=raw,file.driver=qcow2,file.file.filename=x,file.cache.direct=on"
    yield b"\1driver=raw,file.filename=x,size=513"
    yield b'\0{"driver": "raw", "file": {"filename": "x"}, "offset": -1, "size": 1e3}'
    yield b"\1driver=raw,size=" + b"9" * 400 + b"." + b"9" * 400 + b"E"


def one_input(data: bytes) -> None:
    text = data[1:].decode("utf-8", "surrogateescape")
    with _NothingIsOpened():
        if data[:1] in (b"", b"\0"):
            tree = parse_json_name(JSON_PREFIX + text)
        else:
            tree = parse_image_opts(text)
        _can_be_said_again(tree)
        options = image_options(tree, cache=Cache.WRITEBACK.mode, force_share=False)
        _judge(options)
        for said in (tree, dict(_flat(tree))):
            again = image_options(_parsed(said), cache=Cache.WRITEBACK.mode, force_share=False)
            assert again == options


class _NothingIsOpened:
    """Nothing is opened, connected or run while it lasts."""

    active = False

    def __enter__(self) -> None:
        _listen()
        _NothingIsOpened.active = True

    def __exit__(self, *_: object) -> None:
        _NothingIsOpened.active = False


@cache
def _listen() -> None:
    """To what the interpreter does; it cannot be told to stop."""
    sys.addaudithook(_forbid)


def _forbid(event: str, args: tuple[object, ...]) -> None:
    if _NothingIsOpened.active and event.startswith(("open", "os.", "socket.", "subprocess.")):
        raise AssertionError(f"{event} of {args}")


def _can_be_said_again(tree: dict[str, object]) -> None:
    assert json.dumps(_parsed(tree)) == json.dumps(tree)


def _parsed(options: Mapping[str, object]) -> dict[str, object]:
    try:
        return parse_json_name(JSON_PREFIX + json.dumps(options))
    except UsageError as error:
        raise AssertionError("what was understood is not, said again") from error


def _flat(tree: Mapping[str, object], path: str = "") -> Iterable[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _judge(options: ImageOptions | FileOptions) -> None:
    if isinstance(options, FileOptions):
        assert options.filename
        return
    assert 0 <= options.offset < 1 << 63
    assert options.size is None or 0 <= options.size < 1 << 63
    assert (options.size or 0) % 512 == 0
    assert not (options.no_backing and options.backing)
    for below in (options.file, options.backing, options.data_file):
        if below is not None:
            _judge(below)
